"""A run that was killed, or whose files were damaged, goes on to the same end; what cannot be used says why."""

import copy
import errno
import io
import json
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainee import killed, train

import pyro_sam as ps
from pyro_sam.training.checkpoint import FORMAT, MAGIC, CheckpointError, previous, read, read_last, write
from pyro_sam.training.estimator import elbo_settings
from pyro_sam.training.streams import random_states, restore_random_states


@pytest.fixture(autouse=True)
def _settings() -> Any:
    before = pyro.settings.get("module_local_params")
    yield
    pyro.settings.set(module_local_params=before)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Killed(BaseException):
    """In the place of SIGKILL, where a process need not die."""


def kill_at(step: int) -> Any:
    count = 0

    def after_step() -> None:
        nonlocal count
        count += 1
        if count == step:
            raise Killed

    return after_step


def test_killed_at_random_ten_times_it_ends_as_if_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = 30
    straight = train(None, epochs)
    file, kills = tmp_path / "run.ckpt", 0
    clock = random.Random(5)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["trainee"])  # imported once, not by each process
    for _ in range(10):
        process = processes.Process(target=killed, args=(file, epochs, clock.randint(1, 8), clock.uniform(0, 0.03)))
        process.start()
        process.join(60)
        kills += process.exitcode == -signal.SIGKILL
    assert kills == 10
    assert 0 < read_last(file)["epoch"] < epochs
    assert_equal(train(file, epochs), straight)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_resumed_at_any_step_it_ends_as_if_undisturbed(every: int, local: bool, tmp_path: Path) -> None:
    straight = train(None, 3, local=local)
    for step in (3, 5, 6, 8):  # 5 steps an epoch
        file = tmp_path / f"{step}.ckpt"
        with pytest.raises(Killed):
            train(file, 3, every=every, local=local, after_step=kill_at(step))
        assert_equal(train(file, 3, every=every, local=local), straight)


def test_the_ascent_of_earlier_steps_goes_on(tmp_path: Path) -> None:
    straight = train(None, 3, ascent="previous")
    with pytest.raises(Killed):
        train(tmp_path / "a", 3, ascent="previous", after_step=kill_at(8))
    assert_equal(train(tmp_path / "a", 3, ascent="previous"), straight)


@pytest.mark.parametrize("optim", ["epoch", "pyro", "decaying"])
def test_resumed_with_schedulers_and_after_the_last_step_of_an_epoch_too(optim: str, tmp_path: Path) -> None:
    straight = train(None, 3, optim=optim)

    def die(training: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "a", 3, optim=optim, after_epoch=die)
    assert read(tmp_path / "a")["batch"] == 5
    assert_equal(train(tmp_path / "a", 3, optim=optim), straight)
    with pytest.raises(Killed):
        train(tmp_path / "b", 3, optim=optim, after_step=kill_at(8))
    assert_equal(train(tmp_path / "b", 3, optim=optim), straight)


def test_a_finished_run_is_read_and_not_trained_on(tmp_path: Path) -> None:
    finished = train(tmp_path / "c", 2)
    after = torch.rand(3), np.random.rand(3).tolist()  # noqa: NPY002
    assert_equal(train(tmp_path / "c", 2, after_step=kill_at(1)), finished)
    assert torch.equal(torch.rand(3), after[0])
    assert np.random.rand(3).tolist() == after[1]  # noqa: NPY002
    longer = train(tmp_path / "c", 3)
    assert_equal(longer, train(None, 3))


@pytest.mark.parametrize("local", [False, True])
def test_an_optimiser_that_needs_a_closure_goes_on_as_if_undisturbed(local: bool, tmp_path: Path) -> None:
    straight = train(None, 4, optim="lbfgs", local=local)
    train(tmp_path / "a", 2, optim="lbfgs", local=local)
    assert_equal(train(tmp_path / "a", 4, optim="lbfgs", local=local), straight)
    with pytest.raises(Killed):  # in the second of a step's three evaluations
        train(tmp_path / "b", 4, optim="lbfgs", local=local, after_step=kill_at(3 * 8 + 2))
    assert read(tmp_path / "b")["step"] == 8
    assert_equal(train(tmp_path / "b", 4, optim="lbfgs", local=local), straight)


def test_means_over_an_interrupted_epoch_are_those_of_all_its_steps(tmp_path: Path) -> None:
    straight = train(None, 3, split=(0.75, 0.25))
    torch.testing.assert_close(straight["data"], 0.75 * straight["history"])
    torch.testing.assert_close(straight["kl"], 0.25 * straight["history"])
    with pytest.raises(Killed):
        train(tmp_path / "c", 3, split=(0.75, 0.25), after_step=kill_at(8))
    assert_equal(train(tmp_path / "c", 3, split=(0.75, 0.25)), straight)


