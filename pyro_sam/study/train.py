"""Runs of one method, a fixed number of gradients each, under Pyro's SVI: one for each seed, as replicas."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import PyroLRScheduler
from torch import Tensor

import pyro_sam as ps
from pyro_sam.study.datasets import Dataset
from pyro_sam.study.evaluate import evaluate
from pyro_sam.study.methods import METHODS, Method
from pyro_sam.study.network import Model, bayesian_mlp
from pyro_sam.study.settings import Settings

_CURVE_SAMPLES = 8
_FINAL_LR = 0.1  # share of the learning rate that is left at the end
OnStep = Callable[[int, float], None]
OnSeedsStep = Callable[[int, int, float], None]


class Diverged(RuntimeError):
    """A loss or a gradient that is not finite.

    Args:
        what: What turned out not to be finite.
        method: Name of the method.
        seed: Seed of the run.
        step: The step, counted from 1.
        last_finite_loss: Loss of the last good step; None if there was none.
    """

    def __init__(self, what: str, method: str, seed: int, step: int, last_finite_loss: float | None) -> None:
        self.what, self.method, self.seed = what, method, seed
        self.step, self.last_finite_loss = step, last_finite_loss
        before = "there was no finite loss" if last_finite_loss is None else f"last finite loss {last_finite_loss:.6g}"
        super().__init__(f"{method}, seed {seed}, step {step}: {what}; {before}. Try a smaller --lr or --rho.")


@dataclass
class Run:
    """What one run gave.

    Args:
        method: Name of the method.
        seed: Its seed.
        steps: Optimiser steps.
        gradients: Gradients that they took.
        seconds: Time spent on the steps. The first one, which warms up the process and meets the model, counts as the
            mean of the others.
        metrics: Test metrics of the trained guide.
        curve: Learning curve: gradients so far, mean loss of the steps since the last point, test metrics.
    """

    method: str
    seed: int
    steps: int
    gradients: int
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)


def budget(num_rows: int, settings: Settings) -> int:
    """Return the gradients of a run: an even number, so that methods of one and two gradients a step both fit."""
    gradients = settings.epochs * math.ceil(num_rows / settings.batch_size)
    return gradients + gradients % 2


def train(dataset: Dataset, method_name: str, settings: Settings, seed: int, on_step: OnStep | None = None) -> Run:
    """Train and test one method on one split; see :func:`train_together`."""
    told = on_step or (lambda gradients, loss: None)
    return train_together({seed: dataset}, method_name, settings, lambda _, gradients, loss: told(gradients, loss))[0]


def train_together(
    datasets: Mapping[int, Dataset], method_name: str, settings: Settings, on_step: OnSeedsStep | None = None
) -> list[Run]:
    """Train and test one method on the splits of several seeds, as replicas of one guide.

    Each has rows, minibatches, initial weights and noise of its own.

    Args:
        datasets: The split of each seed, all of one size.
        method_name: Name of the method.
        settings: Settings shared by all methods.
        on_step: Called for each seed after each step with the seed, the step's gradients and the seed's loss.
    Returns:
        The runs. The same seeds together give the same runs on a CPU: each seeds its minibatches, the first also the
        weights and the noise.
    Raises:
        Diverged: If a loss, a gradient or a test metric is not finite.
    """
    method = METHODS[method_name]
    datasets = {seed: dataset.to(torch.device(settings.device)) for seed, dataset in datasets.items()}
    first, *_ = datasets
    gradients = budget(len(datasets[first].x_train), settings)
    runs = [Run(method.name, seed, gradients // method.cost(settings), gradients) for seed in datasets]
    pyro.set_rng_seed(first)
    with pyro.get_param_store().scope(), warnings.catch_warnings():
        # the guard below reports it, with the step and the method
        warnings.filterwarnings("ignore", message="Encountered (NaN|\\+?inf)|replica .* has values that")
        _learn(runs, datasets, method, settings, on_step or (lambda seed, gradients, loss: None))
    return runs


def _learn(
    runs: list[Run], datasets: Mapping[int, Dataset], method: Method, settings: Settings, on_step: OnSeedsStep
) -> None:
    splits = list(datasets.values())
    model, scale = bayesian_mlp(splits[0], settings), method.init_scale(settings)
    guide = ps.MeanFieldNormal(model, init_scale=scale, learn_scale=method.guide == "learnt", num_replicas=len(splits))
    guide.initialize(splits[0].x_train[:1], splits[0].y_train[:1])
    elbo = ps.SAM_ELBO(method.perturbation(settings), kl_weight=settings.kl_weight)
    steps = runs[0].steps
    optimiser, guard = _cosine(settings.lr, steps), _Guard(elbo, runs)
    svi = SVI(model, guide, optimiser, loss=elbo.loss, loss_and_grads=guard)
    cost = runs[0].gradients // steps
    points = {round(k * steps / settings.curve_points) for k in range(1, settings.curve_points + 1)}
    losses: list[list[float]] = []
    times: list[float] = []
    for step, rows in zip(range(1, steps + 1), _together(datasets, settings), strict=False):
        started = time.perf_counter()
        svi.step(*rows)
        optimiser.step()
        times.append(time.perf_counter() - started)
        losses.append(guard.losses)
        for run, loss in zip(runs, guard.losses, strict=True):
            on_step(run.seed, cost, loss)
        if step in points:
            means = [sum(each) / len(losses) for each in zip(*losses, strict=True)]
            for run, loss, metrics in zip(
                runs, means, _measure(guard, model, guide, splits, _CURVE_SAMPLES), strict=True
            ):
                run.curve.append({"gradients": step * cost, "loss": loss, **metrics})
            losses.clear()
    warm = times[1:] or times
    for run, metrics in zip(runs, _measure(guard, model, guide, splits, settings.num_samples), strict=True):
        run.seconds = sum(warm) / len(warm) * steps / len(runs)
        run.metrics = metrics


class _Guard:
    """``loss_and_grads`` of an ELBO, stopped before the optimiser sees a number that is not finite.

    Attributes:
        losses: The last good step's losses, a run each.
    """

    def __init__(self, elbo: ps.SAM_ELBO, runs: Sequence[Run]) -> None:
        self._elbo, self._runs, self._step = elbo, runs, 0
        self.losses: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> float:
        self._step += 1
        try:
            loss = self._elbo.loss_and_grads(*args, **kwargs)
        except ValueError as error:
            # Pyro's own check met the number before the loss did
            raise self.diverged(0, _first_line(error)) from error
        losses: Any = self._elbo.replica_losses
        values: list[float] = losses.tolist()
        for r, value in enumerate(values):
            if not math.isfinite(value):
                raise self.diverged(r, f"the loss is {value}")
        if bad := _bad_gradients():
            raise self.diverged(*bad)
        self.losses = values
        return loss

    def diverged(self, r: int, what: str) -> Diverged:
        """Return the error of a run."""
        last = self.losses[r] if self.losses else None
        return Diverged(what, self._runs[r].method, self._runs[r].seed, self._step, last)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(":.")


def _bad_gradients() -> tuple[int, str] | None:
    """Return the first run with gradients that are not finite, and a sentence that names them; None if all are."""
    gradients = {name: p.grad for name, p in pyro.get_param_store().named_parameters() if p.grad is not None}
    good = {name: grad.isfinite().reshape(len(grad), -1).all(1) for name, grad in gradients.items()}
    if not good or bool(torch.stack(list(good.values())).all()):
        return None
    r = min(int((~rows).nonzero()[0]) for rows in good.values() if not bool(rows.all()))
    return r, f"the gradient of {', '.join(name for name, rows in good.items() if not rows[r])} is not finite"


def _measure(
    guard: _Guard, model: Model, guide: ps.MeanFieldNormal, splits: Sequence[Dataset], num_samples: int
) -> Iterator[dict[str, float]]:
    """Yield each run's test metrics; they raise where the network at hand has none."""
    # apart from the training's random stream: looking more often must not change the run
    devices = [splits[0].x_test.device] if splits[0].x_test.is_cuda else []
    for r, dataset in enumerate(splits):
        try:
            with torch.random.fork_rng(devices):
                metrics = evaluate(model, guide, dataset, num_samples, replica=r)
        except ValueError as error:
            raise guard.diverged(r, _first_line(error)) from error
        bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise guard.diverged(r, f"test {bad[0]}")
        yield metrics


def _cosine(lr: float, steps: int) -> PyroLRScheduler:
    def share(step: int) -> float:
        return _FINAL_LR + (1 - _FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))

    arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "lr_lambda": share}
    return PyroLRScheduler(torch.optim.lr_scheduler.LambdaLR, arguments)


def _together(datasets: Mapping[int, Dataset], settings: Settings) -> Iterator[tuple[Any, Any]]:
    """Yield a minibatch of each seed's for ever, side by side."""
    streams = [_minibatches(dataset, settings, seed) for seed, dataset in datasets.items()]
    for batches in zip(*streams, strict=True):
        x, y = (torch.stack(each) for each in zip(*batches, strict=True))
        yield ps.per_replica(x), ps.per_replica(y)


def _minibatches(dataset: Dataset, settings: Settings, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield minibatches for ever: every row once a pass, in an order that only the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(dataset.x_train), generator=generator).to(dataset.x_train.device)
        for rows in order.split(settings.batch_size):
            yield dataset.x_train[rows], dataset.y_train[rows]
