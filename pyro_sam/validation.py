"""Checks of numbers that users give, with errors that name the argument, the rule and the value."""

import math
from numbers import Real


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