def test_a_checkpoint_without_sums_of_the_terms_goes_on_with_those_of_the_last_batch(tmp_path: Path) -> None:
    straight, last = train(None, 3, split=(0.75, 0.25)), train(None, 3)
    assert not torch.isclose(straight["kl"], last["kl"]).any()
    with pytest.raises(Killed):
        train(tmp_path / "c", 3, split=(0.75, 0.25), after_step=kill_at(8))
    content = read(tmp_path / "c")
    del content["terms"]
    write(tmp_path / "c", content)
    resumed = train(tmp_path / "c", 3, split=(0.75, 0.25))
    for name in ("data", "kl"):  # the interrupted epoch is the second
        assert torch.equal(resumed.pop(name), torch.stack([straight[name][0], last[name][1], straight[name][2]]))
        straight.pop(name)
    assert_equal(resumed, straight)


def noted(weights: dict[int, dict[str, Tensor]]) -> Any:
    def note(training: Any) -> None:
        weights[training.epoch] = {name: value.clone() for name, value in training._trained.state()["params"].items()}

    return note


def test_the_best_weights_are_kept_through_a_kill_at_any_step(tmp_path: Path) -> None:
    weights: dict[int, dict[str, Tensor]] = {}
    straight = train(None, 8, validate=True, after_epoch=noted(weights))
    best = int(straight["validation"].argmin()) + 1
    assert 1 < best < 8  # neither the first nor the last
    for name, value in weights[best].items():
        assert torch.equal(straight[name], value), name
    for step in (3, 5 * best, 5 * best + 2, 39):  # 5 steps an epoch
        file = tmp_path / f"{step}.ckpt"
        with pytest.raises(Killed):
            train(file, 8, validate=True, every=2, after_step=kill_at(step))
        assert_equal(train(file, 8, validate=True, every=2), straight)
    finished = train(file, 8, validate=True, after_step=kill_at(1))
    assert_equal(finished, straight)


def test_a_longer_run_goes_on_from_the_last_weights_and_not_from_the_best(tmp_path: Path) -> None:
    train(tmp_path / "c", 8, validate=True)
    assert_equal(train(tmp_path / "c", 10, validate=True), train(None, 10, validate=True))


def test_validation_that_a_checkpoint_does_not_know_begins_late(tmp_path: Path) -> None:
    train(tmp_path / "c", 2)
    later = train(tmp_path / "c", 4, validate=True)["validation"]
    assert later.isfinite().tolist() == [False, False, True, True]
    train(tmp_path / "c", 5)
    last = train(tmp_path / "c", 6, validate=True)["validation"]
    assert last.isfinite().tolist() == [False, False, True, True, False, True]


def test_annealing_goes_on_as_if_undisturbed(tmp_path: Path) -> None:
    def anneal() -> Any:
        return ps.Anneal(kl_weight=(0.0, 1.0, 3), rho=lambda epoch: 0.1 * (epoch + 1))

    straight = train(None, 4, anneal=anneal())
    assert not torch.equal(straight["history"], train(None, 4)["history"])
    for step in (5, 6, 12, 15):
        file = tmp_path / f"{step}.ckpt"
        with pytest.raises(Killed):
            train(file, 4, anneal=anneal(), every=2, after_step=kill_at(step))
        assert_equal(train(file, 4, anneal=anneal(), every=2), straight)  # a warning would be an error
    train(tmp_path / "c", 2, anneal=anneal())
    assert_equal(train(tmp_path / "c", 4, anneal=anneal()), straight)


def svi(**settings: Any) -> SVI:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(w, 1.0), obs=x)

    elbo = ps.SAM_ELBO(ps.Adversarial(0.5), ascent="previous", **settings)
    return SVI(model, ps.MeanFieldNormal(model), ps.optim.JointOptim(torch.optim.SGD, {"lr": 0.01}), elbo)


def test_settings_are_the_same_text_in_every_process() -> None:
    one, other = (svi(hide=lambda name: name == "v") for _ in range(2))  # both alive: at two addresses
    assert elbo_settings(one) == elbo_settings(other)
    names = [f"site{i}" for i in range(20)]
    assert elbo_settings(svi(hide=names))["hide"] == "frozenset({" + ", ".join(map(repr, sorted(names))) + "})"


def test_a_setting_that_the_checkpoint_does_not_know_is_no_change(tmp_path: Path) -> None:
    batches = [(torch.ones(()),)]
    ps.fit(svi(), batches, 1, progress=False, checkpoint=tmp_path / "c")
    content = read(tmp_path / "c")
    assert content["elbo"].pop("num_particles") == "1"
    write(tmp_path / "c", content)
    pyro.clear_param_store()
    ps.fit(svi(), batches, 2, progress=False, checkpoint=tmp_path / "c")  # a warning would be an error


