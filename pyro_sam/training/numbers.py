"""Numbers of a training run: one, or a list with one for each replica of the guide."""

import math
from collections.abc import Callable, Iterable

Number = float | list[float]


def mapped(function: Callable[..., float], *numbers: Number) -> Number:
    """Return a function of numbers, replica by replica where one of them is a list."""
    size = next((len(each) for each in numbers if isinstance(each, list)), None)
    if size is None:
        return function(*numbers)
    rows = [each if isinstance(each, list) else [each] * size for each in numbers]
    return [function(*row) for row in zip(*rows, strict=True)]


def each(number: Number) -> list[float]:
    """Return the numbers as a list."""
    return number if isinstance(number, list) else [number]


def overall(number: Number) -> float:
    """Return the mean over the replicas that have a finite one."""
    finite = [value for value in each(number) if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def any_finite(*numbers: Number) -> bool:
    """Return whether all are finite, of a replica at least."""
    return any(each(mapped(lambda *values: float(all(map(math.isfinite, values))), *numbers)))


def by_replica(numbers: Iterable[Number]) -> list[list[float]]:
    """Return an epoch's numbers after the other's as one list for each replica."""
    numbers = list(numbers)
    size = max((len(each(number)) for number in numbers), default=0)
    rows = [number if isinstance(number, list) else [number] * size for number in numbers]
    return [list(column) for column in zip(*rows, strict=True)]
