"""What a function can see besides its arguments: closures, globals, objects, modules; and whether any of it changed.

Only what Python shows is found: a number that a function reads off a file, say, is not.
"""

import argparse
import collections
import functools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_sam._base.random_state import is_generator

# by value: they are equal where they are not the same object
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_FOREIGN = frozenset({"torch", "pyro", "numpy", "pyro_sam", *sys.stdlib_module_names} - {"__main__"})
_LIMIT = 2000  # things looked at
_LONG = 256  # entries of a collection
_SMALL = 1 << 16  # bytes of an array
_SAMPLE = 4096  # elements of a larger one


class _Part(NamedTuple):
    """Something that holds values: how to read them, what they were, and how to put one back."""

    read: Callable[[], list[Any]]
    known: list[Any]
    put: Callable[[int, Any], None] | None


class Surroundings:
    """What some functions and objects can see.

    Args:
        roots: The functions and objects.
    Attributes:
        modules: The torch modules among it.
        tensors: The tensors among it, those that modules hold aside.
        generators: The random streams among it.
    """

    def __init__(self, *roots: Any) -> None:
        self.modules: list[nn.Module] = []
        self.generators: list[Any] = []
        self.tensors: list[Tensor] = []
        self._parts: dict[int, _Part] = {}  # by what they belong to
        self._arrays: list[tuple[np.ndarray[Any, Any], bytes]] = []
        self._seen: dict[int, Any] = {}
        self._todo: list[Any] = list(roots)
        self._besides: tuple[Surroundings, list[_Part]] | None = None
        while self._todo and len(self._seen) < _LIMIT:
            item = self._todo.pop()
            if not isinstance(item, PLAIN) and id(item) not in self._seen:
                self._seen[id(item)] = self._visited = item
                self._visit(item)
        del self._todo, self._visited

    def is_same(self, besides: "Surroundings | None" = None) -> bool:
        """Return whether everything is what it was.

        Args:
            besides: Another look that was just found to be the same: what both hold is not looked at again.
        """
        parts = self._parts.values() if besides is None else self._not_in(besides)
        return all(map(_is_part_same, parts)) and all(_content(a) == known for a, known in self._arrays)

    def _not_in(self, other: "Surroundings") -> list[_Part]:
        """Return the parts that another look does not hold, or holds with other values."""
        if self._besides is None or self._besides[0] is not other:
            known = other._parts
            rest = [part for key, part in self._parts.items() if key not in known or not _are_one(part, known[key])]
            self._besides = other, rest
        return self._besides[1]

    def acts_as(self, other: "Surroundings") -> bool:
        """Return whether the functions, modules and random streams are those of another look; data may differ."""
        return self._actors() == other._actors()

    def _actors(self) -> set[int]:
        kinds = (FunctionType, nn.Module)
        return {key for key, item in self._seen.items() if isinstance(item, kinds) or is_generator(item)}

    def restore(self) -> None:
        """Put plain values back, such as a counter of runs."""
        for read, known, put in self._parts.values():
            values = read()
            if put is None or len(values) != len(known):
                continue
            for i, (value, was) in enumerate(zip(values, known, strict=True)):
                if value is not was and isinstance(was, PLAIN):
                    put(i, was)

    def _visit(self, item: Any) -> None:
        if is_generator(item):
            self.generators.append(item)
            return
        for kinds, visit in self._VISITS:
            if isinstance(item, kinds):
                visit(self, item)
                return
        if not _is_foreign(type(item).__module__):
            self._visit_object(item)

    def _visit_module(self, item: nn.Module) -> None:
        self.modules.append(item)
        foreign = _is_foreign(type(item).__module__)
        # torch's and Pyro's modules note things for themselves
        names = [
            n for n, v in vars(item).items() if not (foreign and (n.startswith("_") or isinstance(v, dict | list)))
        ]
        names += [] if foreign else [_NEW]
        if isinstance(item, AutoGuide):  # made anew at each run
            names = [name for name in names if name != "plates"]
        self._add(_Part(read := functools.partial(_of_module, item, names), read(), _put_into(vars(item), names)))
        self._todo += [each for each in item._modules.values() if each is not None]
        if not foreign:
            self._todo += [vars(item)[name] for name in names if name is not _NEW and name not in _INTERNAL]
            self._todo.append(type(item))
        if priors := vars(item).get("_pyro_samples"):  # of Pyro's PyroModule
            self._todo.append(priors)

    def _visit_tensor(self, item: Tensor) -> None:
        """What is in a tensor is seen where it is used."""
        self.tensors.append(item)
        self._watch(lambda: [item.requires_grad, item.dtype])

    def _visit_array(self, item: Any) -> None:
        self._arrays.append((item, _content(item)))

    def _visit_method(self, item: Any) -> None:
        self._todo += [item.__self__, getattr(item, "__func__", None)]

    def _visit_partial(self, item: Any) -> None:
        self._watch(lambda: [item.func, *item.args, *item.keywords.values()])

    def _visit_descriptor(self, item: Any) -> None:
        """Look behind a property, a static method and the like, at the functions in it."""
        self._todo += [getattr(item, name, None) for name in _BEHIND]

    def _visit_context_variable(self, item: ContextVar[Any]) -> None:
        self._watch(lambda: [item.get(None)])

    def _visit_function(self, item: FunctionType) -> None:
        if not _is_foreign(item.__module__) or item.__closure__:
            cells, places = _cells(item), _global_places(item)

            def put(i: int, value: Any) -> None:
                if i < len(cells):
                    cells[i].cell_contents = value
                elif i < len(cells) + len(places):
                    owner, name = places[i - len(cells)]
                    owner[name] = value

            self._watch(functools.partial(_of_function, item, cells, places), put)

    def _visit_dict(self, item: Any) -> None:
        keys = list(item)
        self._watch_entries(item, lambda: list(item.values()), lambda i, value: item.__setitem__(keys[i], value))

    def _visit_list(self, item: list[Any]) -> None:
        self._watch_entries(item, lambda: list(item), item.__setitem__)

    def _visit_entries(self, item: Any) -> None:
        self._watch_entries(item, lambda: list(item), None)

    def _visit_type(self, item: type) -> None:
        if not _is_foreign(item.__module__):
            self._watch(lambda: list(vars(item).values()))
            self._todo += item.__bases__

    def _visit_object(self, item: Any) -> None:
        names = [*getattr(item, "__dict__", ()), *slots(type(item))]

        def put(i: int, value: Any) -> None:
            object.__setattr__(item, names[i], value)

        if names:
            self._watch(lambda: [*getattr(item, "__dict__", {}).values(), *_inslots(item)], put)
        self._todo.append(type(item))

    def _watch_entries(self, item: Any, read: Callable[[], list[Any]], put: Any) -> None:
        if not _is_foreign(type(item).__module__):  # a user's own kind of collection has attributes, too
            self._visit_object(item)
        self._watch(*((lambda: [len(item)], None) if len(item) > _LONG else (read, put)))

    def _watch(self, read: Callable[[], list[Any]], put: Callable[[int, Any], None] | None = None) -> None:
        self._add(part := _Part(read, read(), put))
        self._todo += part.known

    def _add(self, part: _Part) -> None:
        key = id(self._visited)
        self._parts[key if key not in self._parts else -key] = part  # a user's own collection has two

    _VISITS: tuple[tuple[Any, Any], ...] = (
        (nn.Module, _visit_module),
        (Tensor, _visit_tensor),
        (np.ndarray, _visit_array),
        ((MethodType, BuiltinMethodType), _visit_method),
        (functools.partial, _visit_partial),
        (FunctionType, _visit_function),
        (ContextVar, _visit_context_variable),
        ((property, staticmethod, classmethod, functools.cached_property), _visit_descriptor),
        (functools._lru_cache_wrapper, _visit_descriptor),
        ((dict, collections.UserDict), _visit_dict),
        (list, _visit_list),
        ((tuple, set, frozenset, collections.deque, collections.UserList), _visit_entries),
        (type, _visit_type),
        ((Messenger, Distribution, Transform, SimpleNamespace, argparse.Namespace), _visit_object),
    )


