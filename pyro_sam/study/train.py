"""One run: one method, one seed, a fixed number of gradients, under Pyro's SVI."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
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
        seconds: Time spent on the steps.
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
    """Train and test one method.

    Args:
        dataset: The split of this seed.
        method_name: Name of the method.
        settings: Settings shared by all methods.
        seed: Seeds the weights, the minibatches and the noise; equal seeds give equal runs on a CPU.
        on_step: Called after each step with its gradients and its loss.
    Returns:
        The run.
    Raises:
        Diverged: If a loss, a gradient or a test metric is not finite.
    """
    method = METHODS[method_name]
    dataset = dataset.to(torch.device(settings.device))
    gradients = budget(len(dataset.x_train), settings)
    run = Run(method.name, seed, steps=gradients // method.cost(settings), gradients=gradients)
    pyro.set_rng_seed(seed)
    with pyro.get_param_store().scope(), warnings.catch_warnings():
        # the guard below reports it, with the step and the method
        warnings.filterwarnings("ignore", message="Encountered (NaN|\\+?inf)")
        _learn(run, dataset, method, settings, on_step or (lambda gradients, loss: None))
    return run


def _learn(run: Run, dataset: Dataset, method: Method, settings: Settings, on_step: OnStep) -> None:
    model, num_weights = bayesian_mlp(dataset, settings)
    scale = method.init_scale(settings, num_weights)
    guide = ps.MeanFieldNormal(model, init_scale=scale, learn_scale=method.guide == "learnt")
    guide.initialize(dataset.x_train[:1], dataset.y_train[:1])
    elbo = ps.SAM_ELBO(method.perturbation(settings), kl_weight=settings.kl_weight)
    optimiser, guard = _cosine(settings.lr, run.steps), _Guard(elbo, run)
    svi = SVI(model, guide, optimiser, loss=elbo.loss, loss_and_grads=guard)

    def measure(num_samples: int) -> dict[str, float]:
        return guard.finite(lambda: _measure(model, guide, dataset, num_samples))

    cost = run.gradients // run.steps
    points = {round(k * run.steps / settings.curve_points) for k in range(1, settings.curve_points + 1)}
    losses: list[float] = []
    for step, rows in zip(range(1, run.steps + 1), _minibatches(dataset, settings, run.seed), strict=False):
        started = time.perf_counter()
        losses.append(svi.step(*rows))
        optimiser.step()
        run.seconds += time.perf_counter() - started
        on_step(cost, losses[-1])
        if step in points:
            loss = sum(losses) / len(losses)
            run.curve.append({"gradients": step * cost, "loss": loss, **measure(_CURVE_SAMPLES)})
            losses.clear()
    run.metrics = measure(settings.num_samples)


class _Guard:
    """``loss_and_grads`` of an ELBO, stopped before the optimiser sees a number that is not finite."""

    def __init__(self, elbo: ps.SAM_ELBO, run: Run) -> None:
        self._elbo, self._run = elbo, run
        self._step = 0
        self._last: float | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> float:
        self._step += 1
        try:
            loss = self._elbo.loss_and_grads(*args, **kwargs)
        except ValueError as error:
            # Pyro's own check met the number before the loss did
            raise self._diverged(_first_line(error)) from error
        bad = _bad_gradients() if math.isfinite(loss) else f"the loss is {loss}"
        if bad:
            raise self._diverged(bad)
        self._last = loss
        return loss

    def finite(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return the test metrics that ``measure`` gives, if the network at hand still has any."""
        try:
            metrics = measure()
        except ValueError as error:
            raise self._diverged(_first_line(error)) from error
        bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise self._diverged(f"test {bad[0]}")
        return metrics

    def _diverged(self, what: str) -> Diverged:
        return Diverged(what, self._run.method, self._run.seed, self._step, self._last)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(":.")


def _bad_gradients() -> str:
    """Return a sentence that names the gradients that are not finite; empty if all are."""
    gradients = {name: p.grad for name, p in pyro.get_param_store().named_parameters() if p.grad is not None}
    if not gradients or torch.stack([grad.isfinite().all() for grad in gradients.values()]).all():
        return ""
    names = [name for name, grad in gradients.items() if not grad.isfinite().all()]
    return f"the gradient of {', '.join(names)} is not finite"


def _measure(model: Model, guide: ps.MeanFieldNormal, dataset: Dataset, num_samples: int) -> dict[str, float]:
    # apart from the training's random stream: looking more often must not change the run
    devices = [dataset.x_test.device] if dataset.x_test.is_cuda else []
    with torch.random.fork_rng(devices):
        return evaluate(model, guide, dataset, num_samples)


def _cosine(lr: float, steps: int) -> PyroLRScheduler:
    def share(step: int) -> float:
        return _FINAL_LR + (1 - _FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))

    arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "lr_lambda": share}
    return PyroLRScheduler(torch.optim.lr_scheduler.LambdaLR, arguments)


def _minibatches(dataset: Dataset, settings: Settings, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield minibatches for ever: every row once a pass, in an order that only the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(dataset.x_train), generator=generator).to(dataset.x_train.device)
        for rows in order.split(settings.batch_size):
            yield dataset.x_train[rows], dataset.y_train[rows]
