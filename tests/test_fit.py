"""fit is the loop of SVI.step, with a history, callbacks, and errors that say what to do."""

import builtins
import copy
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO, config_enumerate
from soak import soak
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import pyro_sam as ps
from pyro_sam._base.random_state import state_of
from pyro_sam.optim import JointOptim
from pyro_sam.training.checkpoint import Checkpoint, read
from pyro_sam.training.loop import Training
from pyro_sam.training.stopping import EarlyStopping
from pyro_sam.training.terms import TermSums

N = 12


def data() -> TensorDataset:
    x = torch.linspace(-1, 1, N)[:, None]
    return TensorDataset(x, x[:, 0].sin())


def build(loss: Any = None, optim: Any = None, dropout: float = 0.1) -> SVI:
    torch.manual_seed(1)
    bnn = ps.BayesianModule(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = bnn(x).squeeze(-1)
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)

    loss = ps.SAM_ELBO(ps.MixSAM(rho=0.5)) if loss is None else loss
    optim = JointOptim(torch.optim.Adam, {"lr": 0.01}, clip_norm=10.0) if optim is None else optim
    return SVI(model, ps.MeanFieldNormal(model, init_scale=0.05), optim, loss=loss)


def loader(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=5, shuffle=True, **kwargs)


def params() -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in pyro.get_param_store().named_parameters()}


def restart(seed: int = 3) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert a
    for name in a:
        assert torch.equal(a[name], b[name]), name


def fit(svi: SVI, batches: Any, epochs: int = 2, **kwargs: Any) -> dict[str, list[float]]:
    return ps.fit(svi, batches, epochs, **{"progress": False, **kwargs})


@pytest.mark.parametrize("make", [lambda: None, lambda: pyro.optim.ClippedAdam({"lr": 0.01})])
def test_it_is_the_loop_of_svi_step_bit_for_bit(make: Callable[[], Any]) -> None:
    restart()
    svi, losses = build(optim=make()), []
    for _ in range(3):
        losses.append([svi.step(*batch) for batch in loader()])
    straight = params()
    restart()
    history = fit(build(optim=make()), loader(), 3)
    assert_equal(params(), straight)
    assert history["loss"] == pytest.approx([sum(epoch) / len(epoch) for epoch in losses], rel=1e-14)


def test_the_same_seed_gives_the_same_run() -> None:
    runs = []
    for _ in range(2):
        restart()
        history = fit(build(), loader())
        history.pop("seconds")
        runs.append((history, params()))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])


def test_data_term_and_kl_are_those_of_pyro_where_the_guide_is_a_point() -> None:
    svi = build(optim=JointOptim(torch.optim.SGD, {"lr": 0.0}), dropout=0.0)  # the terms are those before the step
    svi.guide = ps.MeanFieldNormal(svi.model, init_scale=1e-6, learn_scale=False)
    batch = data().tensors
    history = fit(svi, [batch], 1)
    total = svi.evaluate_loss(*batch)
    store = pyro.get_param_store()
    kl = sum(
        torch.distributions.kl_divergence(
            dist.Normal(value, torch.full_like(value, 1e-6)), dist.Normal(torch.zeros(()), 1.0)
        ).sum()
        for name, value in store.items()
    )
    assert history["kl"] == pytest.approx([float(kl.detach())], rel=1e-10)
    assert history["data"][0] + history["kl"][0] == pytest.approx(total, rel=1e-4)


def test_the_gradient_norm_is_the_norm_before_clipping() -> None:
    svi = build(ps.SAM_ELBO(ps.Mean()), JointOptim(torch.optim.SGD, {"lr": 0.0}, clip_norm=1e-3), dropout=0.0)
    batch = data().tensors
    history = fit(svi, [batch], 1)
    svi.loss_and_grads(svi.model, svi.guide, *batch)
    grads = [param.grad.flatten() for _, param in pyro.get_param_store().named_parameters() if param.grad is not None]
    assert history["grad_norm"] == pytest.approx([float(torch.cat(grads).norm())], rel=1e-6)
    assert history["grad_norm"][0] > 1


