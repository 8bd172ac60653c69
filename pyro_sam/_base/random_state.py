"""Torch's random streams: keep their state, and go back to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of torch's default generators: the CPU's, and those of the CUDA devices in use."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def capture(cls) -> "RandomState":
        """Return the present state; a CUDA that nobody has used yet is not started."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return cls(torch.get_rng_state(), cuda)

    def fingerprint(self) -> tuple[bytes, ...]:
        """Return what tells this state from others."""
        return tuple(state.numpy().tobytes() for state in (self.cpu, *self.cuda))

    def restore(self) -> None:
        """Put the generators back into this state."""
        torch.set_rng_state(self.cpu)
        for device, state in enumerate(self.cuda):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def rewound(state: RandomState) -> Iterator[None]:
    """Run the body from ``state`` on, and leave the streams afterwards as they were before."""
    now = RandomState.capture()
    state.restore()
    try:
        yield
    finally:
        now.restore()
