"""The posterior predictive, streamed: one posterior sample at a time, so that no stack of weights is ever held."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch import distributions as td

from pyro_sam.noise import ReplayMessenger, unwrap
from pyro_sam.rng import RandomState, rewound


class Prediction:
    r"""Equal mixture of the likelihoods of S posterior samples, for N data points.

    Args:
        likelihoods: For each batch of data, the likelihood at each posterior sample; batch shape ``(n,)`` each.
    """

    def __init__(self, likelihoods: list[list[Any]]) -> None:
        self.likelihoods = likelihoods

    @property
    def probs(self) -> Tensor:
        r"""Posterior mean class probabilities :math:`\frac1S \sum_s p(y \mid x, w_s)`.

        Returns:
            Shape ``(N, classes)`` for Categorical, ``(N,)`` for Bernoulli.
        Raises:
            ValueError: If the likelihood has no class probabilities.
        """
        kind = unwrap(self.likelihoods[0][0])
        if not hasattr(kind, "probs") or not isinstance(kind, td.Categorical | td.Bernoulli | td.OneHotCategorical):
            raise ValueError(f"a {type(kind).__name__} likelihood has no class probabilities; use mean and variance.")
        return self._average(lambda fn: unwrap(fn).probs)

    @property
    def mean(self) -> Tensor:
        r"""Mean of the mixture, :math:`\frac1S \sum_s E[y \mid x, w_s]`; shape ``(N, *event_shape)``."""
        return self._average(lambda fn: fn.mean)

    @property
    def variance(self) -> Tensor:
        """Variance of the mixture: the mean of the variances plus the variance of the means."""
        mean = self.mean
        return self._average(lambda fn: fn.variance) + self._average(lambda fn: fn.mean**2) - mean**2

    def log_prob(self, y: Tensor) -> Tensor:
        r"""Return :math:`\log \frac1S \sum_s p(y_n \mid x_n, w_s)` for each data point.

        Args:
            y: Observations, shape ``(N, *event_shape)``.
        Returns:
            Shape ``(N,)``.
        """
        sizes = [fns[0].batch_shape[-1] for fns in self.likelihoods]
        if len(y) != sum(sizes):
            raise ValueError(f"y must have one row per predicted data point, {sum(sizes)}, got {len(y)}.")
        pairs = zip(self.likelihoods, y.split(sizes), strict=True)
        parts = [
            torch.stack([fn.log_prob(part) for fn in fns]).logsumexp(0) - math.log(len(fns)) for fns, part in pairs
        ]
        return torch.cat(parts)

    def _average(self, statistic: Callable[[Any], Tensor]) -> Tensor:
        def mean(fns: list[Any]) -> Tensor:
            total = statistic(fns[0]).clone()
            for fn in fns[1:]:
                total += statistic(fn)
            return total / len(fns)

        return torch.cat([mean(fns) for fns in self.likelihoods])


@torch.no_grad()
def predict(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 32,
    batch_size: int | None = None,
    site: str = "obs",
) -> Prediction:
    """Return the posterior predictive of a model at new data.

    The guide is sampled ``num_samples`` times and the model run at each sample, unconditioned. Only the likelihoods
    are kept, not the weights: memory grows with ``num_samples`` times the outputs.

    Args:
        model: Pyro model; called with ``args``, so without the observations.
        guide: Its guide.
        *args: Arguments of both. Tensors among them are data, rows along the first dimension.
        num_samples: Number of posterior samples, at least 1.
        batch_size: Number of rows per run; None for all at once. Every batch sees the same posterior samples.
        site: Name of the observed site.
    Returns:
        The mixture of the likelihoods.
    Raises:
        ValueError: If a number is not positive, or the model has no such site.
    """
    for name, value in (("num_samples", num_samples), ("batch_size", 1 if batch_size is None else batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {name}={value!r}.")
    batches = list(_batches(args, batch_size))
    likelihoods: list[list[Any]] = [[] for _ in batches]
    for _ in range(num_samples):
        start = RandomState.capture()
        for number, batch in enumerate(batches):
            if number == 0:
                likelihoods[number].append(_likelihood(model, guide, batch, site))
            else:
                # the same random numbers, so the same weights
                with rewound(start):
                    likelihoods[number].append(_likelihood(model, guide, batch, site))
    return Prediction(likelihoods)


def _likelihood(model: Callable[..., Any], guide: Callable[..., Any], batch: tuple[Any, ...], site: str) -> Any:
    values = poutine.trace(guide).get_trace(*batch)
    with ReplayMessenger(values.nodes, {}, free=site):
        trace = poutine.trace(model).get_trace(*batch)
    if site not in trace.nodes:
        sites = ", ".join(name for name, node in trace.nodes.items() if node["type"] == "sample")
        raise ValueError(f"the model has no site '{site}'; its sites are {sites}. Name the observed one by site=.")
    fn: Any = trace.nodes[site]["fn"]
    if not fn.batch_shape:
        raise ValueError(
            f"site '{site}' has no batch dimension to tell data points apart (its event shape is "
            f"{tuple(fn.event_shape)}). Sample it inside pyro.plate, without to_event over the data."
        )
    return fn


def _batches(args: tuple[Any, ...], batch_size: int | None) -> Iterator[tuple[Any, ...]]:
    rows = max((len(arg) for arg in args if isinstance(arg, Tensor) and arg.dim()), default=0)
    if batch_size is None or rows <= batch_size:
        yield args
        return
    for start in range(0, rows, batch_size):
        yield tuple(
            arg[start : start + batch_size] if isinstance(arg, Tensor) and arg.dim() and len(arg) == rows else arg
            for arg in args
        )