def test_the_ascent_goes_on_where_another_setting_of_the_loss_has_changed(tmp_path: Path) -> None:
    before, after, batches = svi(kl_weight=0.5), svi(kl_weight=0.75), [(torch.ones(()),)]
    ps.fit(before, batches, 2, progress=False, checkpoint=tmp_path / "c")
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match=r"not the one of the checkpoint \(kl_weight: 0\.5 then, 0\.75 now\)"):
        ps.fit(after, batches, 2, progress=False, checkpoint=tmp_path / "c")
    kept, restored = (each.loss.__self__.state_dict()["ascent"] for each in (before, after))
    assert kept
    assert_equal(restored, kept)


# Files


def damaged(how: str, path: Path) -> str:
    """Damage a checkpoint and return what the error says."""
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-10])
        return rf"{path} is truncated: \d+ of \d+ bytes are there"
    if how == "corrupted":
        path.write_bytes(data[:-10] + bytes(10))
        return f"{path} is corrupted: its content does not have the checksum"
    if how == "header":
        path.write_bytes(MAGIC + b"{}\n")
        return f"{path} is corrupted: its header cannot be read"
    if how == "foreign":
        torch.save({"w": torch.zeros(2)}, path)
        return f"{path} is no checkpoint of pyro_sam"
    header, _, payload = data[len(MAGIC) :].partition(b"\n")
    newer = json.dumps({**json.loads(header), "format": FORMAT + 1}).encode()
    path.write_bytes(MAGIC + newer + b"\n" + payload)
    return f"{path} has format {FORMAT + 1}, and this version of pyro_sam reads up to {FORMAT}"


