r"""The training loop around :class:`pyro.infer.SVI`: progress, history, checkpoints, and errors that say what to do."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from pyro.infer import SVI

from pyro_sam._base.arguments import flag, non_negative
from pyro_sam.training.checkpoint import Checkpoint
from pyro_sam.training.loop import History, Training


def fit(
    svi: SVI,
    loader: Any,
    num_epochs: int,
    *,
    progress: bool = True,
    checkpoint: str | PathLike[str] | Checkpoint | None = None,
    resume: bool = True,
    callbacks: Sequence[Callable[["Training"], Any]] = (),
) -> History:
    r"""Train for a number of epochs.

    Without a checkpoint it does what ``for batch in loader: svi.step(*batch)`` does, bit for bit. With one, a run that
    was killed goes on where its last checkpoint was written and ends with the parameters, bit for bit on a CPU, of a
    run that was not. Under ``torch.distributed`` gradients and history are averaged over the processes, which start
    from the first one's parameters and buffers; the first one writes the checkpoint, and a callback of any ends it.

    An optimiser that evaluates the loss by itself, as ``torch.optim.LBFGS``, is run by :meth:`JointOptim.descend
    <pyro_sam.optim.JointOptim.descend>`; loss, gradient norm and terms are those that its steps begin with.

    Schedulers are stepped after every epoch: Pyro's, and a :class:`~pyro_sam.optim.JointOptim`'s of interval
    ``"epoch"`` (``ReduceLROnPlateau`` gets the epoch's loss).

    Args:
        svi: Model, guide, optimiser and loss.
        loader: Batches, iterable anew for every epoch. A tuple or list is unpacked into the model's arguments, a dict
            passed by name, anything else is the first argument. They must be on the model's device.
        num_epochs: Number of epochs in all, those of a resumed run included.
        progress: Whether to show a bar (tqdm) with the loss, its terms, the gradient's norm and the time left.
        checkpoint: File to keep the state in after every epoch; a :class:`~pyro_sam.Checkpoint` to write
            more often.
        resume: Whether to go on from the checkpoint, if there is one; otherwise it is overwritten.
        callbacks: Called after every epoch with the :class:`Training`; one that returns True ends it.

    Returns:
        Lists with a number for each epoch: ``loss`` and ``grad_norm``, means over the epoch's steps (the norm before
        clipping); ``data`` and ``kl``, the data term at the perturbed point and ``kl_weight`` times the KL, means over
        the epoch's steps that add up to ``loss``; ``lr``; ``seconds``. Where a step does not tell its two terms, as a
        compiled one or another ELBO, ``data`` and ``kl`` are those of minus the ELBO at a Gaussian sample of the guide
        for the epoch's last batch; where they cannot be had in every epoch, they are left out.
    Raises:
        ValueError: If an argument is out of its range, the loader is empty or its batches do not fit the model.
        CheckpointError: If there is a checkpoint, and neither it nor the one before can be used, or processes find
            different ones.
        FloatingPointError: If loss or gradient is not finite; parameters are as they were before that step.
        KeyboardInterrupt: At Ctrl-C, after the step that is under way and a checkpoint (of a single process); a second
            one at once.
    """
    flag("progress", progress)
    flag("resume", resume)
    training = Training(svi, loader, num_epochs, checkpoint=checkpoint, resume=resume, callbacks=callbacks)
    training.run(progress=progress)
    return training.history


@dataclass(frozen=True)
class EarlyStopping:
    """Callback that ends training when a value has not become smaller for a while.

    Args:
        monitor: Name in the history.
        patience: Number of epochs without a new smallest value, at least 1.
        min_delta: What counts as smaller, non-negative.
    Raises:
        ValueError: If an argument is out of its range. At a call: if the history has no such name.
    """

    monitor: str = "loss"
    patience: int = 10
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if type(self.patience) is not int or self.patience < 1:
            raise ValueError(f"patience must be a positive whole number of epochs, got patience={self.patience!r}.")
        non_negative("min_delta", self.min_delta)

    def __call__(self, training: Training) -> bool:
        """Return whether it is time to stop; from the history alone, so that it survives a resumption."""
        if self.monitor not in training.history:
            raise ValueError(f"monitor must be one of {', '.join(training.history)}, got monitor={self.monitor!r}.")
        best, since = math.inf, 0
        for value in training.history[self.monitor]:
            best, since = (value, 0) if value < best - self.min_delta else (best, since + 1)
        return since >= self.patience