def _are_one(part: _Part, other: _Part) -> bool:
    return len(part.known) == len(other.known) and all(map(operator.is_, part.known, other.known))


def _is_part_same(part: _Part) -> bool:
    values, known = part.read(), part.known
    if len(values) != len(known):
        return False
    return all(map(operator.is_, values, known)) or all(map(_alike, values, known))


def _alike(value: Any, known: Any) -> bool:
    """Return whether two values are one, equal and plain, or hold the same ones."""
    if value is known:
        return True
    if type(value) is not type(known):
        return False
    if isinstance(value, dict):
        return value.keys() == known.keys() and all(value[key] is known[key] for key in value)
    if isinstance(value, list | tuple):
        return len(value) == len(known) and all(map(operator.is_, value, known))
    return isinstance(value, PLAIN) and bool(value == known)


_BEHIND = ("fget", "func", "__func__", "__wrapped__")


def slots(kind: type) -> Iterator[str]:
    """Yield the names of the attributes that objects of a kind have outside of their dictionary."""
    for each in kind.__mro__:
        if not _is_foreign(each.__module__):
            slots = vars(each).get("__slots__", ())
            yield from (name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__"))


def _inslots(item: Any) -> list[Any]:
    return [getattr(item, name, None) for name in slots(type(item))]


def _content(array: np.ndarray[Any, Any]) -> bytes:
    """Return what is in an array: of a large one a sample, as all of it would take too long at every step."""
    if array.nbytes <= _SMALL:
        return array.tobytes()
    if isinstance(array, np.memmap) or not (array.flags.c_contiguous or array.flags.f_contiguous):
        return b""
    return array.reshape(-1, order="A")[:: array.size // _SAMPLE + 1].tobytes()


def _put_into(owner: dict[str, Any], names: list[str]) -> Callable[[int, Any], None]:
    def put(i: int, value: Any) -> None:
        if i < len(names) and names[i] is not _NEW:
            owner[names[i]] = value

    return put


def _of_module(module: nn.Module, names: Iterable[str]) -> list[Any]:
    """Return what a module holds, itself and in torch's collections."""
    own = vars(module)
    found = [len(own) if name is _NEW else own.get(name) for name in names]
    for name in _COLLECTIONS:
        if held := own.get(name):
            found += held.values()
    return found


_COLLECTIONS = (
    "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip
_NEW = "(number of attributes)"  # an attribute may hide one of the class
_INTERNAL = frozenset(vars(nn.Module()))


def _of_function(function: FunctionType, cells: Iterable[Any], places: Iterable[tuple[Any, str]]) -> list[Any]:
    found = [cell.cell_contents if _is_filled(cell) else None for cell in cells]
    found += [owner.get(name) for owner, name in places]
    found += [function.__code__, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*found, *vars(function).values()]


def _cells(function: FunctionType) -> list[Any]:
    return list(function.__closure__ or ())


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # raises where the variable is not set yet
    except ValueError:
        return False
    return True


def _global_places(function: FunctionType) -> list[tuple[dict[str, Any], str]]:
    """Return where a function's global names are: in its globals, and in modules of the user's own among them."""
    names, known = _names(function.__code__), function.__globals__
    owners = [known, *(vars(value) for value in map(known.get, names) if _is_namespace(value))]
    return [(owner, name) for owner in owners for name in names if name in owner]


def _is_namespace(value: Any) -> bool:
    return isinstance(value, ModuleType) and not _is_foreign(value.__name__)


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[str, ...]:
    """Return the names that code looks up, functions inside of it included."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(dict.fromkeys(_names(constant)))
    return tuple(names)


def _is_foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _FOREIGN
