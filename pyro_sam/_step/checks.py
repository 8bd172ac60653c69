"""Torch's own checks of distribution arguments and observations, read all at once, so that a step waits once.

Torch checks the arguments of every distribution as it is made and every value that is scored, and waits for the device
each time. Here the same checks run, and what they find is kept on the device until it is asked for.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution

T = TypeVar("T")

_here = threading.local()


class Conditions:
    """What torch's checks found in a stretch of code, not read yet."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def add(self, condition: Tensor) -> None:
        """Take in whether something holds, element by element."""
        if not condition.is_meta:
            self._found.append(condition)

    def hold(self) -> Tensor | None:
        """Return whether all of it holds, as a scalar on the device; None if nothing was asked."""
        if not self._found:
            return None
        device = self._found[0].device
        alls = [each.all().to(device) for each in self._found]
        return alls[0] if len(alls) == 1 else torch.stack(alls).all()


def enabled() -> bool:
    """Return whether distributions check their arguments unless told otherwise."""
    return bool(Distribution._validate_args)


@contextmanager
def silenced() -> Iterator[None]:
    """Keep distributions made in the body from checking themselves."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def postponed() -> Iterator[Conditions]:
    """Collect what torch's checks find in the body, in this thread, in place of an error at each."""
    conditions = Conditions()
    _Torch.install()
    outer, _here.conditions = getattr(_here, "conditions", None), conditions
    try:
        yield conditions
    finally:
        _here.conditions = outer
        _Torch.uninstall()


@contextmanager
def collected() -> Iterator[Conditions | None]:
    """Collect apart what torch's checks find in the body, where they are postponed; else give None."""
    outer = getattr(_here, "conditions", None)
    if outer is None:
        yield None
        return
    _here.conditions = Conditions()
    try:
        yield _here.conditions
    finally:
        _here.conditions = outer


class ByRow:
    """Calls functions, one for each row of something, and collects what torch's checks find in each."""

    def __init__(self) -> None:
        self._found: list[Tensor | None] = []

    def __call__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function for the next row."""
        with collected() as conditions:
            result = function(*args, **kwargs)
        self._found.append(None if conditions is None else conditions.hold())
        return result

    def rows(self) -> Tensor | None:
        """Return whether all holds, a row each; None if nothing was asked."""
        asked = [each for each in self._found if each is not None]
        if not asked:
            return None
        return torch.stack([torch.ones_like(asked[0]) if each is None else each for each in self._found])


class _Torch:
    """The function by which torch's checks ask whether all of a tensor is true."""

    asked: Any = torch._is_all_true
    users = 0
    lock = threading.Lock()

    @classmethod
    def install(cls) -> None:
        with cls.lock:
            if not cls.users:
                cls.asked, torch._is_all_true = torch._is_all_true, _collect  # type: ignore[assignment]
            cls.users += 1

    @classmethod
    def uninstall(cls) -> None:
        with cls.lock:
            cls.users -= 1
            if not cls.users:
                torch._is_all_true = cls.asked


def _collect(valid: Tensor) -> Any:
    conditions = getattr(_here, "conditions", None)
    if conditions is None:  # another thread
        return _Torch.asked(valid)
    conditions.add(valid)
    return True