def test_batches_are_tuples_dicts_or_single_tensors() -> None:
    x, y = data().tensors
    results = []
    for batch in ((x, y), [x, y], {"x": x, "y": y}):
        restart()
        fit(build(), [batch])
        results.append(params())
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])
    svi = SVI(lambda x: pyro.sample("w", dist.Normal(x.sum(), 1.0)), lambda x: None, svi_optim(), Trace_ELBO())
    seen = []
    svi.model = lambda x: seen.append(x) or svi_model(x)
    svi.guide = ps.MeanFieldNormal(svi_model)
    fit(svi, DataLoader(x[:, 0], batch_size=N), 1)
    assert torch.equal(seen[0], x[:, 0])


def svi_model(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(w, 1.0), obs=x)


def svi_optim() -> JointOptim:
    return JointOptim(torch.optim.Adam, {"lr": 0.01})


# Schedulers and callbacks


def lrs(optim: Any, loss: Any = None) -> list[float]:
    return fit(build(loss, optim), loader(), 3)["lr"]


def test_schedulers_are_stepped_after_every_epoch() -> None:
    def half(optimizer: Any) -> Any:
        return lr_scheduler.ExponentialLR(optimizer, 0.5)

    assert lrs(JointOptim(torch.optim.Adam, {"lr": 0.01}, scheduler=half)) == [0.01, 0.005, 0.0025]
    restart()
    pyros = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.5})
    assert lrs(pyros) == [0.01, 0.005, 0.0025]
    restart()
    per_step = JointOptim(torch.optim.Adam, {"lr": 0.01}, scheduler=half, scheduler_interval="step")
    assert lrs(per_step) == [0.01 / 8, 0.01 / 64, 0.01 / 512]


def test_a_plateau_scheduler_gets_the_loss() -> None:
    optim = JointOptim(
        torch.optim.SGD, {"lr": 1e-4}, scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.9)
    )
    assert lrs(optim)[-1] == pytest.approx(1e-5)


def test_a_callback_sees_every_epoch_and_can_stop() -> None:
    seen = []

    def callback(training: Training) -> bool:
        seen.append((training.epoch, training.step, len(training.history["loss"])))
        return training.epoch == 2

    history = fit(build(), loader(), 5, callbacks=[callback])
    assert seen == [(1, 3, 1), (2, 6, 2)]
    assert len(history["loss"]) == 2


def test_early_stopping_waits_for_its_patience() -> None:
    class Fake:
        history: ClassVar = {"kl": [3.0, 2.0, 2.5, 1.95]}

    assert not EarlyStopping("kl", patience=2)(Fake())  # type: ignore[arg-type]
    assert EarlyStopping("kl", patience=2, min_delta=0.1)(Fake())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="monitor must be one of kl, got monitor='loss'"):
        EarlyStopping()(Fake())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patience must be a positive whole number"):
        EarlyStopping(patience=0)
    with pytest.raises(ValueError, match="min_delta must be non-negative"):
        EarlyStopping(min_delta=-1.0)


def test_lbfgs_trains_under_fit() -> None:
    optim = JointOptim(torch.optim.LBFGS, {"max_iter": 5, "line_search_fn": "strong_wolfe"})
    history = fit(build(ps.SAM_ELBO(ps.Mean()), optim, dropout=0.0), [data().tensors], 5)
    assert history["loss"][-1] < history["loss"][0] / 2


class Smooth(ps.SAM_ELBO):
    """A loss without noise, some of whose evaluations are wrong."""

    def __init__(self, *wrong: int) -> None:
        super().__init__(ps.Mean())
        self._wrong, self.calls = wrong, 0

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
        self.calls += 1
        loss = super().loss_and_grads(*args, **kwargs)
        return float("nan") if self.calls in self._wrong else loss


def lbfgs(**args: Any) -> JointOptim:
    return JointOptim(torch.optim.LBFGS, {"max_iter": 4, "line_search_fn": "strong_wolfe", **args})


