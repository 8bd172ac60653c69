"""What operations of a capture need care: random draws that passes share, and values that Python reads."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
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
        self._drawn: dict[Hashable, tuple[list[Tensor], RandomState]] = {}

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
        if key not in self._drawn:
            result = func(*args, **kwargs)
            results = list(result) if isinstance(result, tuple) else [result]
            # copies: the step may go on to change what it drew
            self._drawn[key] = [each.clone() for each in results], RandomState.capture()
            return self._note(result)
        drawn, after = self._drawn[key]
        after.restore()
        if func._schema.is_mutable:
            return args[0].copy_(drawn[0])
        copies = [each.clone() for each in drawn]
        return self._note(tuple(copies) if len(copies) > 1 else copies[0])


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
