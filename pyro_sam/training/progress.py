"""Show how training goes: tqdm's bar, or a line an epoch where tqdm is missing."""

import sys
from collections.abc import Mapping
from typing import Any, Protocol


class Progress(Protocol):
    """What a training run tells of its progress."""

    def update(self, values: Mapping[str, float]) -> None:
        """Tell of one more batch, with what is known so far."""

    def epoch(self, values: Mapping[str, float]) -> None:
        """Tell of one more epoch."""

    def close(self) -> None:
        """Tell that training is over."""


class Silent:
    """No progress."""

    def update(self, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def epoch(self, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Bar(Silent):
    """Tqdm's bar over all batches, with the time left."""

    def __init__(self, tqdm: Any, total: int | None, done: int, name: str, unit: str) -> None:
        self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, mininterval=0.5)

    def update(self, values: Mapping[str, float]) -> None:
        """Move on by a batch."""
        if self._bar.update():
            self._bar.set_postfix(_text(values), refresh=False)

    def epoch(self, values: Mapping[str, float]) -> None:
        """Show the epoch's values."""
        self._bar.set_postfix(_text(values), refresh=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class Lines(Silent):
    """A line an epoch on the standard error."""

    def __init__(self, name: str) -> None:
        self._name = name
        sys.stderr.write(f"{name}: pip install tqdm for a progress bar (progress=False for silence)\n")

    def epoch(self, values: Mapping[str, float]) -> None:
        """Write a line."""
        text = ", ".join(f"{name} {value}" for name, value in _text(values).items())
        sys.stderr.write(f"{self._name}: {text}\n")


def progress(wanted: bool, total: int | None, done: int, name: str = "fit", unit: str = "batch") -> Progress:
    """Return a display.

    Args:
        wanted: Whether there is one.
        total: Number of batches in all, None if unknown.
        done: Number of batches that an earlier run has seen.
        name: What is under way.
        unit: What is counted in the place of batches.
    """
    if not wanted:
        return Silent()
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return Lines(name)
    return Bar(tqdm, total, done, name, unit)


def _text(values: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in values.items()}