def test_lbfgs_under_fit_is_torchs_own_bit_for_bit() -> None:
    batches = [tuple(part[rows] for part in data().tensors) for rows in (slice(0, 6), slice(6, N))]
    svi, losses, norms = build(Smooth(), dropout=0.0), [], []
    svi.guide(*batches[0])
    named = dict(sorted(pyro.get_param_store().named_parameters()))
    torchs = torch.optim.LBFGS(named.values(), max_iter=4, line_search_fn="strong_wolfe")
    for batch in batches * 2:

        def closure(batch: Any = batch) -> Any:
            torchs.zero_grad()
            loss = svi.loss_and_grads(svi.model, svi.guide, *batch)
            closure.norms.append(float(torch.cat([each.grad.flatten() for each in named.values()]).norm()))
            return loss

        closure.norms = []  # type: ignore[attr-defined]
        losses.append(float(torchs.step(closure)))
        norms.append(closure.norms[0])  # type: ignore[attr-defined]
    straight = params()
    restart()
    history = fit(build(Smooth(), lbfgs(), dropout=0.0), batches)
    assert_equal(params(), straight)
    assert history["loss"] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-14)
    assert history["grad_norm"] == pytest.approx([sum(norms[:2]) / 2, sum(norms[2:]) / 2], rel=1e-12)


@pytest.mark.parametrize("under", ["fit", "minimize"])
@pytest.mark.parametrize("kind", ["torch", "numpy", "python", "numpys global"])
def test_all_evaluations_of_a_step_see_the_same_noise_of_any_stream(kind: str, under: str) -> None:
    streams: dict[str, Any] = {
        "torch": torch.Generator(),
        "numpy": np.random.default_rng(1),
        "python": random.Random(1),
        "numpys global": np.random,
    }
    stream, steps = streams[kind], list[list[bytes]]()

    def model(x: Tensor) -> None:
        noise = torch.rand((), generator=stream).item() if kind == "torch" else stream.uniform(0.0, 1.0)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(w * x + noise, 1.0).to_event(1), obs=x)

    class Watching(ps.SAM_ELBO):
        def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
            state = state_of(stream)
            steps[-1].append(pickle.dumps(state.tolist() if isinstance(state, Tensor) else state))
            return super().loss_and_grads(*args, **kwargs)

    x = torch.linspace(-1, 1, 5)
    svi = SVI(model, ps.MeanFieldNormal(model), lbfgs(), Watching(ps.Mean()))
    for _ in range(3):
        steps.append([])
        if under == "fit":
            fit(svi, [x], 1)
        else:
            svi.optim.minimize(svi, x)
    assert min(map(len, steps)) > 1
    assert [len(set(states)) for states in steps] == [1, 1, 1]
    assert len({states[0] for states in steps}) == 3


@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_a_loss_that_is_nan_anywhere_in_a_line_search_undoes_the_step(evaluation: int) -> None:
    svi = build(Smooth(), lbfgs(), dropout=0.0)
    fit(svi, [data().tensors], 1)
    kept, state = params(), copy.deepcopy(svi.optim.get_state()["optimizer"]["state"])
    elbo = Smooth(evaluation)
    again = SVI(svi.model, svi.guide, svi.optim, elbo)
    with pytest.raises(FloatingPointError, match=r"the loss is nan .*in epoch 1 at batch 1\. The parameters are those"):
        fit(again, [data().tensors], 1)
    assert elbo.calls == evaluation
    assert_equal(params(), kept)
    torch.testing.assert_close(svi.optim.get_state()["optimizer"]["state"], state, rtol=0, atol=0)
    assert all(param.grad is None for _, param in pyro.get_param_store().named_parameters())


