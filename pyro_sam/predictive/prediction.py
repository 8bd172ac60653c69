"""What :func:`~pyro_sam.predictive.streaming` returns: an equal mixture of the likelihoods of posterior samples."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from pyro_sam._base.arguments import finite
from pyro_sam._base.cures import value_range
from pyro_sam._step.sites import unwrap


@dataclass(frozen=True)
class SampledLikelihood:
    """The likelihood of one batch of data at one posterior sample, or at several that ran at once.

    Args:
        fn: The distribution.
        num_samples: How many samples ran at once; None for one that ran by itself, without a dimension for samples.
        batch_dim: Number of batch dimensions of one sample. With ``num_samples`` the batch shape of ``fn`` is
            ``(num_samples, 1, ..., 1)`` and then those.
        start: The first of the samples that count.
        stop: The one after the last of them; None for all.
    """

    fn: Any
    num_samples: int | None
    batch_dim: int
    start: int = 0
    stop: int | None = None

    def __len__(self) -> int:
        stop = (self.num_samples or 1) if self.stop is None else self.stop
        return stop - self.start

    def map(self, statistic: Callable[[Any], Tensor]) -> Tensor:
        """Return a statistic of the distribution, the samples along the first dimension."""
        values = statistic(self.fn)
        if values.is_floating_point() and torch.finfo(values.dtype).bits == 16:
            values = values.float()  # sums over samples would lose what digits there are
        if self.num_samples is None:
            return values[None]
        return values.flatten(0, len(self.fn.batch_shape) - 1 - self.batch_dim)[self.start : self.stop]

    def part(self, i: int, number: int) -> "SampledLikelihood":
        """Return the i-th of equal parts of the samples."""
        size = len(self) // number
        return replace(self, start=i * size, stop=(i + 1) * size)


class Prediction:
    r"""Equal mixture of the likelihoods of S posterior samples, for N data points.

    Statistics are of the mixture :math:`\frac1S \sum_s p(y \mid x, w_s)`. The shapes below are those of one data plate,
    ``(N, *event_shape)``; with plates around or inside it their dimensions stay where they are.

    Of a guide with replicas it is the mixture over all of them, a deep ensemble of posteriors, and :meth:`replica`
    gives the prediction of one.

    Args:
        batches: For each batch of data, its likelihoods at all posterior samples.
        data_dim: The batch dimension that the data points lie along, counted from the right: -1 or less.
        replicas: The same for each replica of the guide, whose likelihoods ``batches`` are; empty for a single guide.
    """

    def __init__(
        self,
        batches: list[list[SampledLikelihood]],
        data_dim: int = -1,
        replicas: Sequence[list[list[SampledLikelihood]]] = (),
    ) -> None:
        self.batches = batches
        self.data_dim = data_dim
        self._replicas = tuple(replicas)

    @property
    def num_replicas(self) -> int | None:
        """Number of the guide's replicas; None for a single guide."""
        return len(self._replicas) or None

    def replica(self, r: int) -> "Prediction":
        """Return the prediction of one replica.

        Args:
            r: Its number, from 0.
        Raises:
            ValueError: If there is no such replica.
        """
        if not self._replicas:
            raise ValueError("the prediction is that of a single guide, or of one replica: it has no others.")
        if isinstance(r, bool) or not isinstance(r, int) or not 0 <= r < len(self._replicas):
            raise ValueError(f"replica must be a whole number below {len(self._replicas)}, the replicas, got {r!r}.")
        return Prediction(self._replicas[r], self.data_dim)

    @property
    def num_samples(self) -> int:
        """Number S of posterior samples."""
        return sum(map(len, self.batches[0]))

    @property
    def probs(self) -> Tensor:
        r"""Posterior mean class probabilities :math:`\frac1S \sum_s p(y \mid x, w_s)`.

        Returns:
            Shape ``(N, classes)`` for Categorical, ``(N,)`` for Bernoulli.
        Raises:
            ValueError: If the likelihood has no class probabilities.
        """
        kind = unwrap(self.batches[0][0].fn)
        if not isinstance(kind, td.Categorical | td.Bernoulli | td.OneHotCategorical):
            raise ValueError(f"a {type(kind).__name__} likelihood has no class probabilities; use mean and variance.")
        return self._join([_mean(parts, _probs) for parts in self.batches])

    @property
    def mean(self) -> Tensor:
        r"""Mean of the mixture, :math:`\frac1S \sum_s E[y \mid x, w_s]`; shape ``(N, *event_shape)``.

        Raises:
            ValueError: If the likelihood is one of classes, which has none.
        """
        self._refuse_classes("mean")
        return self._join([_mean(parts, lambda fn: fn.mean) for parts in self.batches])

    @property
    def variance(self) -> Tensor:
        """Variance of the mixture: the mean of the variances plus the variance of the means.

        Raises:
            ValueError: If the likelihood is one of classes, which has none.
        """
        self._refuse_classes("variance")
        return self._join([_variance(parts) for parts in self.batches])

    def log_prob(self, y: Tensor) -> Tensor:
        r"""Return :math:`\log \frac1S \sum_s p(y_n \mid x_n, w_s)` for each data point.

        Args:
            y: Observations, shape ``(N, *event_shape)``.
        Returns:
            Shape ``(N,)``.
        Raises:
            ValueError: If ``y`` has another shape, or values that the likelihood cannot have.
        """
        return self.log_prob_per_sample(y).logsumexp(0) - math.log(self.num_samples)

    def log_prob_per_sample(self, y: Tensor) -> Tensor:
        r"""Return :math:`\log p(y_n \mid x_n, w_s)` for each posterior sample and data point.

        Args:
            y: Observations, shape ``(N, *event_shape)``.
        Returns:
            Shape ``(S, N)``.
        Raises:
            ValueError: If ``y`` has another shape, or values that the likelihood cannot have.
        """
        pieces = zip(self.batches, self._split(y), strict=True)
        return self._join([_stack(parts, partial(_log_prob, y=piece)) for parts, piece in pieces], leading=1)

    def cdf(self, y: Tensor) -> Tensor:
        r"""Return :math:`P(y \le y_n \mid x_n)`, of likelihoods that have a distribution function.

        Args:
            y: Observations, shape ``(N,)``.
        Returns:
            Shape ``(N,)``.
        Raises:
            ValueError: If the likelihood has no distribution function, or ``y`` another shape.
        """
        pieces = zip(self.batches, self._split(y), strict=True)
        with self._explained("distribution function (cdf)"):
            return self._join([_mean(parts, partial(_cdf, y=piece)) for parts, piece in pieces])

    def quantile(self, q: float) -> Tensor:
        r"""Return where the distribution function of the mixture is ``q``, by bisection.

        Args:
            q: Probability, between 0 and 1.
        Returns:
            Shape ``(N,)``.
        Raises:
            ValueError: If ``q`` is out of range, or the likelihood has no distribution function with an inverse.
        """
        if not 0 < finite("q", q) < 1:
            raise ValueError(f"q must be between 0 and 1, got q={q!r}.")
        with self._explained("distribution function with an inverse (icdf)"):
            return self._join([_quantile(parts, q) for parts in self.batches])

    def samples(self) -> Tensor:
        """Draw one observation from the likelihood at each posterior sample: draws of the posterior predictive.

        Returns:
            Shape ``(S, N, *event_shape)``.
        """
        with torch.no_grad():
            return self._join([_stack(parts, lambda fn: fn.sample()) for parts in self.batches], leading=1)

    def _refuse_classes(self, what: str) -> None:
        if isinstance(unwrap(self.batches[0][0].fn), td.Categorical):
            raise ValueError(f"a Categorical likelihood has no {what}; use probs.")

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except NotImplementedError as error:
            kind = type(unwrap(self.batches[0][0].fn)).__name__
            raise ValueError(f"a {kind} likelihood has no {what}; use samples().") from error

    def _join(self, statistics: list[Tensor], leading: int = 0) -> Tensor:
        """Put batches together; to the right of the batch dimensions are the event's, or the classes."""
        right = statistics[0].dim() - leading - self.batches[0][0].batch_dim
        return torch.cat(statistics, self.data_dim - right)

    def _split(self, y: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(y, Tensor) or y.is_complex():
            kind = type(y).__name__ if not isinstance(y, Tensor) else y.dtype
            raise ValueError(f"y must be a tensor of real observations, got {kind}: use torch.as_tensor(y).")
        fn, batch_dim = self.batches[0][0].fn, self.batches[0][0].batch_dim
        sizes = [parts[0].fn.batch_shape[self.data_dim] for parts in self.batches]
        dim = self.data_dim - len(fn.event_shape)
        shape = [*fn.batch_shape[len(fn.batch_shape) - batch_dim :], *fn.event_shape]
        shape[dim] = sum(sizes)
        if y.shape != torch.Size(shape):
            raise ValueError(
                f"y must have one row per predicted data point, so shape {tuple(shape)}, got shape {tuple(y.shape)}."
            )
        return y.split(sizes, dim)


def _stack(parts: list[SampledLikelihood], statistic: Callable[[Any], Tensor]) -> Tensor:
    return torch.cat([part.map(statistic) for part in parts])


def _mean(parts: list[SampledLikelihood], statistic: Callable[[Any], Tensor]) -> Tensor:
    """Return the mean over samples, which are not stacked."""
    total: Any = sum(part.map(statistic).sum(0) for part in parts)
    return total / sum(map(len, parts))


def _probs(fn: Any) -> Tensor:
    kind = unwrap(fn)
    probs: Tensor = kind.probs
    if torch.finfo(probs.dtype).bits > 16:
        return probs
    logits: Tensor = kind.logits.float()  # as rounded as they are, but of probabilities that add up to 1
    return logits.sigmoid() if isinstance(kind, td.Bernoulli) else logits.softmax(-1)


def _variance(parts: list[SampledLikelihood]) -> Tensor:
    mean = _mean(parts, lambda fn: fn.mean)
    within = _mean(parts, lambda fn: fn.variance)
    # by differences: a mean of squares minus the squared mean loses all digits where the mean is large
    between: Any = sum((part.map(lambda fn: fn.mean) - mean).square().sum(0) for part in parts)
    return within + between / sum(map(len, parts))


def _log_prob(fn: Any, y: Tensor) -> Tensor:
    try:
        log_prob: Tensor = fn.log_prob(y)
    except (ValueError, RuntimeError, IndexError) as error:
        raise ValueError(_no_observations(fn, y)) from error
    return log_prob


def _no_observations(fn: Any, y: Tensor) -> str:
    kind = type(unwrap(fn)).__name__
    return (
        f"y must hold observations that the {kind} likelihood can have, got dtype {y.dtype} on {y.device}"
        f"{value_range(y)}."
    )


def _quantile(parts: list[SampledLikelihood], q: float) -> Tensor:
    # between the smallest and the largest of the samples' own
    own = _stack(parts, lambda fn: fn.icdf(fn.mean.new_tensor(q)))
    low, high = own.amin(0), own.amax(0)
    for _ in range(60):
        middle = (low + high) / 2
        below = _mean(parts, partial(_cdf, y=middle)) < q
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _cdf(fn: Any, y: Tensor) -> Tensor:
    try:
        cdf: Tensor = fn.cdf(y)
    except NotImplementedError:
        raise
    except (ValueError, RuntimeError) as error:
        raise ValueError(_no_observations(fn, y)) from error
    return cdf
