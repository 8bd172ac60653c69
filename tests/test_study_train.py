"""One run: what a method is, how many gradients it takes, that it repeats, and how it stops."""

import dataclasses
import functools
import math
from typing import Any

import pyro
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_sam as ps
from pyro_sam.study import train as train_module
from pyro_sam.study.datasets import Dataset, load
from pyro_sam.study.evaluate import METRICS, evaluate
from pyro_sam.study.methods import METHODS
from pyro_sam.study.settings import Settings
from pyro_sam.study.train import Diverged, budget, train

TINY = Settings(epochs=2, batch_size=8, hidden=(5,), num_samples=3, curve_points=2)


def tiny(name: str = "digits", rows: int = 40) -> Dataset:
    data = load(name)
    parts = {part: getattr(data, part)[:rows] for part in ("x_train", "y_train", "x_test", "y_test")}
    return dataclasses.replace(data, **parts)


@pytest.mark.parametrize(
    ("name", "law", "learn_scale"),
    [
        ("map", ps.Mean(), False),
        ("mfvi", ps.Gaussian(), True),
        ("sam", ps.Adversarial(rho=0.5, geometry="euclidean"), False),
        ("random-sam", ps.Gaussian(), False),
        ("variational-sam", ps.Adversarial(rho=0.5), True),
        ("mix-sam", ps.MixSAM(rho=None, kappa=2.0), False),
        ("ascended", ps.AscendedSample(alpha=3.0), True),
    ],
)
def test_a_method_is_the_papers_law_and_guide(name: str, law: ps.Perturbation, learn_scale: bool) -> None:
    settings = Settings(rho={name: 0.5}, kappa=2.0, alpha=3.0)
    assert METHODS[name].perturbation(settings) == law
    assert (METHODS[name].guide == "learnt") == learn_scale


@pytest.mark.parametrize("name", ["random-sam", "mix-sam"])
def test_the_fixed_scale_of_a_radius_makes_noise_of_that_length(name: str) -> None:
    def model() -> None:
        pyro.sample("w", pyro.distributions.Normal(torch.zeros(10_000), 1.0).to_event(1))

    scale = METHODS[name].init_scale(Settings(rho={name: 0.5}))
    guide = ps.MeanFieldNormal(model, init_scale=scale, learn_scale=False).initialize()
    assert math.isclose((guide.scales.w * torch.randn(10_000)).norm(), 0.5, rel_tol=0.03)