def test_a_gradient_that_is_nan_stops_lbfgs_before_the_step() -> None:
    def rough(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("likelihood", -((w - 1) ** 2) - ((x * (w + 1)) ** 2).sqrt())  # no gradient at x = 0

    kept: dict[str, Tensor] = {}

    class Batches:
        def __iter__(self) -> Iterator[Any]:
            yield torch.ones(())
            kept.update(params())
            yield torch.zeros(())

    svi = SVI(rough, ps.MeanFieldNormal(rough), lbfgs(), Smooth())
    with pytest.raises(FloatingPointError, match=r"gradient's norm nan, in epoch 1 at batch 2"):
        fit(svi, Batches(), 1)
    assert_equal(params(), kept)


# The loss's two terms


class Telling(ps.SAM_ELBO):
    """Tells the two terms of each step, found from the loss and torch's KL; not in the steps named."""

    def __init__(self, *silent: int, off: float = 0.0, tensors: bool = True) -> None:
        super().__init__(ps.Mean(), kl_weight=0.5)
        self._silent, self._off, self._tensors, self._calls, self.told = silent, off, tensors, 0, []

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        self._calls += 1
        loss, kl = super().loss_and_grads(model, guide, *args, **kwargs), 0.5 * float(kl_of(guide))
        self.told.append((loss - kl, kl))
        pair = (loss - kl, kl + self._off)
        told = tuple(map(torch.tensor, pair)) if self._tensors else pair
        self._last_terms = None if self._calls in self._silent else told
        return loss


def kl_of(guide: Any) -> Tensor:
    with torch.no_grad():
        sites = poutine.trace(guide).get_trace(*data().tensors).nodes.values()
        found = [site["fn"] for site in sites if site["type"] == "sample"]
        normals = [each.base_dist if isinstance(each, dist.Independent) else each for each in found]
        return sum(
            (torch.distributions.kl_divergence(each, dist.Normal(torch.zeros(()), 1.0)).sum() for each in normals),
            start=torch.zeros(()),
        )


@pytest.mark.parametrize("tensors", [True, False])
def test_data_term_and_kl_are_means_that_add_up_to_the_loss(tensors: bool) -> None:
    elbo = Telling(tensors=tensors)
    history = fit(build(elbo, dropout=0.0), loader(), 2)
    for index, name in enumerate(("data", "kl")):
        told = [pair[index] for pair in elbo.told]
        assert history[name] == pytest.approx([sum(told[:3]) / 3, sum(told[3:]) / 3], rel=1e-12)
    sums = [data + kl for data, kl in zip(history["data"], history["kl"], strict=True)]
    assert sums == pytest.approx(history["loss"], rel=1e-12)


@pytest.mark.parametrize("elbo", [Telling(2), Telling(3), Telling(off=50.0), Trace_ELBO()], ids=range(4))
def test_where_steps_do_not_tell_the_terms_of_the_loss_they_are_those_of_the_last_batch(elbo: Any) -> None:
    svi = build(elbo, JointOptim(torch.optim.SGD, {"lr": 0.0}), dropout=0.0)
    svi.guide = ps.MeanFieldNormal(svi.model, init_scale=1e-6, learn_scale=False)
    batches = [tuple(part[rows] for part in data().tensors) for rows in (slice(0, 4), slice(4, 8), slice(8, N))]
    history = fit(svi, batches, 1)
    kl = float(kl_of(svi.guide))
    assert history["kl"] == pytest.approx([kl], rel=1e-10)
    plain = SVI(svi.model, svi.guide, svi.optim, TraceMeanField_ELBO())
    assert history["data"] == pytest.approx([plain.evaluate_loss(*batches[-1]) - kl], rel=1e-4)
    assert "last" in str(ps.fit.__doc__)


def test_the_terms_are_those_that_the_estimator_adds_up() -> None:
    svi = build(ps.SAM_ELBO(ps.Mean(), kl_weight=0.5), JointOptim(torch.optim.SGD, {"lr": 0.0}), dropout=0.0)
    history = fit(svi, loader(), 1)
    kl = 0.5 * float(kl_of(svi.guide))
    assert history["kl"] == pytest.approx([kl], rel=1e-10)
    assert history["data"] == pytest.approx([history["loss"][0] - kl], rel=1e-10)


def test_sums_over_many_steps_are_as_exact_as_their_terms() -> None:
    sums = TermSums()
    for value in [3e7] + [1.0] * 1000:
        sums.add((torch.tensor(value, dtype=torch.float32), 0.0))
    assert sums.state() == [3e7 + 1000, 0.0]


@config_enumerate
def coins(y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(logits=w))
        pyro.sample("obs", dist.Normal(2 * z, 1.0), obs=y)


def enumerating(loss: Any) -> SVI:
    return SVI(coins, ps.MeanFieldNormal(coins), svi_optim(), loss)


@pytest.mark.parametrize("progress", [True, False])
def test_a_model_with_enumerated_latents_has_a_history(progress: bool) -> None:
    batches = [torch.linspace(-1, 3, 5), torch.linspace(0, 2, 5)]
    restart()
    svi = enumerating(ps.SAM_ELBO(ps.MixSAM(rho=0.5)))
    losses = [[svi.step(batch) for batch in batches] for _ in range(3)]
    restart()
    history = fit(enumerating(ps.SAM_ELBO(ps.MixSAM(rho=0.5))), batches, 3, progress=progress)
    assert history["loss"] == pytest.approx([sum(epoch) / 2 for epoch in losses], rel=1e-12)
    sums = [data + kl for data, kl in zip(history["data"], history["kl"], strict=True)]
    assert sums == pytest.approx(history["loss"], rel=1e-6)


@pytest.mark.parametrize("silent", [(1, 2), (3, 4), (5, 6)])
def test_terms_that_one_epoch_does_not_have_are_in_none(silent: tuple[int, ...]) -> None:
    history = fit(enumerating(Telling(*silent)), [torch.zeros(5), torch.ones(5)], 3, progress=True)
    assert history.keys() == {"loss", "grad_norm", "lr", "seconds"}
    assert {len(values) for values in history.values()} == {3}


# Progress


def test_the_bar_shows_loss_terms_and_gradient_norm(capsys: pytest.CaptureFixture[str]) -> None:
    fit(build(), loader(), progress=True)
    text = capsys.readouterr().err
    for part in ("6/6", "loss=", "data=", "kl=", "grad_norm="):
        assert part in text


def test_without_tqdm_a_line_an_epoch_says_how_to_get_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    fit(build(), loader(), progress=True)
    hint, *lines = capsys.readouterr().err.splitlines()
    assert "pip install tqdm" in hint
    assert len(lines) == 2
    assert "loss" in lines[0]


# Stops


def nan_batches() -> list[tuple[Tensor, Tensor]]:
    x, y = data().tensors
    return [(x, y), (torch.full_like(x, float("nan")), y)]


@pytest.mark.parametrize("validate", [True, False])
def test_nan_in_a_batch_stops_before_the_step_and_names_the_part(validate: bool) -> None:
    kept: dict[str, Tensor] = {}

    def batches() -> Iterator[Any]:
        first, second = nan_batches()
        yield first
        kept.update(params())
        yield second

    class Once:
        __iter__ = staticmethod(batches)

    warned = nullcontext() if validate else pytest.warns(UserWarning, match="Encountered NaN: loss")
    stopped = pytest.raises(FloatingPointError, match=r"(?s)part 0 of the batch.*batch 2")
    with pyro.validation_enabled(validate), warned, stopped:
        fit(build(), Once())
    assert_equal(params(), kept)
    assert all(param.grad is None for _, param in pyro.get_param_store().named_parameters())


@pytest.mark.parametrize("by_name", [True, False])
def test_nan_in_a_row_is_named_by_part_and_row(by_name: bool) -> None:
    x, y = data().tensors
    y = y.clone()
    y[[3, 7]] = float("nan")
    batch, part = ({"x": x, "y": y}, "'y'") if by_name else ((x, y), "1")
    with pytest.raises(
        FloatingPointError, match=rf"in part {part} of the batch .*row 3 and 1 more, in epoch 1 at batch 1"
    ):
        fit(build(), [batch])


def test_an_error_in_the_first_step_leaves_no_gradients() -> None:
    class Failing(ps.SAM_ELBO):
        def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
            super().loss_and_grads(*args, **kwargs)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fit(build(Failing()), loader())
    store = list(pyro.get_param_store().named_parameters())
    assert store
    assert all(param.grad is None for _, param in store)


def test_a_diverged_run_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Broken(ps.SAM_ELBO):
        calls = 0

        def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
            self.calls += 1
            return super().loss_and_grads(*args, **kwargs) * (float("inf") if self.calls > 4 else 1)

    path = tmp_path / "run.ckpt"
    with pytest.raises(FloatingPointError, match=rf"(?s)the loss is -?inf .*{path}, of step 3"):
        fit(build(Broken()), loader(), checkpoint=path)
    restart()
    with pytest.raises(FloatingPointError, match="no checkpoint was kept"):
        fit(build(Broken()), loader())


def test_ctrl_c_finishes_the_step_and_the_run_resumes_to_the_same_end(tmp_path: Path) -> None:
    restart()
    fit(build(), loader(), 3)
    straight = params()

    class Interrupting(ps.SAM_ELBO):
        calls = 0

        def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
            self.calls += 1
            if self.calls == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss_and_grads(*args, **kwargs)

    restart()
    with pytest.raises(KeyboardInterrupt):
        fit(build(Interrupting(ps.MixSAM(rho=0.5))), loader(), 3, checkpoint=tmp_path / "c")
    assert read(tmp_path / "c")["step"] == 5
    restart(99)
    with pytest.warns(UserWarning, match="the loss is not the one of the checkpoint"):
        history = fit(build(), loader(), 3, checkpoint=tmp_path / "c")
    assert_equal(params(), straight)
    assert len(history["loss"]) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_after_the_last_step_is_not_lost(tmp_path: Path) -> None:
    def press(training: Training) -> None:
        if training.epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(build(), loader(), 2, callbacks=[press], checkpoint=tmp_path / "c")
    assert read(tmp_path / "c")["epoch"] == 2


def test_a_second_ctrl_c_interrupts_a_loader_that_hangs(tmp_path: Path) -> None:
    class Hanging:
        def __iter__(self) -> Iterator[Any]:
            yield data().tensors
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        fit(build(), Hanging(), checkpoint=tmp_path / "c")
    assert (tmp_path / "c").exists()


def test_it_runs_outside_of_the_main_thread() -> None:
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(fit(build(), loader(), 1)))
    thread.start()
    thread.join()
    assert len(done) == 1


