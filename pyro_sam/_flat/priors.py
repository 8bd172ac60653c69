r"""The KL of a mean-field posterior from constant Normal priors, in closed form and without a temporary per term."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent

from pyro_sam._flat.vectors import FlatNormal
from pyro_sam._step.memory import Layout


class _Stretch(NamedTuple):
    """A stretch of the vectors whose elements have one prior: its loc and scale, and what tells it from others."""

    start: int
    stop: int
    loc: Any
    scale: Any
    key: tuple[Any, Any]


class NormalPriors:
    """Constant Normal priors of sites that lie one after the other in a vector, with scalar loc and scale.

    Args:
        layout: Where all sites lie.
        priors: Distributions by name of site.
    Attributes:
        others: Priors that are something else.
    """

    def __init__(self, layout: Layout, priors: Mapping[str, Any]) -> None:
        self.others: dict[str, Any] = {}
        self._places: list[_Stretch] = []
        start = 0
        for name, size in zip(layout.names, layout.sizes, strict=True):
            if name in priors:
                numbers = _scalars(priors[name])
                if numbers is None:
                    self.others[name] = priors[name]
                else:
                    key = numbers[0].data_ptr(), numbers[1].data_ptr()
                    self._places.append(_Stretch(start, start + size, *numbers, key))
            start += size
        # many priors are the same one
        by_place = {key: t for each in self._places for key, t in zip(each.key, each[2:4], strict=True)}
        self._places_in_memory, self._tensors = list(by_place), list(by_place.values())
        # NumPy has no bfloat16
        self._has_numbers = all(t.device.type == "cpu" and t.dtype != torch.bfloat16 for t in self._tensors)
        self._numbers: list[float] = []
        self._stretches: list[_Stretch] = []

    def kl(self, flat: FlatNormal) -> list[Tensor]:
        """Return the terms of the KL that the sites with such priors have, at what the priors are now.

        Of replicas each term has shape (R,).
        """
        stretches = self._now()
        # one split for all: the gradient of a slice would be a whole vector of zeros for each
        parts = [_split(vector, stretches) for vector in (flat.loc, flat.scale)]
        return [
            _NormalKL.apply(loc, scale, each.loc, each.scale)
            for loc, scale, each in zip(*parts, stretches, strict=True)
        ]

    def _now(self) -> list[_Stretch]:
        # read as numbers where they lie in the host's memory; a capture must see the tensors themselves
        if not self._has_numbers or torch._C._len_torch_dispatch_stack():
            return _joined(self._places)
        numbers = [tensor.numpy().item() for tensor in self._tensors]
        if numbers != self._numbers or not self._stretches:
            self._numbers, known = numbers, dict(zip(self._places_in_memory, numbers, strict=True))
            values = [(known[loc], known[scale]) for *_, (loc, scale) in self._places]
            self._stretches = _joined(
                [_Stretch(each.start, each.stop, *both, both) for each, both in zip(self._places, values, strict=True)]
            )
        return self._stretches


def _joined(stretches: Sequence[_Stretch]) -> list[_Stretch]:
    """Return stretches with neighbours of one prior as one."""
    found: list[_Stretch] = []
    for each in stretches:
        if found and (found[-1].stop, found[-1].key) == (each.start, each.key):
            found[-1] = found[-1]._replace(stop=each.stop)
        else:
            found.append(each)
    return found


def _split(vector: Tensor, stretches: Sequence[_Stretch]) -> list[Tensor]:
    """Return the parts of a vector, shape (d,) or (R, d), that stretches name in their order."""
    sizes, wanted, at = [], [], 0
    for start, stop, *_ in stretches:
        if start > at:
            sizes.append(start - at)
        wanted.append(len(sizes))
        sizes.append(stop - start)
        at = stop
    if at < vector.shape[-1]:
        sizes.append(vector.shape[-1] - at)
    parts = vector.split(sizes, -1) if len(sizes) > 1 else (vector,)
    return [parts[k] for k in wanted]


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
    r""":math:`\sum_i \log(s_0 / s_i) + (s_i^2 + (m_i - m_0)^2) / (2 s_0^2) - 1/2`, and its gradient.

    The sum runs over the last dimension. The prior's loc and scale are numbers, or tensors without dimensions.
    """

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, prior_loc: Any, prior_scale: Any) -> Tensor:
        ctx.save_for_backward(loc, scale)
        ctx.prior = prior_loc, prior_scale
        away = _less(loc, prior_loc)
        ratio = scale if _is(prior_scale, 1) else scale / prior_scale
        # element by element, so that a posterior close to its prior loses no digits
        minus = ratio.log().addcmul_(ratio, ratio, value=-0.5).add_(0.5)
        square = torch.dot(away, away) if away.dim() == 1 else torch.linalg.vecdot(away, away)
        return square * (0.5 / prior_scale**2) - minus.sum(-1)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None, None]:
        loc, scale = ctx.saved_tensors
        prior_loc, prior_scale = ctx.prior
        outer = outer.unsqueeze(-1) if outer.dim() else outer
        weight = outer if _is(prior_scale, 1) else outer / prior_scale**2
        return _less(loc, prior_loc) * weight, scale * weight - outer / scale, None, None


def _less(loc: Tensor, prior_loc: Any) -> Tensor:
    return loc if _is(prior_loc, 0) else loc - prior_loc


def _is(value: Any, number: float) -> bool:
    return not isinstance(value, Tensor) and value == number
