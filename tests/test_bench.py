"""The benchmark's hand-written loop is the estimator's algorithm, and a run writes what it measured."""

import json
from pathlib import Path
from typing import Literal

import pyro
import pytest
import torch
from oracles import gradients_of
from pyro.params.param_store import normalize_param_name

import pyro_sam as ps
from benchmarks.contenders import make_guide
from benchmarks.handwritten import HandWritten
from benchmarks.measure import allocated
from benchmarks.problems import LastOfLSTM, Problem, classification, lenet, mlp, regression
from benchmarks.step_time import main

CPU = torch.device("cpu")
PROBLEMS = {
    "mlp": lambda: classification(mlp(7, 5, 4, 3), 6, 7, device=CPU, classes=3),
    "convolutions": lambda: classification(lenet(), 2, 1, 28, 28, device=CPU),
    "recurrence": lambda: classification(LastOfLSTM(3, 4, 5), 6, 7, 3, device=CPU, classes=5),
    "regression": lambda: regression(CPU),
}


def spread_parameters() -> None:
    """Move loc and scale to values that differ from element to element."""
    with torch.no_grad():
        for _, parameter in pyro.get_param_store().named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def by_site(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the guide's name from the param store's: ``"locs.0.weight"``."""
    return {normalize_param_name(name).partition(".")[2]: value for name, value in values.items()}


def parts(tensors: list[torch.Tensor], problem: Problem) -> list[torch.Tensor]:
    """Split the vector of a flat loop into the network's tensors."""
    shapes = [p.shape for p in problem.net.parameters()]
    if [tensor.shape for tensor in tensors] == shapes:
        return tensors
    return [part.view(shape) for part, shape in zip(tensors[0].split([s.numel() for s in shapes]), shapes, strict=True)]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(
    ("name", "law"), [("adversarial", ps.Adversarial(rho=1.0)), ("gaussian", ps.Gaussian())], ids=["adv", "gauss"]
)
def test_the_handwritten_step_is_the_estimators(
    name: Literal["adversarial", "gaussian"], law: ps.Perturbation, problem: str, flat: bool
) -> None:
    given = PROBLEMS[problem]()
    guide = make_guide(ps.MeanFieldNormal, given)
    guide(given.x, given.y)  # enters its parameters into the store
    spread_parameters()
    names = [site for site, _ in given.net.named_parameters()]
    stored = by_site(dict(pyro.get_param_store().named_parameters()))
    hand = HandWritten(given, name, flat=flat)
    with torch.no_grad():
        for kind, own in (("locs", hand.locs), ("scales", hand.rhos)):
            for site, part in zip(names, parts(own, given), strict=True):
                part.copy_(stored[f"{kind}.{site}"])

    z = {p.shape: torch.randn_like(p) for p in given.net.parameters()}
    with pytest.MonkeyPatch.context() as patch:
        # both laws get the same noise, however it is asked for
        flat_z = torch.cat([z[p.shape].flatten() for p in given.net.parameters()])
        patch.setattr(torch, "randn", lambda shape, **_: z[torch.Size(shape)])
        patch.setattr(torch.Tensor, "normal_", lambda tensor: tensor.copy_(z[tensor.shape]))
        patch.setattr(torch, "randn_like", lambda tensor: flat_z if flat else z[tensor.shape])
        expected, gradients = gradients_of(ps.SAM_ELBO(law), given.model, guide, given.x, given.y)
        loss = hand.loss()
    gradients = by_site(gradients)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    for kind, own in (("locs", hand.locs), ("scales", hand.rhos)):
        for site, part in zip(names, parts([tensor.grad for tensor in own], given), strict=True):
            torch.testing.assert_close(part, gradients[f"{kind}.{site}"], rtol=1e-10, atol=1e-8)


def test_memory_is_what_stays_and_the_most_there_was() -> None:
    def work() -> torch.Tensor:
        kept = torch.ones(1000)
        (torch.ones(3000) * 2).sum()
        return kept

    _, left, most = allocated(work, CPU)
    assert left == 8 * 1000
    assert 8 * 7000 <= most < 8 * 7100


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, as it imports its compiler
def test_a_run_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--cases", "2x64", "--contenders", "hand-written", "TraceMean", "Gaussian, ", "Adversarial, Joint"]
    threads = ["--threads", str(torch.get_num_threads())]
    main([*chosen, *threads, "--rounds", "2", "--skip-scaling", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "step_time.json").read_text())
    assert content.keys() == {"environment", "problems", "missing", "failed", "cases", "scaling", "ratios"}
    assert content["problems"] == {"2x64": {"parameters": 784 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10, "sites": 6}}
    assert content["failed"] == {"2x64": {}}
    assert len(content["cases"]["2x64"]) == 9
    for figures in content["cases"]["2x64"].values():
        assert 0 < figures["seconds"]["low"] <= figures["seconds"]["median"] <= figures["seconds"]["high"]
        assert 0 < figures["held"] < figures["peak"]
    table = capsys.readouterr().out
    for ratio in content["ratios"]:
        assert ratio["name"] in table
        assert ratio["met"] == (ratio["measured"] <= ratio["target"])
    names = {ratio["name"] for ratio in content["ratios"]}
    assert "time: Adversarial, JointOptim / hand-written adversarial, flat" in names
    assert "host synchronisations: Adversarial, JointOptim" in names
