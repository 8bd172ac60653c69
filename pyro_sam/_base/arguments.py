"""Checks of numbers that users give, with errors that name the argument, the rule and the value."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

# a number, or one for each replica
Numbers = float | tuple[float, ...]
_LINE = 200  # characters


def finite(name: str, value: float) -> float:
    """Return ``value`` as a float.

    Raises:
        ValueError: If it is not a finite real number.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {name}={value!r}.")
    return float(value)


def non_negative(name: str, value: float) -> float:
    """Return ``value`` as a float.

    Raises:
        ValueError: If it is negative or not a finite real number.
    """
    if finite(name, value) < 0:
        raise ValueError(f"{name} must be non-negative, got {name}={value!r}.")
    return float(value)


def numbers(check: Callable[[str, float], float], name: str, value: Any) -> Any:
    """Return a number as it is, and a sequence or a vector of them, one a replica, as a tuple of floats.

    Raises:
        ValueError: If ``check`` refuses one of them, or there is none.
    """
    if isinstance(value, Tensor) and value.dim() == 1:
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        single: Any = value
        check(name, single)
        return single
    if not value:
        raise ValueError(f"{name} must be a number, or one for each replica, got {name}={value!r}.")
    each: Any = value
    return tuple(check(f"{name}[{r}]", number) for r, number in enumerate(each))


def positive_int(name: str, value: int) -> int:
    """Return ``value``.

    Raises:
        ValueError: If it is not a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {name}={value!r}.")
    return value


def positive(name: str, value: float) -> float:
    """Return ``value`` as a float.

    Raises:
        ValueError: If it is not positive and finite.
    """
    if finite(name, value) <= 0:
        raise ValueError(f"{name} must be positive, got {name}={value!r}.")
    return float(value)


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Check that ``value`` is one of several words.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {name}={value!r}.")


def function(name: str, value: Any, example: str) -> None:
    """Check that ``value`` is a function, or another callable that is no class.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, type) or not callable(value):
        raise ValueError(f"{name} must be a callable, such as {example}, got {shown(value)}.")


def shown(value: Any) -> str:
    """Return a value as a message shows it: of a tensor its shape, of others no more than a line."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= _LINE else f"{text[:_LINE]}..."


def flag(name: str, value: bool) -> None:
    """Check that ``value`` is True or False.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {name}={value!r}.")