DAMAGES = ["truncated", "corrupted", "header", "foreign", "newer"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_says_what_is_wrong_and_the_previous_one_is_used(how: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    write(path, {"step": 1})
    write(path, {"step": 2})
    assert read_last(path) == {"step": 2}
    message = damaged(how, path)
    with pytest.raises(CheckpointError, match=message):
        read(path)
    with pytest.warns(UserWarning, match=rf"(?s){message}.*The previous checkpoint .*c\.previous is used"):
        assert read_last(path) == {"step": 1}
    previous(path).unlink()
    with pytest.raises(CheckpointError, match=message):
        read_last(path)


def test_a_run_goes_on_from_the_previous_file_to_the_same_end(tmp_path: Path) -> None:
    straight = train(None, 3)
    path = tmp_path / "c"
    with pytest.raises(Killed):
        train(path, 3, after_step=kill_at(9))
    damaged("truncated", path)
    with pytest.warns(UserWarning, match="is truncated"):
        assert_equal(train(path, 3), straight)


def test_a_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("chapter 1")
    with pytest.raises(CheckpointError, match="is no checkpoint of pyro_sam; choose another path"):
        train(path, 1)
    assert path.read_text() == "chapter 1"


def test_loading_runs_no_pickled_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {tmp_path}/ran",))

    write(tmp_path / "c", {"evil": Evil()})
    with pytest.raises(CheckpointError, match="holds more than plain values and tensors, and is not loaded"):
        read(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


def test_a_file_missing_between_two_renames_is_the_previous_one(tmp_path: Path) -> None:
    write(tmp_path / "c", {"step": 1})
    (tmp_path / "c").rename(previous(tmp_path / "c"))
    assert read_last(tmp_path / "c") == {"step": 1}
    assert read_last(tmp_path / "other") is None


def test_a_full_disk_loses_nothing_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, path = train(None, 2), tmp_path / "c"
    train(path, 1)
    before = read(path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.warns(UserWarning, match="no checkpoint was written at step .*, training goes on: .*No space left"):
            assert_equal(train(path, 2), straight)
    assert read(path)["step"] == before["step"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c", "c.previous"]
    assert_equal(train(path, 2), straight)


def test_another_model_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "c", 1)
    content = read(tmp_path / "c")
    names = sorted(content["trained"]["params"])
    content["trained"]["params"][names[0]] = torch.zeros(7, 7)
    write(tmp_path / "c", content)
    with pytest.raises(CheckpointError, match=r"of another model or guide .*\(7, 7\) there, .* here"):
        train(tmp_path / "c", 2)
    del content["trained"]["params"][names[0]]
    write(tmp_path / "c", content)
    with pytest.raises(CheckpointError, match=r"of another model or guide .*none there"):
        train(tmp_path / "c", 2)


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "c", 1)
    content = read(tmp_path / "c")
    content["random"] *= 2
    write(tmp_path / "c", content)
    with pytest.raises(CheckpointError, match="the checkpoint is of a run with 2 processes, this one has 1"):
        train(tmp_path / "c", 2)


def test_it_tells_what_made_it(tmp_path: Path) -> None:
    train(tmp_path / "c", 1)
    content = read(tmp_path / "c")
    assert content["versions"]["torch"] == torch.__version__
    assert content["elbo"]["perturbation"] == "MixSAM(rho=0.5, kappa=1.0)"


def test_all_random_streams_go_back() -> None:
    own = [torch.Generator(), *STREAMS.values()]

    def draw() -> list[float]:
        common = [random.gauss(0, 1), random.random(), float(np.random.randn()), float(torch.randn(()))]  # noqa: NPY002
        return common + [float(torch.randn((), generator=own[0]))] + [float(draw_of(each)) for each in own[1:]]

    draw()  # numpy and Python keep half a pair of normals
    states = torch.load(saved(random_states(own)), weights_only=True)
    first = draw()
    restore_random_states(states, own)
    assert draw() == first


STREAMS = {
    "torch": torch.Generator(),
    "numpy": np.random.default_rng(1),
    "mersenne": np.random.Generator(np.random.MT19937(1)),
    "philox": np.random.Generator(np.random.Philox(1)),
    "legacy": np.random.RandomState(1),
    "python": random.Random(1),
}


def draw_of(stream: Any) -> float:
    if isinstance(stream, torch.Generator):
        return float(torch.rand((), generator=stream))
    return float(stream.gauss(0, 1) if isinstance(stream, random.Random) else stream.normal())


def saved(content: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("whose", ["model", "loader"])
def test_a_checkpoint_with_another_number_of_random_streams_is_refused(whose: str, tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 12)[:, None]

    def svi_of(streams: list[Any]) -> SVI:
        pyro.clear_param_store()
        bnn = ps.BayesianModule(nn.Linear(1, 1))

        def model(x: Tensor, y: Tensor | None = None) -> None:
            mean = bnn(x)[:, 0] + sum(draw_of(stream) for stream in streams)
            with pyro.plate("data", 12, subsample_size=len(x)):
                pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)

        return SVI(model, ps.MeanFieldNormal(model), ps.optim.JointOptim(torch.optim.Adam, {"lr": 0.1}), ps.SAM_ELBO())

    def loader_of(generator: torch.Generator | None) -> DataLoader:
        return DataLoader(TensorDataset(x, x[:, 0]), 4, shuffle=True, generator=generator)

    own, other = ([random.Random(1)], []) if whose == "model" else ([], [])
    first, second = (torch.Generator() if whose == "loader" else None, None)
    ps.fit(svi_of(own), loader_of(first), 1, progress=False, checkpoint=tmp_path / "c")
    svi = svi_of(other)
    with pytest.raises(CheckpointError, match=f"has 1 random streams of the {whose}'s own, this {whose} has 0"):
        ps.fit(svi, loader_of(second), 2, progress=False, checkpoint=tmp_path / "c")
    assert not svi.optim.get_state()  # nothing of the file was taken


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_a_models_own_random_stream_goes_on(kind: str, tmp_path: Path) -> None:
    """The noise that a model draws from a generator of its own, which nothing but the model and Python knows."""
    x = torch.linspace(-1, 1, 12)[:, None]

    def run(file: Any, dies: int = 0) -> dict[str, Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        stream = copy.deepcopy(STREAMS[kind]) if kind != "torch" else torch.Generator().manual_seed(1)
        bnn = ps.BayesianModule(nn.Linear(1, 1))

        def model(x: Tensor, y: Tensor | None = None) -> None:
            nonlocal dies
            dies -= 1
            if dies == 0:
                raise Killed
            mean = bnn(x)[:, 0] + 0.1 * draw_of(stream)
            with pyro.plate("data", 12, subsample_size=len(x)):
                pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)

        optim = ps.optim.JointOptim(torch.optim.Adam, {"lr": 0.01})
        svi = SVI(model, ps.MeanFieldNormal(model, init_scale=0.05), optim, ps.SAM_ELBO(ps.AscendedSample()))
        batches = [(x[:5], x[:5, 0]), (x[5:], x[5:, 0])]
        keep = file and ps.Checkpoint(file, every=1)
        ps.fit(svi, batches, 4, progress=False, checkpoint=keep, validation=(x, x[:, 0]))
        return {name: value.detach() for name, value in pyro.get_param_store().items()}

    straight = run(None)
    with pytest.raises(Killed):
        run(tmp_path / "c", 60)
    assert 2 < read(tmp_path / "c")["step"] < 8
    assert_equal(run(tmp_path / "c"), straight)