def test_seconds_leave_out_what_warms_up_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, 0

    def clock() -> float:
        nonlocal now, calls
        calls += 1
        if calls % 2 == 0:  # at the end of a step
            now += 100.0 if calls == 2 else 2.0
        return now

    monkeypatch.setattr(train_module.time, "perf_counter", clock)
    run = train(tiny(), "mfvi", TINY, 0)
    assert run.seconds == 2.0 * run.steps


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_the_same_number_of_gradients(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    for owner, name in ((torch.autograd, "grad"), (torch.autograd, "backward")):

        def counted(real: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, functools.partial(counted, getattr(owner, name)))
    seen: list[int] = []
    run = train(tiny(), method, TINY, 0, lambda gradients, loss: seen.append(gradients))
    assert run.gradients == budget(40, TINY) == 10
    assert sum(seen) == calls == 10
    assert run.steps == len(seen) == (5 if METHODS[method].cost(TINY) == 2 else 10)


def test_an_odd_budget_is_rounded_up_so_that_two_gradients_a_step_fit() -> None:
    assert budget(24, Settings(epochs=1, batch_size=8)) == 4
    assert budget(25, Settings(epochs=1, batch_size=8)) == 4


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_run_to_the_bit(method: str) -> None:
    runs = [train(tiny(), method, TINY, seed) for seed in (3, 3, 4)]
    first, second, other = (dataclasses.replace(run, seconds=0.0) for run in runs)
    assert first == second
    assert other.metrics != first.metrics


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_looking_at_the_curve_more_often_does_not_change_the_run(name: str) -> None:
    few, many = (train(tiny(name), "mfvi", dataclasses.replace(TINY, curve_points=k), 0) for k in (1, 5))
    assert few.metrics == many.metrics
    assert [len(few.curve), len(many.curve)] == [1, 5]
    assert set(few.metrics) == set(METRICS[tiny(name).task])


def test_training_leaves_no_parameter_in_the_store() -> None:
    pyro.param("mine", torch.tensor(1.0))
    train(tiny("diabetes"), "mfvi", TINY, 0)
    assert list(pyro.get_param_store()) == ["mine"]


def test_every_row_is_seen_once_a_pass() -> None:
    data = tiny()
    batches = train_module._minibatches(data, Settings(batch_size=16), 0)
    rows = torch.cat([next(batches)[0] for _ in range(3)])
    assert torch.equal(rows.unique(dim=0), data.x_train.unique(dim=0))
    assert len(rows) == 40


def test_the_learning_rate_falls_to_a_tenth_on_a_cosine() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = train_module._cosine(0.5, steps=4)
    rates = []
    for _ in range(5):
        parameter.grad = torch.ones(1)
        optimiser([parameter])
        rates.append(optimiser.optim_objs[parameter].optimizer.param_groups[0]["lr"])
        optimiser.step()
    expected = [0.05 + 0.45 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(5)]
    assert rates == pytest.approx(expected)


class _Poison(TorchDispatchMode):
    """Turns an operation's results into NaN."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * math.nan if func.__name__.startswith(self._name) else result


def test_a_loss_that_is_not_finite_stops_with_step_method_and_last_finite_loss() -> None:
    losses: list[float] = []
    settings = dataclasses.replace(TINY, lr=1e5)
    with pytest.raises(Diverged, match=r"mfvi, seed 7, step 2: .*; last finite loss .*Try a smaller --lr") as error:
        train(tiny(), "mfvi", settings, 7, lambda gradients, loss: losses.append(loss))
    stopped = error.value
    assert (stopped.method, stopped.seed, stopped.step) == ("mfvi", 7, 2)
    assert stopped.last_finite_loss == losses[-1]


def test_a_gradient_that_is_not_finite_is_named_before_it_reaches_a_parameter() -> None:
    with (
        pytest.raises(Diverged, match=r"step 1: the gradient of .*0\.weight.* is not finite; there was no finite loss"),
        _Poison("threshold_backward"),
    ):
        train(tiny(), "map", TINY, 0)


def test_a_value_that_pyros_checks_refuse_stops_as_well() -> None:
    with pytest.raises(Diverged, match=r"step 1: Expected parameter logits .*; there was no finite loss"):
        train(tiny(), "mfvi", dataclasses.replace(TINY, init_scale=1e30), 0)


def test_a_test_metric_that_is_not_finite_stops_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "evaluate", lambda *args, **_: {"accuracy": 1.0, "nll": math.inf})
    with pytest.raises(Diverged, match="mfvi, seed 0, step 5: test nll is inf; last finite loss"):
        train(tiny(), "mfvi", TINY, 0)


def test_a_network_that_training_left_without_a_prediction_stops_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("Expected parameter logits:\nmore")

    monkeypatch.setattr(train_module, "evaluate", refuse)
    with pytest.raises(Diverged, match="step 5: Expected parameter logits; last"):
        train(tiny(), "mfvi", TINY, 0)


def test_classification_metrics_are_those_of_scikit_learn_and_of_the_definition() -> None:
    from sklearn.metrics import accuracy_score, log_loss

    def model(x: torch.Tensor, y: Any = None) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("obs", pyro.distributions.Categorical(logits=x), obs=y)

    # confidences of every size, right about as often
    logits = 2 * torch.randn(300, 10)
    labels = torch.distributions.Categorical(logits=logits).sample()
    got = evaluate(model, lambda *args: None, dataclasses.replace(load("digits"), x_test=logits, y_test=labels), 2)
    probs, y = logits.softmax(-1).numpy(), labels.numpy()
    assert got["accuracy"] == pytest.approx(accuracy_score(y, probs.argmax(-1)))
    assert got["nll"] == pytest.approx(log_loss(y, probs, labels=range(10)), rel=1e-5)
    one_hot = torch.eye(10).numpy()[y]
    assert got["brier"] == pytest.approx(((probs - one_hot) ** 2).sum(-1).mean(), rel=1e-5)
    confidence, right, ece = probs.max(-1), probs.argmax(-1) == y, 0.0
    for k in range(15):
        held = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if held.any():
            ece += held.mean() * abs(confidence[held].mean() - right[held].mean())
    assert got["ece"] == pytest.approx(ece, rel=1e-4)


def test_regression_metrics_are_in_the_targets_own_units() -> None:
    def model(x: torch.Tensor, y: Any = None) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("obs", pyro.distributions.Normal(x[:, 0], 0.5), obs=y)

    targets = torch.tensor([0.9, 3.0, 1.0, 2.0])
    predictions = torch.tensor([[0.0], [1.0], [1.0], [2.0]])
    base = load("diabetes")
    data = dataclasses.replace(base, x_test=predictions, y_test=targets, y_loc=100.0, y_scale=10.0)
    got = evaluate(model, lambda *args: None, data, num_samples=2)
    # errors 9, 20, 0, 0 under a Normal of standard deviation 5: 1.8, 4, 0, 0 deviations
    assert got["rmse"] == pytest.approx(math.sqrt(481 / 4))
    assert got["log_likelihood"] == pytest.approx(-(1.8**2 + 16) / 8 - math.log(5) - 0.5 * math.log(2 * math.pi))
    assert got["coverage"] == pytest.approx(3 / 4)


def test_training_learns_digits() -> None:
    torch.set_default_dtype(torch.float32)
    run = train(load("digits"), "mfvi", Settings(epochs=10, curve_points=1), 0)
    assert run.metrics["accuracy"] > 0.94


def test_each_seed_has_rows_and_weights_of_its_own() -> None:
    datasets = {seed: tiny(rows=40) for seed in (5, 6)}
    told: list[tuple[int, int]] = []
    runs = train_module.train_together(datasets, "mfvi", TINY, lambda seed, cost, loss: told.append((seed, cost)))
    assert [run.seed for run in runs] == [5, 6]
    assert told[:4] == [(5, 1), (6, 1)] * 2
    assert runs[0].metrics != runs[1].metrics
    again = train_module.train_together(datasets, "mfvi", TINY)
    assert [run.metrics for run in again] == [run.metrics for run in runs]


def test_the_seed_that_diverges_is_named() -> None:
    good, bad = tiny(), tiny()
    bad = dataclasses.replace(bad, x_train=bad.x_train * math.nan)
    with pytest.raises(Diverged, match="mfvi, seed 1, step"):
        train_module.train_together({0: good, 1: bad, 2: good}, "mfvi", TINY)


def test_seeds_together_are_as_good_as_seeds_apart() -> None:
    """Digits, five seeds: the means of accuracy and NLL agree to their standard errors."""
    torch.set_default_dtype(torch.float32)
    settings = Settings(epochs=6, curve_points=1)
    datasets = {seed: load("digits", seed) for seed in range(5)}
    together = train_module.train_together(datasets, "mfvi", settings)
    apart = [train(datasets[seed], "mfvi", settings, seed) for seed in datasets]
    for metric in ("accuracy", "nll"):
        a, b = (torch.tensor([run.metrics[metric] for run in runs]) for runs in (together, apart))
        error = (a.var() / 5 + b.var() / 5).sqrt()
        assert abs(a.mean() - b.mean()) < 4 * error
