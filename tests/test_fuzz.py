"""Random bad arguments to every constructor and function: an error names the argument, and is the package's own.

``FUZZ_CASES=5000 pytest tests/test_fuzz.py`` runs more than the suite does; ``FUZZ_SEED`` starts elsewhere.
"""

import math
import os
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_sam as ps

CASES = int(os.environ.get("FUZZ_CASES", "300"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))


@dataclass(frozen=True)
class Target:
    """What to call, with arguments that are right, of which some are then made wrong."""

    name: str
    call: Callable[..., Any]
    right: dict[str, Any]


class Odd:
    """Neither a number nor anything else."""


def junk(rng: random.Random) -> Any:
    values: list[Any] = [
        None, True, False, 0, -1, 1, 2, 3, -0.5, 0.5, 1.5, 1e300, 1e-300, math.inf, -math.inf, math.nan, 1j,
        "", "a", "obs", "noise", b"x", [], [1], [0.5, 0.5], ["a"], [None], (), (1, 2), {}, {"a": 1}, {1}, range(3), ...,
        Odd, Odd(), int, print, lambda: None, lambda *a, **k: None, lambda name: name, np.float32(2.0), np.int64(3),
        np.zeros(3), np.array(["a"]), torch.tensor(1.0), torch.tensor(-1), torch.tensor([1.0, math.nan]),
        torch.tensor([0.5, 0.5]), torch.zeros(0), torch.zeros(3, 2), torch.zeros(6), torch.ones(6, 3) / 3,
        torch.arange(6), torch.zeros(6, dtype=torch.bool), torch.zeros(6, dtype=torch.complex64), torch.zeros(2, 2, 2),
        torch.float32, torch.device("cpu"), nn.ReLU(), nn.Linear(2, 2), dist.Normal(0.0, 1.0), dist.Normal, ps.Mean(),
        ps.Mean, [ps.Mean()], [ps.Mean(), 3], "loss", ["loss"], {"loss": [1.0]}, {"loss": "abc"}, slice(3),
    ]  # fmt: skip
    return rng.choice(values)


