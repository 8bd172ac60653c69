"""The weights that had the smallest validation NLL."""

import math
from typing import Any

from pyro_sam.training.trained import Trained


class Best:
    """The smallest validation NLL so far, and parameters and buffers at the end of its epoch.

    Attributes:
        nll: The NLL; infinite before a finite one was offered.
        epoch: Number of epochs that were finished then.
    """

    def __init__(self) -> None:
        self.nll, self.epoch = math.inf, 0
        self._weights: dict[str, Any] = {}

    def offer(self, nll: float, epoch: int, trained: Trained) -> None:
        """Take a copy of the present weights if their NLL is smaller than all before."""
        if nll < self.nll:
            self.nll, self.epoch = nll, epoch
            self._weights = {
                kind: {name: tensor.clone() for name, tensor in tensors.items()}
                for kind, tensors in trained.state().items()
            }

    def restore(self, trained: Trained) -> None:
        """Put the best weights in their place, if there are any."""
        if self._weights:
            trained.restore(self._weights)

    def state(self) -> dict[str, Any]:
        """Return plain values and tensors."""
        return {"nll": self.nll, "epoch": self.epoch, "weights": self._weights}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.nll, self.epoch, self._weights = state["nll"], state["epoch"], state["weights"]
