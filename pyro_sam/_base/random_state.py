"""Random streams: keep their state, and go back to it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """Which random streams a model draws from, besides torch's default ones.

    Args:
        python: Whether Python's own is one of them.
        numpy: Whether NumPy's global one is.
        own: Generators of the model's own: torch's, NumPy's or Python's.
    """

    python: bool = True
    numpy: bool = True
    own: tuple[Any, ...] = ()


TORCH = Streams(python=False, numpy=False)


@dataclass(frozen=True)
class RandomState:
    """State of random streams: torch's default ones on every device in use, and others on demand."""

    cpu: Tensor
    cuda: tuple[Tensor, ...] = ()
    others: tuple[tuple[Any, Any], ...] = ()

    @classmethod
    def capture(cls, streams: Streams = TORCH) -> "RandomState":
        """Return the present state; a device that nobody has used yet is not started."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        owners = [*_accelerators(), *streams.own]
        if streams.python:
            owners.append(random)
        if streams.numpy:
            owners.append(np.random)
        return cls(torch.get_rng_state(), cuda, tuple((owner, state_of(owner)) for owner in owners))

    def fingerprint(self) -> tuple[bytes, ...]:
        """Return what tells torch's states from others."""
        return tuple(state.numpy().tobytes() for state in (self.cpu, *self.cuda))

    def restore(self) -> None:
        """Put the streams back into this state."""
        torch.set_rng_state(self.cpu)
        for device, state in enumerate(self.cuda):
            torch.cuda.set_rng_state(state, device)
        for owner, state in self.others:
            set_state_of(owner, state)

    def moved(self, since: "RandomState") -> Streams:
        """Return which streams that both states know are no longer where they were."""
        before = {id(owner): state for owner, state in since.others}
        moved = [owner for owner, state in self.others if not same_state(state, before[id(owner)])]
        own = tuple(each for each in moved if each is not random and each is not np.random)
        return Streams(
            python=any(each is random for each in moved), numpy=any(each is np.random for each in moved), own=own
        )


@contextmanager
def rewound(state: RandomState, streams: Streams = TORCH) -> Iterator[None]:
    """Run the body from ``state`` on, and leave the streams afterwards as they were before."""
    now = RandomState.capture(streams)
    state.restore()
    try:
        yield
    finally:
        now.restore()


def is_generator(value: Any) -> bool:
    """Return whether a value is a random stream of somebody's own."""
    return isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random)


def _accelerators() -> list[Any]:
    """Return torch's modules of other devices than CUDA that have a stream of their own in use."""
    found: list[Any] = []
    if torch.backends.mps.is_available():
        found.append(torch.mps)
    xpu: Any = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available() and xpu.is_initialized():
        found.append(xpu)
    return found


def state_of(owner: Any) -> Any:
    """Return the state of a random stream, or of a device's."""
    if isinstance(owner, torch.Generator):
        return owner.get_state()
    if isinstance(owner, np.random.Generator):
        return owner.bit_generator.state
    if isinstance(owner, random.Random) or owner is random:
        return owner.getstate()
    if isinstance(owner, np.random.RandomState) or owner is np.random:
        return owner.get_state(legacy=False)
    return owner.get_rng_state()


def set_state_of(owner: Any, state: Any) -> None:
    """Put a random stream into a state."""
    if isinstance(owner, np.random.Generator):
        owner.bit_generator.state = state
    elif isinstance(owner, random.Random) or owner is random:
        owner.setstate(state)
    elif isinstance(owner, torch.Generator | np.random.RandomState) or owner is np.random:
        owner.set_state(state)
    else:
        owner.set_rng_state(state)


def same_state(a: Any, b: Any) -> bool:
    """Return whether two states are one."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)
