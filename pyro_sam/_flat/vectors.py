"""A mean-field Normal posterior as two vectors."""

import operator
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.distributions import transform_to

from pyro_sam._base.replicas import mark
from pyro_sam._flat.recorder import listeners
from pyro_sam._step.memory import Layout


@dataclass(frozen=True)
class FlatNormal:
    """Independent Normals of all sites of a guide, one after the other.

    Args:
        layout: Where each site lies.
        loc: Means, one vector, with the graph to the parameters; of replicas a row each, shape (R, d).
        scale: Standard deviations, likewise.
        is_frozen: Whether a parameter requires no gradient.
        roots: The vectors at which the graph begins, of loc and of what scale is made of; none where it begins at the
            guide's parameters.
    """

    layout: Layout
    loc: Tensor
    scale: Tensor
    is_frozen: bool = False
    roots: Sequence[Tensor] = ()

    def site(self, name: str) -> Any:
        """Return the distribution of one site."""
        index, sizes = self.layout.names.index(name), self.layout.sizes
        start, shape = sum(sizes[:index]), self.layout.shapes[index]
        loc, scale = (vector.narrow(0, start, sizes[index]).view(shape) for vector in (self.loc, self.scale))
        return dist.Normal(loc, scale, validate_args=False).to_event(len(shape))


