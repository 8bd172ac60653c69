"""Replicas of one method trained at equal gradients, and what they predict."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from time import process_time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import pyro_sam as ps
from pyro_sam.study.survey.bsam import Trainer
from pyro_sam.study.survey.measuring import Trained
from pyro_sam.study.survey.methods import Method, Numbers
from pyro_sam.study.survey.networks import plain_network
from pyro_sam.study.survey.problems import Problem, Source

Step = Callable[[Tensor, Tensor], Any]
CURVE_SAMPLES = 32
_FINAL_LR = 0.02  # share of the learning rate that is left at the end


@dataclass(frozen=True)
class Task:
    """A method on a data set, with a budget.

    Args:
        method: The method.
        source: The data set.
        gradients: Gradients of a run, of all of its members together.
        autocast: Whether training runs in bfloat16 where torch knows that to be safe.
    """

    method: Method
    source: Source
    gradients: int
    autocast: bool = False

    @property
    def steps(self) -> int:
        """Steps of a run; its members take them side by side."""
        return max(1, round(self.gradients / self.method.cost / self.method.members))

    def of(self, settings: Mapping[str, float]) -> "Task":
        """Return the task with the number of members that settings choose."""
        return replace(self, method=self.method.of(settings))

    def stops(self, points: int) -> list[int]:
        """Return the steps after which a run is looked at, so many at even distances, or each step of fewer."""
        return sorted({max(1, round(k * self.steps / points)) for k in range(1, points + 1)})

    def precision(self, device: torch.device) -> torch.autocast:
        """Return the precision of a training on a device, a context."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.autocast)

    def svi(self, numbers: Numbers, problem: Problem) -> SVI:
        """Return an SVI over R replicas.

        Args:
            numbers: Settings by name, R numbers each.
            problem: Tells the sizes.
        """
        model, num_weights = network(self.source, problem)
        guide = self.method.posterior(model, num_weights, numbers)
        optim = ps.optim.JointOptim(
            torch.optim.Adam, {"lr": numbers["lr"]}, scheduler=self._cosine, scheduler_interval="step"
        )
        return SVI(model, guide, optim, self.method.estimator(numbers))

    def stepper(self, svi: SVI, numbers: Numbers, num_rows: int) -> Step:
        """Return what takes a step of all replicas, called with inputs and targets of each in the first dimension."""
        if self.method.own:
            return Trainer(svi, numbers, num_rows, self.share).step
        return lambda x, y: svi.step(ps.per_replica(x), ps.per_replica(y))

    def _cosine(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, self.share)

    def share(self, step: float) -> float:
        """Return the share of the learning rate that is left at a step."""
        return _FINAL_LR + (1 - _FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))


def network(source: Source, problem: Problem) -> tuple[Callable[..., Tensor], int]:
    """Return the Bayesian network of a data set, and its number of weights."""
    net = plain_network(source, problem)
    bnn = ps.BayesianModule(net, prior=ps.nn.fan_in_normal(1.0))
    num_rows = len(problem.x)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        output = bnn(x)
        if source.task == "classification":
            likelihood: Any = dist.Categorical(logits=output)
        elif source.own_noise:
            likelihood = dist.Normal(output[..., 0], output[..., 1].exp())
        else:
            log_noise = pyro.sample("log_noise", dist.Normal(output.new_tensor(math.log(0.5)), output.new_ones(())))
            likelihood = dist.Normal(output.squeeze(-1), log_noise.exp())
        with pyro.plate("data", len(x) if y is None else num_rows, subsample_size=len(x)):
            observed: Tensor = pyro.sample("obs", likelihood, obs=y)
        return observed

    return model, sum(parameter.numel() for parameter in net.parameters())


class Minibatches:
    """Minibatches of one problem, the same at each look; a tuning trial is one epoch of them.

    Args:
        problem: Where the rows come from.
        batch_size: Rows in a minibatch.
        steps: Number of minibatches.
        seed: Decides the order.
    """

    def __init__(self, problem: Problem, batch_size: int, steps: int, seed: int) -> None:
        self._problem, self._batch_size, self._steps, self._seed = problem, batch_size, steps, seed

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in islice(_orders(len(self._problem.x), self._batch_size, self._seed), self._steps):
            yield self._problem.x[rows], self._problem.y[rows]


