r"""The best constant prediction: what a model says that has seen the observations, and no input."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch import distributions as td


def best_constant(fn: Any, value: Tensor, weight: Tensor) -> Tensor | None:
    r"""Return the log probabilities of observations under the best distribution that is the same for all of them.

    .. math:: \max_\theta \sum_n w_n \log p(y_n \mid \theta)

    Event coordinates, as the pixels of an image, have a parameter each. A Normal whose scale is one number, for all
    observations, keeps it: it is the model's, given or learnt.

    Args:
        fn: Distribution of the observations; its family counts, and a Normal's scale.
        value: Observations, shape ``batch_shape + event_shape``.
        weight: Weight of each, shape ``batch_shape``.
    Returns:
        Log probabilities, shape ``batch_shape``; None for a family whose best constant has no closed form here.
    """
    core, events = fn, 0
    while isinstance(core, td.Independent | MaskedDistribution | ExpandedDistribution):
        events += getattr(core, "reinterpreted_batch_ndims", 0)
        core = core.base_dist
    family = next((family for family in _FAMILIES if isinstance(core, family)), None)
    if family is None:
        return None
    batch = tuple(range(len(fn.batch_shape)))
    weight = weight.reshape(weight.shape + (1,) * (value.dim() - len(batch)))

    def mean(statistic: Tensor) -> Tensor:
        total = (weight * statistic).sum(batch, keepdim=True)
        return total / weight.sum(batch, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)

    log_prob = _FAMILIES[family](core, value, mean)
    return log_prob.sum(tuple(range(len(batch), log_prob.dim()))) if events else log_prob


Mean = Callable[[Tensor], Tensor]


def _normal(core: Any, value: Tensor, mean: Mean) -> Tensor:
    loc = mean(value)
    scale = core.scale
    if scale.numel() > 1 and bool((scale != scale.flatten()[0]).any()):
        # of observations that are all one the likelihood has no bound
        scale = mean((value - loc).square()).sqrt().clamp(min=1e-6)
    return td.Normal(loc, scale, validate_args=False).log_prob(value)


def _categorical(core: Any, value: Tensor, mean: Mean) -> Tensor:
    one_hot = torch.nn.functional.one_hot(value.long(), core.probs.shape[-1]).to(core.probs)
    shares = torch.stack([mean(one_hot[..., k]) for k in range(one_hot.shape[-1])], -1)
    return (one_hot * shares.clamp(min=_TINY).log()).sum(-1)


def _one_hot(core: Any, value: Tensor, mean: Mean) -> Tensor:
    return (value * mean(value).clamp(min=_TINY).log()).sum(-1)


def _bernoulli(core: Any, value: Tensor, mean: Mean) -> Tensor:
    p = mean(value)
    return value * p.clamp(min=_TINY).log() + (1 - value) * (1 - p).clamp(min=_TINY).log()


def _poisson(core: Any, value: Tensor, mean: Mean) -> Tensor:
    rate = mean(value)
    return value * rate.clamp(min=_TINY).log() - rate - (value + 1).lgamma()


_TINY = 1e-30
_FAMILIES: dict[Any, Callable[[Any, Tensor, Mean], Tensor]] = {
    td.Normal: _normal,
    td.Categorical: _categorical,
    td.OneHotCategorical: _one_hot,
    td.Bernoulli: _bernoulli,
    td.Poisson: _poisson,
}
