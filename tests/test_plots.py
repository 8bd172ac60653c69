"""What the plots draw is what was measured; axes given are drawn on and returned."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Quadratic
from torch import Tensor

import pyro_sam as ps
from pyro_sam import metrics, plots


@pytest.fixture(autouse=True)
def canvas() -> Iterator[None]:
    mpl.use("Agg")
    yield
    plt.close("all")


@pytest.fixture
def ax() -> Any:
    return plt.figure().add_subplot()


X = torch.linspace(-1, 1, 12).double()


def regression(likelihood: Any, x: Tensor = X) -> ps.Prediction:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", likelihood(w * x), obs=y)

    guide = ps.MeanFieldNormal(model, init_scale=0.5).initialize(x, x)
    return ps.predict(model, guide, x, num_samples=100)


def labels(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_training_curves_are_the_history(ax: Any) -> None:
    history = {"loss": [3.0, 2.0, 1.5], "kl": [0.1, 0.2, 0.3], "grad_norm": [9.0, 8.0, 7.0]}
    assert plots.training_curves(history, ax=ax) is ax
    (line,) = ax.lines
    assert list(line.get_xdata()) == [1, 2, 3]
    assert list(line.get_ydata()) == history["loss"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss")
    both = plots.training_curves(history, ("kl", "grad_norm"))
    assert both is not ax
    assert labels(both) == ["kl", "grad_norm"]
    assert both.get_ylabel() == "kl, grad_norm"
    assert plots.training_curves(history, "kl").get_ylabel() == "kl"


def test_replicas_have_a_line_each_and_one_name(ax: Any) -> None:
    history = {"loss": [[3.0, 2.0], [1.0, 0.5]], "validation": [[0.4, 0.3], [0.2, 0.1]]}
    plots.training_curves(history, ("loss", "validation"), ax=ax)
    assert [list(line.get_ydata()) for line in ax.lines] == [[3.0, 1.0], [2.0, 0.5], [0.4, 0.2], [0.3, 0.1]]
    assert labels(ax) == ["loss", "validation"]


def test_reliability_diagram_shows_each_bin_and_the_calibration_error(ax: Any) -> None:
    probs = torch.tensor([[0.9, 0.1], [0.85, 0.15], [0.3, 0.7], [0.4, 0.6], [1.0, 0.0]])
    y = torch.tensor([0, 1, 1, 0, 0])
    assert plots.reliability_diagram(probs, y, num_bins=5, ax=ax) is ax
    accuracy, gap, share = ax.containers
    # bins 0.6 to 0.8 (0.7 and 0.6: right, wrong) and 0.8 to 1 (0.9, 0.85 and 1: right, wrong, right)
    assert [bar.get_x() + bar.get_width() / 2 for bar in accuracy] == pytest.approx([0.7, 0.9])
    assert [bar.get_height() for bar in accuracy] == pytest.approx([1 / 2, 2 / 3])
    assert [bar.get_y() + bar.get_height() for bar in gap] == pytest.approx([0.65, 2.75 / 3])
    assert [bar.get_height() for bar in share] == pytest.approx([2 / 5, 3 / 5])
    error = metrics.ece(probs, y, num_bins=5)
    assert f"gap (ECE {error:.3f})" in labels(ax)


def test_reliability_diagram_is_legible_in_print(ax: Any) -> None:
    plots.reliability_diagram(torch.rand(200, generator=torch.Generator().manual_seed(0)), torch.ones(200), ax=ax)
    grey = torch.tensor([0.299, 0.587, 0.114]).double()
    shades = []
    for bars in ax.containers:
        *rgb, alpha = bars.patches[0].get_facecolor()
        shades.append(float(grey @ torch.tensor(rgb).double() * alpha + 1 - alpha))
        assert not bars.patches[0].get_hatch()
    shades.sort()
    assert min(high - low for low, high in zip(shades, [*shades[1:], 1.0], strict=True)) > 0.1
    ax.figure.canvas.draw()
    assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1  # above the bars


def test_loss_slice_goes_up_the_gradient_and_through_the_mean(ax: Any) -> None:
    problem = Quadratic.random(4)
    assert plots.loss_slice(problem.model(), problem.guide(), radius=2.0, num_points=9, ax=ax) is ax
    adversary, chance, _ = ax.lines
    u = problem.u(torch.zeros(4))
    steps = torch.linspace(-2, 2, 9)
    exact = [float(problem.loss(problem.loc + problem.scale * step * u / u.norm())) for step in steps]
    assert list(adversary.get_xdata()) == pytest.approx(steps.tolist())
    assert list(adversary.get_ydata()) == pytest.approx(exact)
    assert chance.get_ydata()[4] == pytest.approx(exact[4])
    assert chance.get_ydata()[8] < adversary.get_ydata()[8]
    assert labels(ax) == ["adversary", "random direction"]


@pytest.mark.parametrize("order", [torch.arange(12), torch.randperm(12, generator=torch.Generator().manual_seed(0))])
def test_regression_bands_lie_between_quantiles_whatever_the_order(order: Tensor, ax: Any) -> None:
    prediction = regression(lambda f: dist.Normal(f, 0.3), X[order])
    assert plots.regression_bands(prediction, X[order], levels=[0.5, 0.9], data=(X, X**2), ax=ax) is ax
    narrow, below, above = (band.get_paths()[0].vertices[:, 1] for band in ax.collections)
    for lower, upper, q in ((below, above, 0.05), (narrow, narrow, 0.25)):
        assert lower.min() == pytest.approx(float(prediction.quantile(q).min()))
        assert upper.max() == pytest.approx(float(prediction.quantile(1 - q).max()))
    mean, dots = ax.lines
    assert list(mean.get_xdata()) == pytest.approx(X.tolist())
    assert list(mean.get_ydata()) == pytest.approx(prediction.mean[order.argsort()].tolist())
    assert list(dots.get_ydata()) == pytest.approx((X**2).tolist())
    assert labels(ax) == ["50 % interval", "90 % interval", "mean", "data"]


def test_regression_bands_do_not_cover_each_other_so_that_the_legend_has_their_shades(ax: Any) -> None:
    prediction = regression(lambda f: dist.Normal(f, 0.3), X)
    plots.regression_bands(prediction, X, levels=[0.5, 0.9], ax=ax)
    inside = [bool(path.contains_points([(x, y)])[0]) for path, x, y in _middle(ax, prediction)]
    assert inside == [True, False, False]
    shades = [patch.get_facecolor() for patch in ax.get_legend().get_patches()]
    narrow, below, above = (tuple(band.get_facecolor()[0]) for band in ax.collections)
    assert shades == [narrow, below]
    assert below == above
    assert narrow[3] > below[3]


def _middle(ax: Any, prediction: Any) -> list[tuple[Any, float, float]]:
    """Return each band's outline, and a point that is in the narrowest one only."""
    return [(band.get_paths()[0], float(X[5:7].mean()), float(prediction.mean[5:7].mean())) for band in ax.collections]


