"""Several processes: equal parameters, one adversary or one each, and a death that is noticed and resumed from."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ddp, launch
from torch import Tensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import pyro_sam as ps
from pyro_sam._base.ranks import average_gradients, mean_over_ranks, number_device

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


@pytest.fixture(autouse=True)
def _preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["ranks"])


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in b)


@pytest.mark.parametrize("ranks", [2, 4])
def test_parameters_are_equal_on_all_ranks_after_50_steps(ranks: int, tmp_path: Path) -> None:
    first, *others = launch(ranks, tmp_path, "ddp", ps.Adversarial(1.0), False, 50, False)
    for other in others:
        assert_close(other, first)


def alone(law: ps.Perturbation, steps: int) -> dict[str, Tensor]:
    result = ddp(0, 1, law, False, steps, False)
    result.pop("noise")
    return result


@pytest.mark.parametrize("law", [ps.Adversarial(1.0), ps.MixSAM(rho=0.5)], ids=str)
def test_with_sync_ascent_two_ranks_on_half_batches_are_one_process_on_the_whole(
    law: ps.Perturbation, tmp_path: Path
) -> None:
    whole = alone(law, 20)
    one_adversary = launch(2, tmp_path, "ddp", law, True, 20, False)
    assert_close(whole, one_adversary[0], 1e-6)
    one_each = launch(2, tmp_path, "ddp", law, False, 20, False)
    assert distance(one_each[0], whole) > 1e-4  # m-sharpness is another objective


def test_noise_differs_by_rank_where_seeds_do_and_parameters_stay_equal(tmp_path: Path) -> None:
    a, b = launch(2, tmp_path, "ddp", ps.Gaussian(), False, 5, True)
    assert not torch.equal(a.pop("noise"), b.pop("noise"))
    assert_close(a, b)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    whole = launch(2, tmp_path, "accumulate", 1)
    parts = launch(2, tmp_path, "accumulate", 4)
    assert_close(parts[0], whole[0], 1e-10)


def test_fit_starts_all_ranks_alike_and_keeps_them_so(tmp_path: Path) -> None:
    a, b = launch(2, tmp_path, "fit", 5)
    assert_close(a, b)


def test_lbfgs_on_half_batches_takes_the_steps_of_one_process_on_the_whole(tmp_path: Path) -> None:
    whole = launch(1, tmp_path, "lbfgs")[0]
    a, b = launch(2, tmp_path, "lbfgs")
    assert_close(a, b)
    assert_close(a, whole, 1e-7)


@pytest.mark.parametrize("telling", [True, False])
def test_the_terms_in_the_history_are_means_over_ranks(telling: bool, tmp_path: Path) -> None:
    a, b = launch(2, tmp_path, "history", telling)
    own = [found.pop("own") for found in (a, b)]
    assert_close(a, b)
    if telling:  # the rate is zero, and the loss has no noise
        assert a["data"].tolist() == pytest.approx([0.375 * float(sum(own))] * 2, rel=1e-12)
        assert a["kl"].tolist() == pytest.approx([0.125 * float(sum(own))] * 2, rel=1e-12)


def test_validation_on_shares_is_that_on_the_whole_and_all_ranks_keep_the_same_weights(tmp_path: Path) -> None:
    whole = launch(1, tmp_path, "validated")[0]
    a, b = launch(2, tmp_path, "validated")
    assert_close(a, b)
    assert_close(a, whole, 1e-10)


def test_a_callback_that_ends_training_on_one_rank_ends_it_on_all(tmp_path: Path) -> None:
    assert [int(found["epochs"]) for found in launch(2, tmp_path, "one_stops")] == [2, 2]


def test_all_ranks_start_from_the_first_ones_buffers(tmp_path: Path) -> None:
    a, b = launch(2, tmp_path, "features")
    assert_close(a, b)


def test_a_checkpoint_that_not_all_ranks_find_is_refused_by_all(tmp_path: Path) -> None:
    assert [bool(found["refused"]) for found in launch(2, tmp_path, "apart", str(tmp_path))] == [True, True]


@pytest.mark.parametrize(("backend", "device"), [("nccl", "cuda"), ("gloo", "cpu")])
def test_numbers_are_sent_from_a_device_that_the_backend_knows(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    assert number_device().type == device


def test_a_rank_that_dies_fails_the_job_and_the_run_resumes_to_the_same_end(tmp_path: Path) -> None:
    straight = launch(2, tmp_path, "fit", 4)
    file, start = str(tmp_path / "c"), time.monotonic()
    with pytest.raises((ProcessExitedException, ProcessRaisedException), match="terminated with"):
        launch(2, tmp_path, "fit", 4, file, 6)
    assert time.monotonic() - start < 25  # the group's timeout is 20 s
    assert Path(file).exists()
    resumed = launch(2, tmp_path, "fit", 4, file)
    for rank in range(2):
        assert_close(resumed[rank], straight[rank])


@pytest.mark.parametrize("sync", [False, True])
def test_memory_and_traffic_are_those_of_the_formulas(sync: bool, tmp_path: Path) -> None:
    found = {name: int(value) for name, value in launch(2, tmp_path, "traffic", sync)[0].items()}
    d = found["d"]
    assert found["sent"] == 2 * d + 1 + (d if sync else 0)
    assert found["kept"] == 6 * d


def test_a_mixture_cannot_have_one_adversary() -> None:
    mixture: Any = ps.Mixture([ps.Gaussian(), ps.Adversarial()], [0.5, 0.5])
    with pytest.raises(ValueError, match="sync_ascent=True needs a law of the same passes everywhere"):
        ps.SAM_ELBO(mixture, sync_ascent=True)


def test_gradients_and_losses_are_means_over_ranks(tmp_path: Path) -> None:
    for found in launch(2, tmp_path, "mean"):
        assert found["a"].tolist() == [0.5, 0.5]
        assert found["b"].tolist() == [0.5]
        assert found["number"] == 0.5


def test_one_process_is_its_own_mean() -> None:
    param = torch.zeros(2, requires_grad=True)
    param.grad = torch.ones(2)
    average_gradients([param])
    assert torch.equal(param.grad, torch.ones(2))
    assert torch.equal(mean_over_ranks(torch.ones(3)), torch.ones(3))
