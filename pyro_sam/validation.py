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
