r"""A mean-field Normal posterior as two vectors, and its KL from Normal priors in closed form without temporaries."""

import operator
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Independent, transform_to

from pyro_sam import checks


@dataclass(frozen=True)
class FlatNormal:
    """Independent Normals of all sites of a guide, one after the other.

    Args:
        names: Names of the sites.
        shapes: Their shapes.
        loc: Means, one vector, with the graph to the parameters.
        scale: Standard deviations, likewise.
    """

    names: Sequence[str]
    shapes: Sequence[torch.Size]
    loc: Tensor
    scale: Tensor

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector's parts by site, as views."""
        parts = vector.split([shape.numel() for shape in self.shapes])
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def at(self, e: Tensor, *, detach_scale: bool = False) -> Tensor:
        """Return ``loc + scale * e``."""
        return torch.addcmul(self.loc, self.scale.detach() if detach_scale else self.scale, e)

    def site(self, name: str) -> Any:
        """Return the distribution of one site."""
        index = list(self.names).index(name)
        start, shape = sum(other.numel() for other in self.shapes[:index]), self.shapes[index]
        loc, scale = (vector.narrow(0, start, shape.numel()).view(shape) for vector in (self.loc, self.scale))
        return checks.trust(dist.Normal(loc, scale, validate_args=False)).to_event(len(shape))


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
        self._versions: list[tuple[Tensor, int]] = []
        start = 0
        for name, shape in zip(flat.names, flat.shapes, strict=True):
            stop = start + shape.numel()
            if name in priors:
                self._add(name, priors[name], start, stop)
            start = stop

    def is_current(self) -> bool:
        """Return whether nobody has written to the priors' parameters."""
        return all(tensor._version == version for tensor, version in self._versions)

    def kl(self, flat: FlatNormal) -> Tensor | float:
        """Return the KL of the sites with such priors, summed."""
        total: Tensor | float = 0.0
        for start, stop, loc, scale in self._ranges:
            whole = stop - start == len(flat.loc)
            q = [vector if whole else vector[start:stop] for vector in (flat.loc, flat.scale)]
            part: Any = _NormalKL.apply(*q, loc, scale)
            total = total + part
        return total

    def _add(self, name: str, prior: Any, start: int, stop: int) -> None:
        numbers = _scalars(prior)
        if numbers is None:
            self.others[name] = prior
            return
        loc, scale = numbers
        self._versions += [(tensor, tensor._version) for tensor in numbers]
        here = (start, stop, float(loc), float(scale))
        if self._ranges and self._ranges[-1][1:] == (start, *here[2:]):
            here = (self._ranges.pop()[0], *here[1:])
        self._ranges.append(here)


def _scalars(prior: Any) -> tuple[Tensor, Tensor] | None:
    """Return loc and scale of a Normal that has one of each for all of its elements, and no gradient to them."""
    while isinstance(prior, Independent):
        prior = prior.base_dist
    if type(prior) is not dist.Normal:
        return None
    found = []
    for tensor in (prior.loc, prior.scale):
        one = tensor.numel() > 0 and not any(stride for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
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
        weight = outer / prior_scale**2
        away = loc - prior_loc if prior_loc else loc
        return away * weight, scale * weight - outer / scale, None, None


class FlatParameters:
    """Where a mean-field guide keeps the loc and scale of its sites, to read them as two vectors.

    Args:
        sites: For each site, the module that has its loc and the one that has its scale, and their attribute.
        learn_scale: Whether scale is a parameter of its module, else a buffer.
    """

    def __init__(self, sites: Mapping[str, tuple[Any, Any, str]], *, learn_scale: bool) -> None:
        self._names = tuple(sites)
        self._locs = [(loc, leaf) for loc, _, leaf in sites.values()]
        self._scales = [(scale, leaf) for _, scale, leaf in sites.values()]
        self._learn_scale = learn_scale
        self._checked: list[Tensor] = []

    def read(self) -> FlatNormal | None:
        """Return the sites, and make the statements of their parameters; None if the param store has other ones."""
        locs = [module._parameters[f"{leaf}_unconstrained"] for module, leaf in self._locs]
        scales = [
            module._parameters[f"{leaf}_unconstrained"] if self._learn_scale else module._buffers[leaf]
            for module, leaf in self._scales
        ]
        owners = [*self._locs, *self._scales] if self._learn_scale else self._locs
        leaves = [*locs, *scales] if self._learn_scale else locs
        names = [f"{module._pyro_name}.{leaf}" for module, leaf in owners]
        store: Any = pyro.get_param_store()
        if not all(map(operator.is_, leaves, map(store._params.get, names))) or not _are_alike([*locs, *scales]):
            return None
        if len(self._checked) != len(leaves) or not all(map(operator.is_, leaves, self._checked)):
            if any(type(store._constraints[n]) is not type(_constraint(o)) for n, o in zip(names, owners, strict=True)):
                return None
            self._checked = leaves
        loc, scale = (torch.cat([part.flatten() for part in parts]) for parts in (locs, scales))
        if self._learn_scale:
            scale = transform_to(_constraint(self._scales[0]))(scale)
        flat = FlatNormal(self._names, [part.shape for part in locs], loc, scale)
        if _PYRO_STACK:
            shown = [*locs, *flat.split(scale).values()] if self._learn_scale else locs
            for name, leaf, value in zip(names, leaves, shown, strict=True):
                value.unconstrained = weakref.ref(leaf)
                _state(name, value)
        return flat


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0].dtype, tensors[0].device
    return all((tensor.dtype, tensor.device) == first for tensor in tensors)


def _constraint(owner: tuple[Any, str]) -> Any:
    module, leaf = owner
    return module._pyro_params[leaf][0]


def _state(name: str, value: Tensor) -> None:
    """Make the statement of a parameter, to handlers that only listen."""
    message: Any = {
        "type": "param", "name": name, "fn": None, "is_observed": False, "args": (name,), "kwargs": {"name": name},
        "value": value, "scale": 1.0, "mask": None, "cond_indep_stack": (), "done": True, "stop": False,
        "continuation": None, "infer": {},
    }  # fmt: skip
    for handler in _PYRO_STACK:
        handler._pyro_post_param(message)  # type: ignore[attr-defined]
