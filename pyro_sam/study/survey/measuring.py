"""What trained replicas predict, and how good it is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import Tensor

import pyro_sam as ps
from pyro_sam.study.survey.problems import Problem, Source
from pyro_sam.study.survey.shift import Predict, under_shift

_ELBO_ROWS, _ELBO_SAMPLES = 1000, 32
Measure = Callable[[int, Problem], dict[str, float]]


@dataclass(frozen=True)
class Trained:
    """Runs that were trained side by side.

    Args:
        svi: Model and guide.
        source: The data set.
        members: Replicas of a run, whose predictions are mixed.
    """

    svi: SVI
    source: Source
    members: int = 1

    def metrics(
        self, problems: Sequence[Problem], num_samples: int, *, at_mean: bool = False
    ) -> list[dict[str, float]]:
        """Return the metrics of each run on the rows held out; NLL is NaN where it ended so.

        Args:
            problems: Problem of each run.
            num_samples: Weight samples of a prediction, of all members together.
            at_mean: Whether to predict with the network at the guide's mean instead.
        """

        def measure(k: int, problem: Problem) -> dict[str, float]:
            return metrics_of(self._predict(k, num_samples, at_mean)(problem.x_out), problem)

        return [{"nll": math.nan, **each} for each in self._of_each(problems, measure)]

    def shift(self, problems: Sequence[Problem], num_samples: int) -> list[dict[str, float]]:
        """Return the metrics of each run under shift; none where it ended in NaN."""

        def measure(k: int, problem: Problem) -> dict[str, float]:
            return under_shift(self._predict(k, num_samples, False), self.source, problem)

        return self._of_each(problems, measure)

    def elbo(self, problems: Sequence[Problem]) -> list[float]:
        r"""Return the ELBO of each run at ``kl_weight`` 1 per training row, of an ensemble the mean of its members'.

        .. math:: \frac1N \left(E_q[\log p(D \mid w)] - \mathrm{KL}(q \| p)\right)

        It is estimated on 1000 of the rows with 32 weight samples; of a regression in the targets' own units. NaN where
        a run ended so.
        """
        found = self._of_each(problems, lambda k, each: {"elbo": self._elbo(k, each)})
        return [each.get("elbo", math.nan) for each in found]

    def _of_each(self, problems: Sequence[Problem], measure: Measure) -> list[dict[str, float]]:
        """Return what a measure gives of each run, none if that ended in NaN; the random stream is left as it was."""
        found = []
        for k, problem in enumerate(problems):
            with torch.random.fork_rng([]):
                torch.manual_seed(k)
                try:
                    found.append(measure(k, problem))
                except ValueError:  # of a replica that ended in NaN
                    found.append({})
        return found

    def _elbo(self, k: int, problem: Problem) -> float:
        estimator, x, y = ps.SAM_ELBO(num_particles=_ELBO_SAMPLES), problem.x[:_ELBO_ROWS], problem.y[:_ELBO_ROWS]
        losses = [estimator.loss(self.svi.model, self.svi.guide.replica(r), x, y) for r in self._replicas(k)]
        return -sum(losses) / len(losses) / len(problem.x) - problem.log_unit

    def _replicas(self, k: int) -> range:
        return range(k * self.members, (k + 1) * self.members)

    def _predict(self, k: int, num_samples: int, at_mean: bool) -> Predict:
        each = math.ceil(num_samples / self.members)
        options: dict[str, Any] = {"num_samples": each, "samples_at_once": min(each, self.source.at_once)}

        def predict(x: Tensor) -> ps.Prediction:
            parts = []
            for r in self._replicas(k):
                guide = mean_of(self.svi.guide, r) if at_mean else self.svi.guide
                replica = None if at_mean else r
                parts.append(ps.predict(self.svi.model, guide, x, replica=replica, **options))
            return _mixed(parts)

        return predict


def mean_of(guide: ps.MeanFieldNormal, r: int) -> Callable[..., Any]:
    """Return a guide without noise at the mean of a replica."""
    values = guide.replica(r).median()

    def at_mean(*args: Any) -> None:
        for name, value in values.items():
            pyro.sample(name, dist.Delta(value, event_dim=value.dim()))

    return at_mean


def _mixed(parts: Sequence[ps.Prediction]) -> ps.Prediction:
    """Return the equal mixture of predictions."""
    return ps.Prediction([[*chain(*batches)] for batches in zip(*(part.batches for part in parts), strict=True)])


def metrics_of(prediction: ps.Prediction, problem: Problem) -> dict[str, float]:
    """Return the metrics of a prediction on the rows held out; of a regression in the targets' own units."""
    y = problem.y_out
    nll = float(ps.metrics.nll(prediction, y)) + problem.log_unit
    if not problem.y.is_floating_point():
        scores = (ps.metrics.accuracy, ps.metrics.brier, ps.metrics.ece, selective_accuracy)
        return {"nll": nll, **{score.__name__: float(score(prediction, y)) for score in scores}}
    rmse = math.exp(problem.log_unit) * float(ps.metrics.rmse(prediction, y))
    return {"nll": nll, "rmse": rmse, "coverage": float(ps.metrics.interval_coverage(prediction, y))}


def selective_accuracy(prediction: ps.Prediction, y: Tensor, share: float = 0.8) -> float:
    """Return the accuracy on the share of the rows, 80 %, whose most probable class is the most probable."""
    confidence, label = prediction.probs.max(-1)
    confident = confidence.argsort(descending=True, stable=True)[: math.ceil(share * len(y))]
    return float((label == y)[confident].double().mean())