# Advice and errors


def unscaled() -> SVI:
    svi = build(dropout=0.0)
    bnn = ps.BayesianModule(nn.Linear(1, 1))

    def model(x: Tensor, y: Tensor) -> None:
        mean = bnn(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)

    return SVI(model, ps.MeanFieldNormal(model), svi.optim, loss=ps.SAM_ELBO())


def test_a_forgotten_subsample_size_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"KL is counted 3 times in an epoch.*pyro\.plate\('data', 12, subsample_size"):
        fit(unscaled(), DataLoader(data(), batch_size=4))


def test_one_batch_of_all_data_needs_no_subsample_size() -> None:
    fit(unscaled(), [data().tensors], 1)


def test_parameters_taken_over_from_the_store_are_warned_of() -> None:
    fit(build(), loader(), 1)
    with pytest.warns(UserWarning, match=r"took over 8 parameters that the param store held.*clear_param_store"):
        fit(build(), loader(), 1)


@pytest.mark.parametrize("batches", [[], iter([]), DataLoader(data(), batch_size=N + 1, drop_last=True)])
def test_an_empty_loader_is_refused(batches: Any) -> None:
    with pytest.raises(ValueError, match="loader must give batches in every epoch, got none in epoch 1"):
        fit(build(), batches)


def test_a_generator_that_is_used_up_is_refused() -> None:
    with pytest.raises(ValueError, match="got none in epoch 2; a generator is used up after one"):
        fit(build(), iter([data().tensors]))


