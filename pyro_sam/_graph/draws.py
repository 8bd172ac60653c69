"""What operations of a capture need care: random draws that passes share, and values that Python reads."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pyro_sam._base.random_state import RandomState


class CannotCapture(RuntimeError):
    """A step that is no fixed graph of tensor operations; the message says why."""


class Operations(TorchDispatchMode):
    """Gives a draw from a random state that was met before the tensor that was drawn then.

    A step rewinds the random stream for its second pass. In a graph there is no such rewinding: the second pass must
    use the first one's tensors. Operations whose result Python sees, or whose shape depends on values, are no part of a
    graph.

    Attributes:
        reads: Tensors that were there before and that Python read a number from, with the number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[Tensor, Any]] = []
        self._made: Any = WeakIdKeyDictionary()
        self._drawn: dict[Hashable, _Drawn] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            return self._draw(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._read(func, args[0])
        if _has_open_shape(func, args):
            raise CannotCapture("the shape of a tensor in it depends on values, as where a mask picks rows")
        if torch.Tag.data_dependent_output in func.tags:
            raise CannotCapture(f"its structure depends on the values of tensors ({func})")
        return self._note(func(*args, **kwargs))

    def _note(self, result: Any) -> Any:
        for each in result if isinstance(result, list | tuple) else [result]:
            if isinstance(each, Tensor):
                self._made[each] = True
        return result

    def _read(self, func: Any, tensor: Tensor) -> Any:
        value = func(tensor)  # make_fx refuses what depends on the graph's inputs
        if tensor in self._made:
            raise CannotCapture("its structure depends on the values of tensors")
        self.reads.append((tensor, value))
        return value

    def _draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("generator") is not None:
            raise CannotCapture("it draws from a generator of its own")
        key = func, RandomState.capture().fingerprint()
        known, depends_on = self._drawn.get(key), _values_of(func, args, kwargs)
        if known is None:
            result = func(*args, **kwargs)
            after = RandomState.capture()
            if after.fingerprint() != key[1]:  # attention without dropout, say, draws nothing
                results = list(result) if isinstance(result, tuple) else [result]
                # copies: the step may go on to change what it drew
                self._drawn[key] = _Drawn([each.clone() for each in results], after, depends_on)
            return self._note(result)
        if len(depends_on) != len(known.depends_on) or not all(map(_is_one, depends_on, known.depends_on)):
            raise CannotCapture(f"it draws random numbers that depend on what differs between its passes ({func})")
        known.after.restore()
        if func._schema.is_mutable:
            return args[0].copy_(known.results[0])
        copies = [each.clone() for each in known.results]
        return self._note(tuple(copies) if len(copies) > 1 else copies[0])


class _Drawn(NamedTuple):
    """What was drawn, the random state after it, and the tensors whose values it depends on, each with its version."""

    results: list[Tensor]
    after: RandomState
    depends_on: list[tuple[Tensor, int]]


def _values_of(func: Any, args: Any, kwargs: Any) -> list[tuple[Tensor, int]]:
    """Return the tensors whose values a draw depends on: not what it fills, or takes the shape of."""
    name, overload = func._schema.name.removeprefix("aten::"), func._schema.overload_name
    others = args[1:] if name in _FILLS or (name, overload) == ("bernoulli", "p") else args
    return [(each, each._version) for each in tree_leaves((others, kwargs)) if isinstance(each, Tensor)]


_FILLS = frozenset({
    "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "rand_like", "randint_like",
    "randn_like", "random_", "uniform_",
})  # fmt: skip


def _is_one(now: tuple[Tensor, int], then: tuple[Tensor, int]) -> bool:
    return now[0] is then[0] and now[1] == then[1]


class NoReading(TorchFunctionMode):
    """Refuses to hand the content of tensors to Python or NumPy, which operations do not see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READERS:
            raise CannotCapture(f"it reads the content of a tensor by {func.__name__}")
        return func(*args, **(kwargs or {}))


_READERS = frozenset({"tolist", "numpy", "__array__", "__dlpack__"})


def _has_open_shape(func: Any, args: Any) -> bool:
    if func in (torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_index.Tensor):
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return torch.Tag.dynamic_output_shape in func.tags
