"""The tutorials: what they must look like, and that the claim of each fails when its method is a wrong one.

That each claim holds is tested where the notebooks run whole: ``pytest tutorials --nbmake``.
"""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

TUTORIALS = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return found


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestEveryTutorial:
    def test_it_begins_with_what_the_reader_will_be_able_to_do(self, path: Path) -> None:
        title, text = source(cells(path)[0]).split("\n\n")[:2]
        assert title.startswith("# ")
        assert text.startswith("After this page you can ")

    def test_its_last_cell_asserts_its_claim(self, path: Path) -> None:
        assert cells(path)[-1]["cell_type"] == "code"
        assert re.search(r"^\s*assert ", source(cells(path)[-1]), re.MULTILINE)

    def test_its_outputs_are_kept_and_its_metadata_stripped(self, path: Path) -> None:
        notebook = json.loads(path.read_text())
        assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        assert not any(cell["metadata"] for cell in notebook["cells"])
        outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert not any(output["output_type"] == "error" for output in outputs)

    def test_it_shows_no_path_of_the_machine_it_ran_on(self, path: Path) -> None:
        assert str(TUTORIALS.parent) not in path.read_text()

    def test_its_parameters_are_where_pyro_keeps_them(self, path: Path) -> None:
        assert "module_local_params" not in path.read_text()


@pytest.fixture
def as_in_a_notebook() -> Iterator[None]:
    """Single precision, and pictures that nobody sees."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    torch.set_default_dtype(torch.float32)
    threads = torch.get_num_threads()
    mpl.use("Agg")
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    plt.close("all")
    torch.set_num_threads(threads)


def run(name: str, swaps: dict[str, str], fails: str, **given: Any) -> None:
    """Run a tutorial with other text in it, and check that its last cell fails, at a certain line."""
    code = [source(cell) for cell in cells(TUTORIALS / f"{name}.ipynb") if cell["cell_type"] == "code"]
    for old in swaps:
        assert any(old in part for part in code), f"{old!r} is not in the tutorial"
    assert fails in code[-1]
    space: dict[str, Any] = {"__name__": "__main__", "given": SimpleNamespace(**given)}
    for number, part in enumerate(code):
        for old, new in swaps.items():
            part = part.replace(old, new)
        if number < len(code) - 1:
            exec(compile(part, name, "exec"), space)
        else:
            with pytest.raises(AssertionError) as error:
                exec(compile(part, name, "exec"), space)
            assert fails in part.splitlines()[error.traceback[-1].lineno]


# What a tutorial searches for at length, given here, so that only the claim's own training runs.
CHOSEN = {"MFVI": {"kl_weight": 0.0027}, "AscendedSample": {"kl_weight": 0.012, "alpha": 4.37}}


def chosen(build: Any, space: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what ``ps.tune`` would choose."""
    best = CHOSEN["AscendedSample" if "alpha" in space else "MFVI"]
    return SimpleNamespace(best=best, table=[{"state": "complete", "nll": 0.4, **best}])


