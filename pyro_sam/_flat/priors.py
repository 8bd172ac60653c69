r"""The KL of a mean-field posterior from constant Normal priors, in closed form and without a temporary per term."""

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent

from pyro_sam._flat.vectors import FlatNormal


class NormalPriors:
    """Constant Normal priors of sites that lie one after the other in a vector, with scalar loc and scale.

    Args:
        flat: The posterior.
        priors: Distributions by name of site.
    Attributes:
        others: Priors that are something else.
    """

    def __init__(self, flat: FlatNormal, priors: Mapping[str, Any]) -> None:
        self.others: dict[str, Any] = {}
        self._ranges: list[tuple[int, int, float, float]] = []
        self._versions: dict[int, tuple[Tensor, int]] = {}  # by place in memory: many priors are the same one
        start = 0
        for name, size in zip(flat.names, flat.sizes, strict=True):
            stop = start + size
            if name in priors:
                self._add(name, priors[name], start, stop)
            start = stop

    def is_current(self) -> bool:
        """Return whether nobody has written to the priors' parameters."""
        return all(tensor._version == version for tensor, version in self._versions.values())

    def kl(self, flat: FlatNormal) -> list[Tensor]:
        """Return the terms of the KL that the sites with such priors have."""
        terms = []
        for start, stop, loc, scale in self._ranges:
            whole = stop - start == len(flat.loc)
            q = [vector if whole else vector[start:stop] for vector in (flat.loc, flat.scale)]
            terms.append(_NormalKL.apply(*q, loc, scale))
        return terms

    def _add(self, name: str, prior: Any, start: int, stop: int) -> None:
        numbers = _scalars(prior)
        if numbers is None:
            self.others[name] = prior
            return
        loc, scale = numbers
        self._versions.update((tensor.data_ptr(), (tensor, tensor._version)) for tensor in numbers)
        here = (start, stop, float(loc), float(scale))
        if self._ranges and self._ranges[-1][1:] == (start, *here[2:]):
            here = (self._ranges.pop()[0], *here[1:])
        self._ranges.append(here)


def is_expanded(fn: Any, prior: Any) -> bool:
    """Return whether ``fn`` is a Normal prior with one loc and one scale, or that prior expanded in a plate."""
    if fn is prior:
        return True
    here, there = _scalars(fn), _scalars(prior)
    if here is None or there is None or fn.event_shape != prior.event_shape:
        return False
    return all(a.data_ptr() == b.data_ptr() for a, b in zip(here, there, strict=True))


def _scalars(prior: Any) -> tuple[Tensor, Tensor] | None:
    """Return loc and scale of a Normal that has one of each for all of its elements, and no gradient to them."""
    while isinstance(prior, Independent):
        prior = prior.base_dist
    if type(prior) is not dist.Normal:
        return None
    found = []
    for tensor in (prior.loc, prior.scale):
        one = tensor.numel() > 0 and not any(
            stride for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1
        )
        if not one or tensor.requires_grad or tensor.is_inference() or tensor.is_meta:
            return None
        found.append(tensor[(0,) * tensor.dim()])
    return found[0], found[1]


class _NormalKL(torch.autograd.Function):
    r""":math:`\sum_i \log(s_0 / s_i) + (s_i^2 + (m_i - m_0)^2) / (2 s_0^2) - 1/2`, and its gradient."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, prior_loc: float, prior_scale: float) -> Tensor:
        ctx.save_for_backward(loc, scale)
        ctx.prior = prior_loc, prior_scale
        away = loc - prior_loc if prior_loc else loc
        ratio = scale / prior_scale if prior_scale != 1 else scale
        # element by element, so that a posterior close to its prior loses no digits
        minus = ratio.log().addcmul_(ratio, ratio, value=-0.5).add_(0.5)
        return torch.dot(away, away) * (0.5 / prior_scale**2) - minus.sum()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None, None]:
        loc, scale = ctx.saved_tensors
        prior_loc, prior_scale = ctx.prior
        weight = outer / prior_scale**2 if prior_scale != 1 else outer
        away = loc - prior_loc if prior_loc else loc
        return away * weight, scale * weight - outer / scale, None, None