class FlatParameters:
    """Where a mean-field guide keeps the loc and scale of its sites, to read them as two vectors.

    Its tensors are views of two vectors from the start. Where they are moved elsewhere, reading copies them.

    Args:
        sites: For each site, the module that has its loc and the one that has its scale, and their attribute.
        learn_scale: Whether scale is a parameter of its module, else a buffer.
        num_replicas: Number of replicas, the first dimension of every tensor; None for a single guide.
    """

    def __init__(
        self, sites: Mapping[str, tuple[Any, Any, str]], *, learn_scale: bool, num_replicas: int | None = None
    ) -> None:
        self._sites, self._num_replicas = tuple(sites), num_replicas
        locs = [(module, leaf) for module, _, leaf in sites.values()]
        self._owners = [*locs, *((module, leaf) for _, module, leaf in sites.values())]
        self._learn_scale = learn_scale
        # locs first, then scales: the names of those that are parameters, the tensors, and where they are in memory
        self._names: list[str] = []
        self._tensors: list[Tensor] = []
        self._layout = Layout(self._sites, (), 1)
        self._vectors: list[Tensor] = []
        self._pointers: list[int] = []
        self._pack()

    def read(self, *, graph: bool) -> FlatNormal | None:
        """Return the sites, and make the statements of their parameters; None if the param store has other ones.

        Args:
            graph: Whether the vectors have a graph to the parameters. Otherwise a graph begins at them, and
                :meth:`hand_out` takes their gradients to the parameters: a shorter way.
        """
        if not self._are_current() and not self._find():
            return None
        number = len(self._sites)
        if graph or any(any(map(hooks, self._tensors)) for hooks in _HOOKS):
            roots = []
            loc, rho = _join(self._tensors[:number]), _join(self._tensors[number:])
        else:
            roots = [loc, rho] = self._detached()
            loc.requires_grad_(torch.is_grad_enabled())
            rho.requires_grad_(torch.is_grad_enabled() and self._learn_scale)
        scale = transform_to(_constraint(self._owners[number]))(rho) if self._learn_scale else rho
        frozen = not all(tensor.requires_grad for tensor in self._tensors[: len(self._names)])
        by_replica = [self._by_replica(vector) for vector in (loc, scale)]
        flat = FlatNormal(self._layout, by_replica[0], by_replica[1], frozen, roots)
        if handlers := listeners():
            scales = _unflatten_dense_tensors(scale.detach(), self._tensors[number:]) if self._learn_scale else ()
            self._state(handlers, [*self._tensors[:number], *scales])
        return flat

    def hand_out(self, flat: FlatNormal) -> None:
        """Add the gradients of the vectors where the graph began to those of the parameters."""
        number = len(self._sites)
        for tensors, root in zip((self._tensors[:number], self._tensors[number:]), flat.roots, strict=False):
            if root.grad is None:
                continue
            # all views by one call
            for tensor, part in zip(tensors, _unflatten_dense_tensors(root.grad, tensors), strict=True):
                if tensor.requires_grad:
                    tensor.grad = part if tensor.grad is None else tensor.grad.add_(part)

    def _by_replica(self, vector: Tensor) -> Tensor:
        """Return a vector, site after site, as one row per replica."""
        if self._num_replicas is None:
            return vector
        sizes = [tensor.numel() for tensor in self._tensors[: len(self._sites)]]
        return torch.cat([part.view(self._num_replicas, -1) for part in vector.split(sizes)], -1)

    def _present(self) -> list[Any]:
        """Return the tensors, None for one that somebody put something else in the place of."""
        number = len(self._sites) * (2 if self._learn_scale else 1)
        parameters = [module._parameters.get(f"{leaf}_unconstrained") for module, leaf in self._owners[:number]]
        return parameters + [module._buffers.get(leaf) for module, leaf in self._owners[number:]]

    def _pack(self) -> None:
        tensors, number = self._present(), len(self._sites)
        if not _are_alike(tensors) or tensors[0].is_meta:
            return
        with torch.no_grad():
            self._vectors = [_join(group).clone() for group in (tensors[:number], tensors[number:])]
        for vector, group in zip(self._vectors, (tensors[:number], tensors[number:]), strict=True):
            for tensor, part in zip(group, vector.split([tensor.numel() for tensor in group]), strict=True):
                tensor.data = part.view(tensor.shape)
        self._pointers = [tensor.data_ptr() for tensor in tensors]

    def _are_current(self) -> bool:
        stored: Any = pyro.get_param_store()._params
        buffers = (
            []
            if self._learn_scale
            else [module._buffers.get(leaf) for module, leaf in self._owners[len(self._sites) :]]
        )
        # the store's tensors are those that count
        found = [*map(stored.get, self._names), *buffers]
        return len(found) == len(self._tensors) > 0 and all(map(operator.is_, found, self._tensors))

    def _find(self) -> bool:
        """Look for the tensors; return whether they are what the guide was set up with."""
        store: Any = pyro.get_param_store()
        tensors = self._present()
        if any(tensor is None for tensor in tensors):
            return False
        owners = self._owners if self._learn_scale else self._owners[: len(self._sites)]
        names = [f"{module._pyro_name}.{leaf}" for module, leaf in owners]
        for name, tensor, owner in zip(names, tensors, owners, strict=False):
            known = store._params.get(name) is tensor and type(store._constraints[name]) is type(_constraint(owner))
            if not known:
                return False
        if not _are_alike(tensors):
            return False
        self._names, self._tensors = names, tensors
        if self._num_replicas is not None:
            for tensor in tensors:
                mark(tensor, self._num_replicas)
        shapes = tuple(tensor.shape for tensor in tensors[: len(self._sites)])
        self._layout = Layout(self._sites, shapes, self._num_replicas or 1)
        return True

    def _detached(self) -> list[Tensor]:
        """Return loc and what scale is made of, without a graph; not copied if all is where it was in the beginning."""
        number = len(self._sites)
        # not so after a move, nor after a copy or a pickle, which come with vectors of their own
        in_place = self._pointers and [*map(Tensor.data_ptr, self._tensors)] == self._pointers
        if in_place and [*map(Tensor.data_ptr, self._vectors)] == self._pointers[::number]:
            return [vector.detach() for vector in self._vectors]
        with torch.no_grad():
            return [_join(group).detach() for group in (self._tensors[:number], self._tensors[number:])]

    def _state(self, handlers: Sequence[Any], values: Sequence[Any]) -> None:
        """Make the statements of the parameters, to traces."""
        named = {}
        for name, leaf, value in zip(self._names, self._tensors, values, strict=False):
            value.unconstrained = weakref.ref(leaf)
            named[name] = value
        state_parameters(handlers, named)


def state_parameters(handlers: Sequence[Any], values: Mapping[str, Any]) -> None:
    """Make the statements of parameters, to handlers that trace nothing else.

    Args:
        handlers: The handlers.
        values: Constrained values by name; each knows its unconstrained one.
    """
    for handler in handlers:
        for name, value in values.items():
            handler.trace.add_node(name, name=name, value=value, args=(name,), **_STATEMENT)


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    return len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1


def _constraint(owner: tuple[Any, str]) -> Any:
    module, leaf = owner
    return module._pyro_params[leaf][0]


# what a user may have asked autograd to call at a parameter
_HOOKS = operator.attrgetter("_backward_hooks"), operator.attrgetter("_post_accumulate_grad_hooks")


_STATEMENT: dict[str, Any] = {
    "type": "param", "fn": None, "is_observed": False, "kwargs": {}, "scale": 1.0, "mask": None,
    "cond_indep_stack": (), "done": True, "stop": False, "continuation": None, "infer": {},
}  # fmt: skip


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].flatten() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
