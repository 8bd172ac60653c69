"""What can be seen in a single thing: a function, a torch module, an object without a dictionary, an array."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from torch import nn

_FOREIGN = frozenset({"torch", "pyro", "numpy", "pyro_sam", *sys.stdlib_module_names} - {"__main__"})
_SMALL = 1 << 16  # bytes of an array
_SAMPLE = 4096  # elements of a larger one
BEHIND = ("fget", "func", "__func__", "__wrapped__")  # where functions lie in descriptors


def slots(kind: type) -> Iterator[str]:
    """Yield the names of the attributes that objects of a kind have outside of their dictionary."""
    for each in kind.__mro__:
        if not is_foreign(each.__module__):
            own = vars(each).get("__slots__", ())
            yield from (name for name in ([own] if isinstance(own, str) else own) if not name.startswith("__"))


def in_slots(item: Any) -> list[Any]:
    """Return what an object has outside of its dictionary."""
    return [getattr(item, name, None) for name in slots(type(item))]


def is_large(array: np.ndarray[Any, Any]) -> bool:
    """Return whether looking at all of an array would take too long at every step."""
    return array.nbytes > _SMALL


def content(array: np.ndarray[Any, Any]) -> bytes:
    """Return what is in an array, of a large one a sample."""
    if not is_large(array):
        return array.tobytes()
    if isinstance(array, np.memmap) or not (array.flags.c_contiguous or array.flags.f_contiguous):
        return b""
    return array.reshape(-1, order="A")[:: array.size // _SAMPLE + 1].tobytes()


def put_into(owner: dict[str, Any], names: list[str]) -> Callable[[int, Any], None]:
    """Return what puts the value of a place back into a dictionary."""

    def put(i: int, value: Any) -> None:
        if i < len(names) and names[i] is not NEW:
            owner[names[i]] = value

    return put


def of_module(module: nn.Module, names: Iterable[str]) -> list[Any]:
    """Return what a module holds, itself and in torch's collections."""
    own = vars(module)
    found = [len(own) if name is NEW else own.get(name) for name in names]
    for name in _COLLECTIONS:
        if held := own.get(name):
            found += held.values()
    return found


_COLLECTIONS = (
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip
NEW = "(number of attributes)"  # an attribute may hide one of the class
INTERNAL = frozenset(vars(nn.Module()))


def of_function(function: FunctionType, cells: Iterable[Any], places: Iterable[tuple[Any, str]]) -> list[Any]:
    """Return what a function holds and looks up: closure, globals, code, defaults and attributes."""
    found = [cell.cell_contents if _is_filled(cell) else None for cell in cells]
    found += [owner.get(name) for owner, name in places]
    found += [function.__code__, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*found, *vars(function).values()]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # raises where the variable is not set yet
    except ValueError:
        return False
    return True


def global_places(function: FunctionType) -> list[tuple[dict[str, Any], str]]:
    """Return where a function's global names are: in its globals, and in modules of the user's own among them."""
    names, known = _names(function.__code__), function.__globals__
    owners = [known, *(vars(value) for value in map(known.get, names) if _is_namespace(value))]
    return [(owner, name) for owner in owners for name in names if name in owner]


def _is_namespace(value: Any) -> bool:
    return isinstance(value, ModuleType) and not is_foreign(value.__name__)


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[str, ...]:
    """Return the names that code looks up, functions inside of it included."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(_names(constant)))
    return tuple(names)


def is_foreign(module: str | None) -> bool:
    """Return whether a module is of torch, Pyro, NumPy, the standard library or this package."""
    return (module or "").partition(".")[0] in _FOREIGN
