"""The weights that a run ends at: those of the smallest validation NLL, or those that a replica stopped at."""

import math
from typing import Any

import torch
from torch import Tensor

from pyro_sam._base.replicas import number_in
from pyro_sam.training.numbers import Number, each, mapped
from pyro_sam.training.trained import Trained


class Best:
    """The smallest number so far, and parameters and buffers at the end of its epoch; of replicas, each its own.

    Attributes:
        nll: The number; infinite before a finite one was offered.
        epoch: How many epochs were finished then.
    """

    def __init__(self) -> None:
        self.nll: Number = math.inf
        self.epoch: Number = 0
        self._weights: dict[str, dict[str, Tensor]] = {}

    def offer(self, nll: Number, epoch: int, trained: Trained, stopped: list[bool]) -> None:
        """Take a copy of the present weights where their number is smaller than all before.

        Args:
            nll: The number of the present weights.
            epoch: How many epochs are finished.
            trained: The weights.
            stopped: Whether the run is over; of replicas, of each.
        """
        over: Number = [float(stop) for stop in stopped] if isinstance(nll, list) else 0.0
        taken = mapped(lambda new, best, over: float(new < best and not over), nll, self.nll, over)
        if not any(each(taken)):
            return
        self.nll = mapped(lambda take, new, old: new if take else old, taken, nll, self.nll)
        self.epoch = mapped(lambda take, old: epoch if take else old, taken, self.epoch)
        before = self._weights.get("params", {})
        present = trained.state()
        self._weights = {
            "params": {
                name: _rows(taken, param, before.get(name), number_in(trained.params[name]))
                for name, param in present["params"].items()
            },
            "buffers": {name: buffer.clone() for name, buffer in present["buffers"].items()},
        }

    def restore(self, trained: Trained) -> None:
        """Put the kept weights in their place, if there are any."""
        if self._weights:
            trained.restore(self._weights)

    def state(self) -> dict[str, Any]:
        """Return plain values and tensors."""
        return {"nll": self.nll, "epoch": self.epoch, "weights": self._weights}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.nll, self.epoch, self._weights = state["nll"], state["epoch"], state["weights"]


def _rows(taken: Number, new: Tensor, old: Tensor | None, number: int | None) -> Tensor:
    """Return the new rows of the replicas that take them, and the old rows of the others."""
    if number is None or old is None:
        return new.clone()
    mask = torch.tensor(each(taken), device=new.device).bool().view(-1, *[1] * (new.dim() - 1))
    return torch.where(mask, new, old.to(new))
