"""The callback that ends training early."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyro_sam._base.arguments import non_negative
from pyro_sam.training.numbers import by_replica, each

if TYPE_CHECKING:
    from pyro_sam.training.loop import History, Training


@dataclass(frozen=True)
class EarlyStopping:
    """Callback that ends training when a value has not become smaller for a while.

    Of a guide with replicas each stops by itself: it ends at the weights that it had then, and training ends with the
    last of them.

    Args:
        monitor: Name in the history; None for ``"validation"`` where :func:`pyro_sam.fit` validates, else ``"loss"``.
        patience: Number of epochs without a new smallest value, at least 1.
        min_delta: What counts as smaller, non-negative.
    Raises:
        ValueError: If an argument is out of its range. At a call: if the history has no such name.
    """

    monitor: str | None = None
    patience: int = 10
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if type(self.patience) is not int or self.patience < 1:
            raise ValueError(f"patience must be a positive whole number of epochs, got patience={self.patience!r}.")
        non_negative("min_delta", self.min_delta)

    def __call__(self, training: "Training") -> bool:
        """Return whether it is time to stop; from the history alone, so that it survives a resumption."""
        return all(self.stopped(training.history))

    def stopped(self, history: "History") -> list[bool]:
        """Return of each replica, or of the one there is, whether it is time to stop."""
        if not history:
            return []
        monitor = self.monitor or ("validation" if "validation" in history else "loss")
        if monitor not in history:
            raise ValueError(f"monitor must be one of {', '.join(history)}, got monitor={monitor!r}.")
        stopped = [self._has_waited(values) for values in by_replica(history[monitor])]
        # a number that all replicas share, such as lr, stops all of them
        return stopped if len(stopped) > 1 else stopped * len(each(history.get("loss", [0.0])[-1]))

    def _has_waited(self, values: list[float]) -> bool:
        best, since = math.inf, 0
        for value in values:
            best, since = (value, 0) if value < best - self.min_delta else (best, since + 1)
            if since >= self.patience:
                return True
        return False