def test_regression_bands_without_a_quantile_function_are_those_of_draws(ax: Any) -> None:
    scaled = regression(lambda f: dist.StudentT(1e6, 0.0 * f, 2.0))  # all but a Normal
    plots.regression_bands(scaled, X, levels=0.5, ax=ax)  # type: ignore[arg-type]
    band = ax.collections[0].get_paths()[0].vertices
    upper = float(dist.Normal(0.0, 2.0).icdf(torch.tensor(0.75)))
    assert band[:, 1].max() == pytest.approx(upper, rel=0.2)
    assert band[:, 1].min() == pytest.approx(-upper, rel=0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: plots.training_curves({"loss": [1.0]}, ["los"]), r"keys must name parts of the history, loss, got"),
        (lambda p: plots.training_curves({"loss": [1.0]}, []), r"keys must name parts of the history"),
        (lambda p: plots.training_curves([1.0]), r"history must be a mapping from names to values"),
        (lambda p: plots.training_curves({"loss": [1.0]}, ax=3), r"ax must be matplotlib axes, got 3"),
        (lambda p: plots.reliability_diagram(p, X), r"a Normal likelihood has no class probabilities"),
        (lambda p: plots.reliability_diagram(p, X, num_bins=0), r"num_bins must be a whole number of at least 1"),
        (lambda p: plots.regression_bands(p, X[:3]), r"x must have one number for each prediction, .* got \(3,\)"),
        (
            lambda p: plots.regression_bands(X, p),
            r"prediction, which comes first, must be a Prediction, .* got a Tensor",
        ),
        (lambda p: plots.regression_bands(p, X, levels=[1.0]), r"levels must be between 0 and 1, got levels=\[1.0\]"),
        (lambda p: plots.regression_bands(p, X, data=X), r"data must be a pair of inputs and observations, got a Te"),
        (lambda p: plots.regression_bands(p, X, data=(X, X[:3])), r"data must have as many inputs as .* 12 and 3"),
        (lambda p: plots.training_curves({"loss": [1.0]}, 3), r"keys must be names of curves such as"),
        (lambda p: plots.loss_slice(print, print, radius=0.0), r"radius must be positive, got radius=0.0"),
        (lambda p: plots.loss_slice(print, print, num_points=0), r"num_points must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call: Any, message: str) -> None:
    prediction = regression(lambda f: dist.Normal(f, 0.3))
    with pytest.raises(ValueError, match=message):
        call(prediction)


def test_without_matplotlib_the_plots_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install "pyro-sam\[plots\]"'):
        plots.training_curves({"loss": [1.0]})


def test_importing_the_package_imports_no_extra() -> None:
    extras = "{'matplotlib', 'scipy', 'torchmetrics', 'sklearn', 'tqdm', 'arviz'}"
    # what torch or Pyro import by themselves is theirs
    code = (
        f"import sys, torch, pyro; before = set(sys.modules); import pyro_sam; {extras} & (set(sys.modules) - before)"
    )
    code = code.replace("; {'", "; print({'") + ")"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def trials(law: str, values: list[tuple[float, float]]) -> list[dict[str, Any]]:
    return [{"kl_weight": weight, "nll": nll, "law": law} for weight, nll in values]


def test_a_search_is_drawn_by_law_with_the_lower_envelope_of_its_trials(ax: Any) -> None:
    one = [(1.0, 3.0), (0.1, 1.0), (0.01, 2.0), (0.3, 4.0), (0.03, float("nan"))]
    rows = trials("Gaussian", one) + trials("Adversarial", [(1.0, 5.0)])
    assert plots.tuning(rows, ax=ax) is ax
    dots, envelope = ax.lines[:2]
    assert dots.get_xydata().tolist() == [[0.01, 2.0], [0.1, 1.0], [0.3, 4.0], [1.0, 3.0]]
    assert envelope.get_ydata().tolist() == [2.0, 1.0, 3.0, 3.0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["Gaussian", "Adversarial"]
    named = plots.tuning({"a": trials("", one), "b": trials("", one)})
    assert [text.get_text() for text in named.get_legend().get_texts()] == ["a", "b"]
    assert named.get_xlabel() == "kl_weight"


def test_what_is_no_search_is_refused() -> None:
    with pytest.raises(ValueError, match="x must be a setting in the table, such as 'kl_weight', got x='rho'"):
        plots.tuning(trials("", [(1.0, 1.0)]), "rho")
    with pytest.raises(ValueError, match=r"x must be a setting with numbers, .* got x='law'; pass by='law'"):
        plots.tuning([{"law": "mfvi", "nll": 1.0}], "law")
    with pytest.raises(ValueError, match="tables must hold a trial with a finite nll"):
        plots.tuning(trials("", [(1.0, float("nan"))]))
