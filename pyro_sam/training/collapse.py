"""Warnings of a training run whose posterior predicts like a constant, or far worse than its mean network."""

import math
import warnings
from typing import Any

from pyro.infer import SVI

from pyro_sam._base import ranks
from pyro_sam._base.cures import Data
from pyro_sam.diagnosis.diagnosing import problems
from pyro_sam.training.position import arguments

# Steps before which nothing is said: of the trainings that went wrong each was told by then, and of the others none.
FIRST = 100
_RARER = 4  # a look that finds nothing is followed by one after so many times the steps
_NEVER = frozenset({"untrained", "no data"})  # what the user knows, or a step has said
_LATE = _NEVER | {"wide"}  # what training on may cure


class Watch:
    """Looks at a run after 100 steps, 400, 1600 and so on, at the end of an epoch, and once more at the run's end.

    A look takes two or three runs of the model with a batch, and changes nothing; one that finds something takes
    more. What cannot be judged is passed over: models with other families of observations, with replicas, with errors.
    Under ``torch.distributed`` nothing is looked at, as processes that see other batches would part ways.
    """

    def __init__(self) -> None:
        self._next: float = FIRST
        self._batch: Any = None
        self._rows = 0

    def see(self, batch: Any) -> None:
        """Keep the first of the largest batches: an epoch's last is often a few rows."""
        rows = Data(batch).rows or 0
        if self._batch is None or rows > self._rows:
            self._batch, self._rows = batch, rows

    def epoch(self, svi: SVI, step: int, epoch: int) -> None:
        """Warn, once, if training has collapsed by the end of an epoch."""
        if step < self._next:
            return
        self._next = max(self._next, step) * _RARER
        if self._warn(svi, f"after {epoch} epochs training looks collapsed", _LATE):
            self._next = math.inf

    def end(self, svi: SVI, step: int) -> None:
        """Warn if training has ended collapsed."""
        if step >= FIRST:
            self._warn(svi, "training has ended in a posterior that is of no use", _NEVER)

    def _warn(self, svi: SVI, when: str, hidden: frozenset[str]) -> bool:
        if ranks.is_on() or self._batch is None:
            return False
        args, kwargs = arguments(self._batch)
        try:
            found = [problem for problem in problems(svi, args, kwargs) if problem.kind not in hidden]
        except Exception:  # a warning must not end a run
            return False
        if found:
            said = "\n".join(f"- {problem}" for problem in found)
            warnings.warn(f"{when}; print(pyro_sam.diagnose(svi, ...)) says more.\n{said}", stacklevel=2)
        return bool(found)
