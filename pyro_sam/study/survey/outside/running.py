"""A run of a method from outside, which gives what the study's other methods give."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from time import process_time
from typing import Any, Protocol

import torch
from pyro.infer import SVI
from torch import Tensor

import pyro_sam as ps
from pyro_sam.predictive.prediction import SampledLikelihood
from pyro_sam.study.survey.measuring import metrics_of
from pyro_sam.study.survey.networks import plain_network
from pyro_sam.study.survey.outside.dropout import Dropout
from pyro_sam.study.survey.outside.laplace import Laplace
from pyro_sam.study.survey.outside.start import Plain, Start
from pyro_sam.study.survey.outside.swag import Swag
from pyro_sam.study.survey.problems import Problem, Source
from pyro_sam.study.survey.shift import under_shift
from pyro_sam.study.survey.training import CURVE_SAMPLES, Minibatches, Outcome, Task, apart


class Run(Protocol):
    """A run of a method."""

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take a step on a batch, which costs a gradient."""

    def sampled(self) -> AbstractContextManager[None]:
        """Put the network at a sample of the posterior, for the body."""

    def centred(self) -> AbstractContextManager[None]:
        """Put the network at the posterior's mean, for the body."""


RUNS: dict[str, Callable[[Start], Run]] = {"laplace": Laplace, "swag": Swag, "dropout": Dropout}


def train(
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
    """Do what :func:`pyro_sam.study.survey.training.train` does, whose arguments these are, for one run from outside.

    ``look`` is called with an SVI whose guide has the posterior's mean. There is no ELBO.
    """
    (numbers,), (problem,) = settings, problems
    with apart(seed):
        plain = Plain(plain_network(task.source, problem), task.source)
        run = RUNS[task.method.name](Start(plain, problem, numbers, task.steps, task.share))
        trained = _Trained(task.source, problem, plain, run, seed)
        batches = iter(Minibatches(problem, task.source.batch_size, task.steps, seed))
        outcome, done = Outcome({}, {}), 0
        for until in task.stops(points):
            began = process_time()
            for x, y in islice(batches, until - done):
                run.step(x, y)
            outcome.seconds, done = outcome.seconds + process_time() - began, until
            outcome.metrics = trained.metrics(num_samples if until == task.steps else CURVE_SAMPLES)
            outcome.curve.append((until, outcome.metrics["nll"]))
        outcome.at_mean = trained.metrics(1, at_mean=True)
        outcome.shift = trained.shift(num_samples) if shift else {}
        with run.centred():
            mean = plain.values()
    with apart(seed):
        look(_placed(mean, task, numbers, problem), problems)
    return [outcome]


@dataclass(frozen=True)
class _Trained:
    """A run, as it is at the moment.

    Args:
        source: The data set.
        problem: Rows held out.
        plain: The network.
        run: Puts it at samples.
        seed: Of the samples.
    """

    source: Source
    problem: Problem
    plain: Plain
    run: Run
    seed: int

    def metrics(self, num_samples: int, *, at_mean: bool = False) -> dict[str, float]:
        """Return the metrics on the rows held out; NLL is NaN where the run ended so."""
        predict = self._predict(num_samples, at_mean)
        return {"nll": math.nan, **self._of(lambda: metrics_of(predict(self.problem.x_out), self.problem))}

    def shift(self, num_samples: int) -> dict[str, float]:
        """Return the metrics under shift; none where the run ended in NaN."""
        predict = self._predict(num_samples, False)
        return self._of(lambda: under_shift(predict, self.source, self.problem))

    def _of(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return what a measure gives, the random stream left as it was."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            try:
                return measure()
            except ValueError:  # of a run that ended in NaN
                return {}

    def _predict(self, num_samples: int, at_mean: bool) -> Callable[[Tensor], ps.Prediction]:
        place = self.run.centred if at_mean else self.run.sampled
        return lambda x: predict(self.plain, x, place, num_samples)


def predict(
    plain: Plain, x: Tensor, place: Callable[[], AbstractContextManager[None]], num_samples: int
) -> ps.Prediction:
    """Return the equal mixture of the likelihoods at weight samples.

    Args:
        plain: The network.
        x: Inputs.
        place: Puts the network at a sample.
        num_samples: Number of samples.
    Raises:
        ValueError: If the network has a NaN.
    """
    likelihoods = []
    for _ in range(num_samples):
        with place(), torch.no_grad():
            likelihoods.append(SampledLikelihood(plain(x), None, 1))
    return ps.Prediction([likelihoods])


def _placed(mean: dict[str, Tensor], task: Task, numbers: dict[str, float], problem: Problem) -> SVI:
    """Return an SVI of one replica whose guide has the mean."""
    svi = task.svi({name: torch.tensor([value]) for name, value in numbers.items()}, problem)
    svi.guide.initialize(problem.x, problem.y)
    for name, value in mean.items():
        attrgetter(name)(svi.guide.locs).data.copy_(value)
    return svi
