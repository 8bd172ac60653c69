"""Laws of a user's own: what they hold may change as they choose, and a step taken again must find it as it was.

A law of the package holds numbers and changes none of them.
"""

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sam._base.random_state import is_generator, same_state, set_state_of, state_of
from pyro_sam._base.seeing import slots
from pyro_sam.perturbation import Adversarial, AscendedSample, Gaussian, Mean, MixSAM, Mixture, NoiseSpace, Perturbation

OURS = (Mean, Gaussian, Adversarial, AscendedSample, MixSAM)  # they do not write into what they are given


def own_laws(law: Perturbation) -> list[Perturbation]:
    """Return the laws of a user's own that a law is or is made of."""
    if type(law) is Mixture:
        return [own for each in law.perturbations for own in own_laws(each)]
    if type(law) is Tossed:
        return own_laws(law.law)
    return [] if type(law) in OURS else [law]


class LawState:
    """What the laws of a user's own hold, to find out of changes and to undo them.

    Args:
        law: The law.
    """

    def __init__(self, law: Perturbation) -> None:
        self._before = [(own, {name: _Held.of(value) for name, value in _attributes(own)}) for own in own_laws(law)]

    def has_changed(self) -> bool:
        """Return whether one of them holds something else, or other content."""
        return any(self._is_other(own, before) for own, before in self._before)

    def restore(self) -> None:
        """Put everything back, each object with the content that it had."""
        for own, before in self._before:
            for name, _ in list(_attributes(own)):
                if name not in before:
                    object.__delattr__(own, name)
            for name, held in before.items():
                held.restore()
                object.__setattr__(own, name, held.value)

    @staticmethod
    def _is_other(own: Perturbation, before: dict[str, "_Held"]) -> bool:
        now = dict(_attributes(own))
        return now.keys() != before.keys() or any(not held.is_same(now[name]) for name, held in before.items())


@dataclass(frozen=True)
class _Held:
    """Something that a law holds: itself, its content then, and how to read and to put back content."""

    value: Any
    content: Any
    read: Callable[[Any], Any]
    put: Callable[[Any, Any], Any]
    same: Callable[[Any, Any], bool]

    @classmethod
    def of(cls, value: Any) -> "_Held":
        for kinds, *functions in _KINDS:
            if isinstance(value, kinds):
                return cls(value, functions[0](value), *functions)
        if is_generator(value):
            return cls(value, state_of(value), state_of, set_state_of, same_state)
        return cls(value, None, lambda _: None, lambda *_: None, operator.eq)

    def is_same(self, value: Any) -> bool:
        """Return whether another value is this one, with the same content."""
        if value is not self.value:
            return type(value) is type(self.value) and isinstance(value, _PLAIN) and value == self.value
        return self.same(self.read(value), self.content)

    def restore(self) -> None:
        """Put the content back."""
        if not self.same(self.read(self.value), self.content):
            self.put(self.value, self.content)


_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def _same_entries(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a.values(), b.values())) if isinstance(a, dict) else a == b


def _refill(collection: Any, content: Any) -> None:
    collection.clear()
    getattr(collection, "extend" if isinstance(collection, list) else "update")(content)


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def _same_content(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


_KINDS: tuple[tuple[Any, ...], ...] = (
    (Tensor, lambda tensor: tensor.detach().clone(), _write, _same_content),
    ((dict, list, set), copy.copy, _refill, _same_entries),
)


def _attributes(law: Perturbation) -> Iterator[tuple[str, Any]]:
    yield from vars(law).items()
    for name in slots(type(law)):
        if hasattr(law, name):
            yield name, getattr(law, name)


@dataclass(frozen=True)
class Tossed(Perturbation):
    """A law that a coin has chosen among others that climb: the step's gradient is remembered as theirs would be.

    Args:
        law: The law.
    """

    law: Perturbation

    @property
    def ascends_from_mean(self) -> bool:  # type: ignore[override]
        """Whether the law does."""
        return self.law.ascends_from_mean

    def noise(self, space: NoiseSpace) -> Tensor:
        """Return the law's noise."""
        return self.law.noise(space)