@pytest.mark.parametrize("batch", [{"x": torch.zeros(N, 1), "label": torch.zeros(N)}, (1, 2, 3)])
def test_batches_that_do_not_fit_the_model_are_refused(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"the loader's batches do not fit the model: .*model\(x: "):
        fit(build(), [batch])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"svi": None}, "svi must be a pyro.infer.SVI with a PyroOptim"),
        ({"num_epochs": 0}, "num_epochs must be a positive whole number, got num_epochs=0"),
        ({"callbacks": [3]}, "callbacks must be a sequence of callables"),
        ({"loader": 3}, "loader must be an iterable of batches"),
        ({"progress": "yes"}, "progress must be True or False"),
        ({"resume": None}, "resume must be True or False"),
        ({"checkpoint": "/nowhere/c"}, "path must be a file in a directory that exists"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ps.fit(**{"svi": build(), "loader": loader(), "num_epochs": 1, **change})


def test_a_torch_optimiser_is_refused() -> None:
    svi = build()
    svi.optim = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ValueError, match=r"svi must be a pyro\.infer\.SVI with a PyroOptim such as JointOptim"):
        fit(svi, loader())


def test_pyros_optimisers_keep_no_checkpoint_under_module_local_params(tmp_path: Path) -> None:
    with (
        pyro.settings.context(module_local_params=True),
        pytest.raises(ValueError, match=r"use pyro_sam\.optim\.Joint"),
    ):
        fit(build(optim=pyro.optim.Adam({"lr": 0.1})), loader(), checkpoint=tmp_path / "c")


def test_checkpoints_as_often_as_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every must be a positive whole number of steps"):
        Checkpoint(tmp_path / "c", every=0)


def test_nothing_grows_over_many_steps() -> None:
    first, *_, last = soak(400)
    for name in ("tensors", "store", "state"):
        assert last[name] == first[name], name
    assert last["step"] == 400