def targets() -> Iterator[Target]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(w[..., :1] * x, 1.0), obs=y)

    def classes(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=torch.stack([w[0] * x, w[1] * x, x], -1)), obs=y)

    x = torch.linspace(-1, 1, 6)
    labels = torch.arange(6) % 3
    pyro.clear_param_store()
    guide = ps.MeanFieldNormal(model).initialize(x, x)
    pair = {"model": model, "guide": guide}
    regression = ps.predict(model, guide, x, num_samples=3)
    categorical = ps.predict(classes, lambda x: guide(x, x), x, num_samples=3)
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    bnn = ps.BayesianModule(net)

    def with_data(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda model, guide, **settings: function(model, guide, x, x, **settings)

    yield Target("Adversarial", ps.Adversarial, {"rho": 1.0, "steps": 1, "ord": 2, "geometry": "fisher", "eta": 0.1})
    yield Target("MixSAM", ps.MixSAM, {"rho": 1.0, "kappa": 1.0})
    yield Target("AscendedSample", ps.AscendedSample, {"alpha": 1.0})
    yield Target("Mixture", ps.Mixture, {"perturbations": [ps.Mean(), ps.Gaussian()], "probs": [0.5, 0.5]})
    yield Target(
        "SAM_ELBO",
        ps.SAM_ELBO,
        {
            "perturbation": ps.Adversarial(),
            "kl_weight": 1.0,
            "scale_gradient": "mean",
            "scope": "site",
            "hide": (),
            "num_particles": 1,
            "vectorize_particles": False,
            "max_plate_nesting": 2,
            "retain_graph": None,
            "ascent": "fresh",
            "ascent_decay": 0.9,
            "sync_ascent": False,
            "compile": False,
        },
    )

    def start(**settings: Any) -> None:
        pyro.clear_param_store()
        ps.MeanFieldNormal(**settings).initialize(x, x)

    yield Target(
        "MeanFieldNormal",
        start,
        {
            "model": model,
            "init_loc_fn": pyro.infer.autoguide.init_to_median,
            "init_scale": 0.1,
            "learn_scale": True,
            "create_plates": None,
        },
    )
    yield Target(
        "BayesianModule",
        lambda **settings: ps.BayesianModule(**settings)(torch.zeros(1, 2)),
        {"net": net, "prior": dist.Normal(0.0, 1.0), "hide": "0.bias"},
    )
    yield Target("fan_in_normal", ps.nn.fan_in_normal, {"std": 1.0})
    yield Target("init_to_module", ps.nn.init_to_module, {"bnn": bnn, "fallback": pyro.infer.autoguide.init_to_median})
    yield Target(
        "predict",
        lambda model, guide, **settings: ps.predict(model, guide, x, **settings),
        {**pair, "num_samples": 2, "batch_size": 4, "site": "obs", "samples_at_once": 1, "progress": False},
    )
    yield Target("log_prob", regression.log_prob, {"y": x})
    yield Target("log_prob of classes", categorical.log_prob, {"y": labels})
    yield Target("cdf", regression.cdf, {"y": x})
    yield Target("quantile", regression.quantile, {"q": 0.5})
    for metric in (ps.metrics.accuracy, ps.metrics.nll, ps.metrics.brier, ps.metrics.ece):
        yield Target(metric.__name__, metric, {"prediction": categorical, "y": labels})
    yield Target("ece", ps.metrics.ece, {"prediction": torch.ones(6, 3) / 3, "y": labels, "num_bins": 5})
    yield Target("auroc_ood", ps.metrics.auroc_ood, {"inside": categorical, "outside": torch.ones(6, 3) / 3})
    yield Target("rmse", ps.metrics.rmse, {"prediction": regression, "y": x})
    yield Target("coverage", ps.metrics.interval_coverage, {"prediction": regression, "y": x, "level": 0.9})
    yield Target("draws", ps.metrics.interval_coverage, {"prediction": torch.zeros(4, 6), "y": x, "level": 0.9})
    for name, settings in {
        "sharpness": {"rho": 0.1, "num_steps": 2},
        "average_sharpness": {"rho": 0.1, "num_directions": 2},
        "hessian_eigenvalues": {"num_eigenvalues": 1, "tol": 0.1},
        "hessian_trace": {"num_probes": 2},
    }.items():
        yield Target(name, with_data(getattr(ps.flatness, name)), {**pair, "space": "noise", **settings})
    history = {"loss": [1.0, 2.0]}
    yield Target("training_curves", ps.plots.training_curves, {"history": history, "keys": ["loss"], "ax": None})
    yield Target(
        "reliability_diagram",
        ps.plots.reliability_diagram,
        {"prediction": categorical, "y": labels, "num_bins": 5, "ax": None},
    )
    yield Target("loss_slice", with_data(ps.plots.loss_slice), {**pair, "radius": 1.0, "num_points": 3, "ax": None})
    yield Target(
        "regression_bands",
        ps.plots.regression_bands,
        {"x": x, "prediction": regression, "levels": [0.5], "data": (x, x), "ax": None},
    )
    yield Target(
        "to_dict",
        lambda model, guide, **settings: ps.arviz.to_dict(model, guide, x, **settings),
        {**pair, "num_samples": 2, "observations": x, "site": "obs", "var_names": ["w"]},
    )


def complaint(target: Target, wrong: dict[str, Any]) -> str | None:
    """Return what is wrong with the answer to wrong arguments, if anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.call(**{**target.right, **wrong})
    except (ValueError, TypeError) as error:
        place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not any(name in str(error) for name in wrong):
            return f"does not name the argument: {type(error).__name__}: {error}"
        if "pyro_sam" not in place.parts and place.parent.name != "tests":
            return f"is raised in {place}: {error}"
    except Exception as error:
        return f"is a {type(error).__name__}: {error}"
    finally:
        plt.close("all")
    return None


def _fit_to_call(name: str, value: Any) -> Any:
    # what a function does when it is called with what it was not made for is its own affair; what it returns is not
    own = {"model", "guide", "init_loc_fn", "init_scale", "create_plates", "prior", "hide", "fallback"}
    return (lambda *a, **k: None) if name in own and callable(value) and not isinstance(value, type) else value


def test_right_arguments_are_right() -> None:
    mpl.use("Agg")
    for target in targets():
        assert complaint(target, {}) is None, target.name


def test_wrong_arguments_are_named_in_an_error_of_the_packages_own() -> None:
    mpl.use("Agg")
    rng, found = random.Random(SEED), []
    everything = list(targets())
    for _ in range(CASES):
        target = rng.choice(everything)
        names = rng.sample(list(target.right), k=min(rng.choice([1, 1, 2]), len(target.right)))
        wrong = {name: _fit_to_call(name, junk(rng)) for name in names}
        if problem := complaint(target, wrong):
            arguments = ", ".join(f"{name}={value!r}"[:60].replace("\n", " ") for name, value in wrong.items())
            found.append(f"{target.name}({arguments}) {problem.splitlines()[0]}"[:400])
    assert not found, "\n".join(found)


def test_the_fuzzer_sees_errors_of_torch_and_errors_without_a_name() -> None:
    def strict(rho: Any) -> None:
        torch.zeros(2) @ torch.zeros(3)

    assert "is a RuntimeError" in str(complaint(Target("strict", strict, {"rho": 1}), {"rho": 2}))

    def silent(rho: Any) -> None:
        raise ValueError("no")

    assert "does not name the argument" in str(complaint(Target("silent", silent, {"rho": 1}), {"rho": 2}))
    inside = Target("inside", lambda scale: dist.Normal(0.0, scale, validate_args=True), {"scale": 1})
    assert "is raised in" in str(complaint(inside, {"scale": torch.tensor(-1.0)}))
