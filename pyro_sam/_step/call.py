"""One call of the estimator, as one value."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from pyro_sam._base.random_state import Streams
from pyro_sam._base.replicas import PerReplica, of_replica
from pyro_sam._base.surroundings import PLAIN


@dataclass(frozen=True)
class Call:
    """A model and a guide, and the arguments of both.

    Args:
        model: Called with ``args`` and ``kwargs``.
        guide: Likewise.
        args: Positional arguments.
        kwargs: Keyword arguments.
        streams: The random streams that its passes share, besides torch's default ones.
        modules: Modules that it may write to without calling them.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    streams: Streams = field(default_factory=Streams)
    modules: tuple[Any, ...] = ()

    @property
    def key(self) -> tuple[Hashable, Hashable]:
        """The functions themselves: ``obj.method`` is another object at each mention, and equal to itself."""
        return _key(self.model), _key(self.guide)

    def run_model(self) -> Any:
        """Run the model."""
        return self.model(*self.args, **self.kwargs)

    def run_guide(self) -> Any:
        """Run the guide."""
        return self.guide(*self.args, **self.kwargs)

    def with_functions(self, model: Callable[..., Any], guide: Callable[..., Any]) -> "Call":
        """Return the call with other functions, such as the same ones under a handler."""
        return replace(self, model=model, guide=guide)

    def of_replica(self, r: int) -> "Call":
        """Return the call with the arguments that a replica gets."""
        return replace(self, args=of_replica(self.args, r), kwargs=of_replica(dict(self.kwargs), r))

    def has_tensors(self) -> bool:
        """Return whether an argument is a tensor: data, most likely."""
        return any(isinstance(arg, Tensor) for arg in (*self.args, *self.kwargs.values()))

    def look(self) -> Hashable:
        """Return what a model may branch on of its arguments; never the same if that cannot be known."""
        if not self.kwargs and all(isinstance(arg, Tensor) for arg in self.args):
            return tuple([arg.shape for arg in self.args])
        leaves, spec = tree_flatten((self.args, dict(self.kwargs)))
        return repr(spec), *map(_look_of, leaves)

    def versions(self) -> list[int]:
        """Return how often each of its tensors was written to."""
        plain = not self.kwargs and all(isinstance(arg, Tensor) for arg in self.args)
        leaves = self.args if plain else tree_leaves((self.args, dict(self.kwargs)))
        return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]

    def objects(self) -> list[Any]:
        """Return the arguments that are neither tensors nor plain values: they may hold anything."""
        if not self.kwargs and all(isinstance(arg, Tensor) for arg in self.args):
            return []
        return [
            leaf
            for leaf in tree_leaves((self.args, dict(self.kwargs)))
            if not isinstance(leaf, (Tensor, PerReplica, *PLAIN))
        ]


def told_by(tensors: Iterable[Any]) -> tuple[Hashable, ...]:
    """Return what a model may branch on in tensors: flags and counters, and whether a single number is zero.

    Only those in the host's memory are read, at no wait for a device.
    """
    return tuple(
        bool(tensor) if tensor.is_floating_point() else tensor.item()
        for tensor in tensors
        if isinstance(tensor, Tensor) and tensor.numel() == 1 and tensor.device.type == "cpu"
    )


def _look_of(leaf: Any) -> Hashable:
    """Return what a model may branch on: of data their shape, of a plain value itself, of others nothing known."""
    if isinstance(leaf, PerReplica):
        leaf = leaf.values
    if isinstance(leaf, Tensor | np.ndarray):
        return isinstance(leaf, Tensor), tuple(leaf.shape), leaf.dtype
    return (type(leaf), leaf) if isinstance(leaf, PLAIN) else object()


def _key(function: Any) -> Hashable:
    return function if isinstance(function, Hashable) else id(function)
