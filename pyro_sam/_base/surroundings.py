"""What a function can see besides its arguments: closures, globals, objects, modules; and whether any of it changed.

Only what Python shows is found: a number that a function reads off a file, say, is not.
"""

import argparse
import collections
import functools
import operator
from collections.abc import Callable
from contextvars import ContextVar
from types import BuiltinMethodType, FunctionType, MethodType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_sam._base.random_state import is_generator
from pyro_sam._base.seeing import (
    BEHIND,
    INTERNAL,
    NEW,
    content,
    global_places,
    in_slots,
    is_foreign,
    is_large,
    of_function,
    of_module,
    put_into,
    slots,
)

# by value: they are equal where they are not the same object
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_LIMIT = 2000  # things looked at
_LONG = 256  # entries of a collection


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
        has_large_array: Whether there is a NumPy array that is only looked at here and there.
    """

    def __init__(self, *roots: Any) -> None:
        self.modules: list[nn.Module] = []
        self.generators: list[Any] = []
        self.tensors: list[Tensor] = []
        self.has_large_array = False
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
        return all(map(_is_part_same, parts)) and all(content(a) == known for a, known in self._arrays)

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
        if not is_foreign(type(item).__module__):
            self._visit_object(item)

    def _visit_module(self, item: nn.Module) -> None:
        self.modules.append(item)
        foreign = is_foreign(type(item).__module__)
        # torch's and Pyro's modules note things for themselves
        names = [
            n for n, v in vars(item).items() if not (foreign and (n.startswith("_") or isinstance(v, dict | list)))
        ]
        names += [] if foreign else [NEW]
        if isinstance(item, AutoGuide):  # made anew at each run
            names = [name for name in names if name != "plates"]
        self._add(_Part(read := functools.partial(of_module, item, names), read(), put_into(vars(item), names)))
        self._todo += [each for each in item._modules.values() if each is not None]
        if not foreign:
            self._todo += [vars(item)[name] for name in names if name is not NEW and name not in INTERNAL]
            self._todo.append(type(item))
        if priors := vars(item).get("_pyro_samples"):  # of Pyro's PyroModule
            self._todo.append(priors)

    def _visit_tensor(self, item: Tensor) -> None:
        """What is in a tensor is seen where it is used."""
        self.tensors.append(item)
        self._watch(lambda: [item.requires_grad, item.dtype])

    def _visit_array(self, item: Any) -> None:
        self._arrays.append((item, content(item)))
        self.has_large_array = self.has_large_array or is_large(item)

    def _visit_method(self, item: Any) -> None:
        self._todo += [item.__self__, getattr(item, "__func__", None)]

    def _visit_partial(self, item: Any) -> None:
        self._watch(lambda: [item.func, *item.args, *item.keywords.values()])

    def _visit_descriptor(self, item: Any) -> None:
        """Look behind a property, a static method and the like, at the functions in it."""
        self._todo += [getattr(item, name, None) for name in BEHIND]

    def _visit_context_variable(self, item: ContextVar[Any]) -> None:
        self._watch(lambda: [item.get(None)])

    def _visit_function(self, item: FunctionType) -> None:
        if not is_foreign(item.__module__) or item.__closure__:
            closure, places = list(item.__closure__ or ()), global_places(item)

            def put(i: int, value: Any) -> None:
                if i < len(closure):
                    closure[i].cell_contents = value
                elif i < len(closure) + len(places):
                    owner, name = places[i - len(closure)]
                    owner[name] = value

            self._watch(functools.partial(of_function, item, closure, places), put)

    def _visit_dict(self, item: Any) -> None:
        keys = list(item)
        self._watch_entries(item, lambda: list(item.values()), lambda i, value: item.__setitem__(keys[i], value))

    def _visit_list(self, item: list[Any]) -> None:
        self._watch_entries(item, lambda: list(item), item.__setitem__)

    def _visit_entries(self, item: Any) -> None:
        self._watch_entries(item, lambda: list(item), None)

    def _visit_type(self, item: type) -> None:
        if not is_foreign(item.__module__):
            self._watch(lambda: list(vars(item).values()))
            self._todo += item.__bases__

    def _visit_object(self, item: Any) -> None:
        names = [*getattr(item, "__dict__", ()), *slots(type(item))]

        def put(i: int, value: Any) -> None:
            object.__setattr__(item, names[i], value)

        if names or hasattr(item, "__dict__"):  # one without attributes may get some
            self._watch(lambda: [*getattr(item, "__dict__", {}).values(), *in_slots(item)], put)
        self._todo.append(type(item))

    def _watch_entries(self, item: Any, read: Callable[[], list[Any]], put: Any) -> None:
        if not is_foreign(type(item).__module__):  # a user's own kind of collection has attributes, too
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
