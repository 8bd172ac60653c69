r"""The training loop around :class:`pyro.infer.SVI`: progress, history, checkpoints, and errors that say what to do."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

from pyro.infer import SVI

from pyro_sam._base.arguments import flag
from pyro_sam.training.checkpoint import Checkpoint
from pyro_sam.training.loop import History, Training
from pyro_sam.training.validation import Validation


def fit(
    svi: SVI,
    loader: Any,
    num_epochs: int,
    *,
    progress: bool = True,
    checkpoint: str | PathLike[str] | Checkpoint | None = None,
    resume: bool = True,
    callbacks: Sequence[Callable[[Training], Any]] = (),
    validation: Any = None,
    restore_best_weights: bool = True,
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
        callbacks: Called after every epoch with the :class:`Training`; one that returns True ends it. What has a method
            ``before_epoch`` too, as :class:`~pyro_sam.Anneal`, has it called before every epoch.
        validation: Batches with their observations, as ``loader`` but not used up; or a single batch as ``(x, y)``; or
            a :class:`~pyro_sam.Validation` to say more. After every epoch the posterior predictive's NLL per
            observation is taken at the same noise, with modules in evaluation mode; training is not touched by it.
        restore_best_weights: With ``validation``, whether training ends at the parameters and buffers of the epoch
            with the smallest NLL, so that the guide is the one that the best number belongs to; False for the last
            epoch's. A checkpoint holds both, and a longer run goes on from the last.

    Returns:
        Lists with a number for each epoch: ``loss`` and ``grad_norm``, means over the epoch's steps (the norm before
        clipping); ``data`` and ``kl``, the data term at the perturbed point and ``kl_weight`` times the KL, means over
        the epoch's steps that add up to ``loss``; ``validation``, the NLL, if asked for; ``lr``; ``seconds``, of
        training. Where a step does not tell its two terms, as a compiled one or another ELBO, ``data`` and ``kl`` are
        those of minus the ELBO at a Gaussian sample of the guide for the epoch's last batch; where they cannot be had
        in every epoch, they are left out.
    Raises:
        ValueError: If an argument is out of its range, the loader is empty or its batches do not fit the model, or
            ``validation`` has no observations.
        CheckpointError: If there is a checkpoint, and neither it nor the one before can be used, or processes find
            different ones.
        FloatingPointError: If loss or gradient is not finite; parameters are as they were before that step.
        KeyboardInterrupt: At Ctrl-C, after the step that is under way and a checkpoint (of a single process); a second
            one at once.
    """
    flag("progress", progress)
    flag("resume", resume)
    flag("restore_best_weights", restore_best_weights)
    training = Training(
        svi,
        loader,
        num_epochs,
        checkpoint=checkpoint,
        resume=resume,
        callbacks=callbacks,
        validation=validation if validation is None or isinstance(validation, Validation) else Validation(validation),
        restore_best_weights=restore_best_weights,
    )
    training.run(progress=progress)
    return training.history