def _orders(num_rows: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_rows, generator=generator)
        # a short last batch would make the steps of a pass unlike
        yield from order[: max(1, num_rows // batch_size) * batch_size].split(batch_size)


@dataclass
class Outcome:
    """What a run gave.

    Args:
        metrics: Of the posterior predictive, on the rows held out, and the ELBO where that was asked for.
        at_mean: Of the network at the guide's mean.
        curve: Pairs of gradients so far and NLL.
        seconds: Processor time of the training, shared out equally among the runs side by side.
        shift: Of the posterior predictive, under shift.
    """

    metrics: dict[str, float]
    at_mean: dict[str, float]
    curve: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    shift: dict[str, float] = field(default_factory=dict)


def train(
    task: Task,
    settings: Sequence[dict[str, float]],
    problems: Sequence[Problem],
    *,
    num_samples: int,
    points: int = 1,
    seed: int = 0,
    shift: bool = False,
    look: Callable[[SVI, Sequence[Problem]], Any] = lambda svi, problems: None,
    keep: Callable[[int, Sequence[Outcome]], Any] = lambda first, outcomes: None,
) -> list[Outcome]:
    """Train a method at each settings on the problem beside it, as many side by side as the network allows.

    Args:
        task: Method, data set and budget.
        settings: Settings of each run.
        problems: Problem of each run, all of one size.
        num_samples: Weight samples of a prediction.
        points: Number of points of the learning curve.
        seed: Of initial weights, noise and minibatches.
        shift: Whether to measure the ELBO, and the metrics under shift.
        look: Called with an SVI and its problems at the end, for more measures.
        keep: Called with the number of the first run and the outcomes, as soon as those side by side are done.
    Returns:
        The outcome of each run; its numbers are NaN where it ended so.
    """
    most = 1 if task.method.plain else max(1, task.source.side_by_side // task.method.members)
    options: dict[str, Any] = {"num_samples": num_samples, "points": points, "shift": shift, "look": look}
    run = _together
    if task.method.plain:
        from pyro_sam.study.survey.outside.running import train as run
    found: list[Outcome] = []
    for first in range(0, len(problems), most):
        part = slice(first, first + most)
        outcomes = run(task, settings[part], problems[part], seed=seed + first, **options)
        keep(first, outcomes)
        found += outcomes
    return found


def _together(
    task: Task,
    settings: Sequence[dict[str, float]],
    problems: Sequence[Problem],
    *,
    num_samples: int,
    points: int,
    seed: int,
    shift: bool,
    look: Callable[[SVI, Sequence[Problem]], Any],
) -> list[Outcome]:
    members = task.method.members
    together = [problem for problem in problems for _ in range(members)]
    num_rows, batch_size, device = len(problems[0].x), task.source.batch_size, problems[0].x.device
    numbers = {
        name: torch.tensor([each[name] for each in settings for _ in range(members)], device=device)
        for name in settings[0]
        if name != "members"
    }
    streams = zip(*(_orders(num_rows, batch_size, seed + r) for r in range(len(together))), strict=True)
    outcomes = [Outcome({}, {}) for _ in problems]
    seconds, done = 0.0, 0
    with apart(seed):
        svi = task.svi(numbers, problems[0])
        step, trained = task.stepper(svi, numbers, num_rows), Trained(svi, task.source, members)
        for until in task.stops(points):
            began = process_time()
            for orders in islice(streams, until - done):
                batches = [(each.x[rows], each.y[rows]) for each, rows in zip(together, orders, strict=True)]
                with task.precision(device):
                    step(*map(torch.stack, zip(*batches, strict=True)))
            seconds, done = seconds + process_time() - began, until
            scores = trained.metrics(problems, num_samples if until == task.steps else CURVE_SAMPLES)
            for outcome, metrics in zip(outcomes, scores, strict=True):
                outcome.metrics = metrics
                outcome.curve.append((round(until * task.method.cost * members), metrics["nll"]))
        for outcome, metrics in zip(outcomes, trained.metrics(problems, 1, at_mean=True), strict=True):
            outcome.at_mean, outcome.seconds = metrics, seconds / len(problems)
        if shift:
            scores = trained.shift(problems, min(num_samples, CURVE_SAMPLES))
            for outcome, elbo, metrics in zip(outcomes, trained.elbo(problems), scores, strict=True):
                outcome.metrics["elbo"], outcome.shift = elbo, metrics
        look(svi, problems)
    return outcomes


@contextmanager
def apart(seed: int) -> Iterator[None]:
    """Run the body from a seed, with a param store of its own and without warnings of what the results tell."""
    with pyro.get_param_store().scope(), warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        pyro.set_rng_seed(seed)
        yield