@pytest.mark.slow
@pytest.mark.usefixtures("as_in_a_notebook")
class TestWrongMethods:
    def test_of_the_first_tutorial_a_law_that_does_not_climb(self) -> None:
        swaps = {"law(each)": "ps.Gaussian()", "range(1000)": "range(2)"}
        swaps |= {"[0.0, 0.3, 1.0, 3.0, 10.0]": "[0.0, 1.0, 10.0]", "[0.3, 1.0, 3.0, 10.0, 30.0]": "[1.0]"}
        run("01_first_sam_elbo", swaps, "gain.mean() > 2 * gain.std()")

    def test_of_image_classification_a_law_that_does_not_climb(self) -> None:
        pytest.importorskip("optuna")
        swaps = {"ps.tune(": "given.chosen(", "law = ps.tuning.law_of(settings)": "law = ps.Gaussian()"}
        run("02_image_classification", swaps, "gain.mean() > 2 * error", chosen=chosen)

    @pytest.mark.parametrize(
        ("old", "new"),
        [("ps.Gaussian(), 400", "ps.Adversarial(2**0.5), 1"), ("ps.Adversarial(2**0.5), 1", "ps.Gaussian(), 400")],
    )
    def test_of_what_they_see_the_other_noise(self, old: str, new: str) -> None:
        fails = 'seen["ravine"]["random"] <' if "400" in old else 'seen["ravine"]["worst"] >'
        run("03_what_they_see", {old: new, "STEPS = 1000": "STEPS = 10"}, fails)

    def test_of_what_they_see_a_network_that_is_trained_at_its_mean(self) -> None:
        run(
            "03_what_they_see",
            {"ps.SAM_ELBO(law, kl_weight=0.0))": "ps.SAM_ELBO(ps.Mean(), kl_weight=0.0))"},
            "trace[-1] <",
        )

    @pytest.mark.parametrize(
        ("old", "new", "fails"),
        [
            ("space.number(self.alpha, z)", "1.0", "first_loss(RandomClimb(0.0)) =="),
            (
                "dist.MultivariateNormal(loc, scale_tril=factor)",
                "dist.Normal(loc, factor.diagonal()).to_event(1)",
                "< -0.7",
            ),
        ],
    )
    def test_of_your_own_law_another_climb_or_guide(self, old: str, new: str, fails: str) -> None:
        run("04_your_own_law", {old: new, "GRADIENTS = 900": "GRADIENTS = 4"}, fails)

    def test_of_your_own_law_a_mixture_that_never_climbs(self) -> None:
        laws = {"ps.MixSAM(4 * RHO, kappa=3.0)": "ps.Mean()", "ps.AscendedSample(RHO)": "ps.Mean()"}  # not to wait for
        run("04_your_own_law", {"[0.5, 0.5]": "[1.0, 0.0]", **laws}, "assert gap.mean() < -2")

    def test_of_any_pyro_model_a_climb_that_is_too_far(self) -> None:
        swaps = {"ps.AscendedSample(0.5),\n": "ps.AscendedSample(20.0),\n", "700, inputs": "2, inputs"}
        swaps |= {"500, points": "2, points", "600, images": "2, images"}
        run("05_any_pyro_model", swaps, "abs(climbed - mfvi) < 0.5")

    def test_of_speed_replicas_one_after_the_other(self) -> None:
        swaps = {"[2, 4, 8, 16, 32]": "[16]", "steps=50": "steps=3", "kl_weight=0.01": "kl_weight=0.01, fast=False"}
        swaps |= {
            "num_epochs=6": "num_epochs=1",
            "compile=True": "compile=False",
            "for _ in range(15)": "for _ in range(1)",
        }
        run("06_speed_and_scale", swaps, "share[numbers.index(16)] < 0.5")

    def test_of_speed_a_prediction_that_mixes_nothing(self) -> None:
        swaps = {
            "mixed = ps.metrics.nll(together,": "mixed = ps.metrics.nll(together.replica(0),",
            "compile=True": "compile=False",
        }
        run("06_speed_and_scale", {**swaps, "[2, 4, 8, 16, 32]": "[16]", "steps=50": "steps=3"}, "mixed < alone.min()")

    @pytest.mark.parametrize(
        ("old", "new", "fails"),
        [
            ("init_loc_fn=ps.nn.init_to_module(bnn), ", "", 'first["AutoDiagonalNormal"] <'),
            ("lambda name, parameter: posterior[name]", "wide", "kept > forgot"),
        ],
    )
    def test_of_trained_networks_another_beginning(self, old: str, new: str, fails: str) -> None:
        run("07_trained_networks", {old: new}, fails)

    def test_of_choosing_the_worst(self) -> None:
        run("08_choosing", {"found.argmin()": "found.argmax()", "= 120, 25": "= 120, 6"}, "on_test[best] < 0.6")

    def test_of_choosing_an_annealing_that_stops_early(self) -> None:
        swaps = {"[0.001, 0.01, 0.1, 0.3, 1.0]": "[0.01, 1.0]", "[0.0, 1.0, 3.0, 10.0]": "[0.0, 1.0]"}
        run("08_choosing", {"(0.0, 1.0, 15)": "(0.0, 0.01, 15)", **swaps}, 'annealed["validation"][-1] >')
