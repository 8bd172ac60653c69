"""The callback that changes numbers of the loss from epoch to epoch."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from pyro_sam._base.arguments import finite, positive_int
from pyro_sam.elbo import SAM_ELBO
from pyro_sam.training.estimator import elbo_of

if TYPE_CHECKING:
    from pyro_sam.training.loop import Training

Schedule = Callable[[int], Any] | tuple[float, float, int]


class Anneal:
    r"""Callback that sets ``kl_weight``, and numbers of the perturbation, before every epoch.

    .. math:: \mathrm{value}(\mathrm{epoch}) = \mathrm{start}
        + (\mathrm{stop} - \mathrm{start}) \min(1, \mathrm{epoch} / \mathrm{epochs})

    It depends on the epoch's number alone, so that a run that goes on from a checkpoint
    is the one that was not stopped.

    Args:
        **schedules: By name, ``kl_weight`` or a number of the perturbation such as ``rho`` or ``alpha``: a triple
            (start, stop, epochs), which reaches ``stop`` after that many epochs and stays there; or a function of the
            epoch's number, which begins at 0.
    Raises:
        ValueError: If a schedule is neither. Before the first epoch: if the loss is no :class:`~pyro_sam.SAM_ELBO` or
            its perturbation has no such number.
    """

    def __init__(self, **schedules: Schedule) -> None:
        if not schedules:
            raise ValueError("Anneal needs a schedule, such as Anneal(kl_weight=(0.0, 1.0, 10)).")
        self.schedules = {name: _function(name, schedule) for name, schedule in schedules.items()}

    def __call__(self, training: "Training") -> None:
        """Do nothing after an epoch."""

    def before_epoch(self, training: "Training") -> None:
        """Set the numbers of the epoch that begins."""
        elbo, epoch = elbo_of(training.svi), training.epoch
        if not isinstance(elbo, SAM_ELBO):
            raise ValueError(f"Anneal sets numbers of a SAM_ELBO, and the loss is {training.svi.loss!r}.")
        law: Any = elbo.perturbation
        own = [field.name for field in fields(law)] if is_dataclass(law) else []
        if unknown := [name for name in self.schedules if name not in ("kl_weight", *own)]:
            raise ValueError(
                f"Anneal knows kl_weight and the numbers of {law!r}, which are {', '.join(own) or 'none'}; got "
                f"{unknown[0]}."
            )
        values = {name: value(epoch) for name, value in self.schedules.items()}
        weight = values.pop("kl_weight", elbo.kl_weight)
        # at once: where a number is refused, none has changed
        elbo._settings = replace(
            elbo._settings, kl_weight=weight, perturbation=replace(law, **values) if values else law
        )

    def changes(self) -> set[str]:
        """Return which settings of the loss are others from epoch to epoch."""
        return {name if name == "kl_weight" else "perturbation" for name in self.schedules}


def _function(name: str, schedule: Any) -> Callable[[int], Any]:
    if callable(schedule):
        return schedule
    if not isinstance(schedule, tuple | list) or len(schedule) != 3:
        raise ValueError(f"{name} must be (start, stop, epochs) or a function of the epoch, got {name}={schedule!r}.")
    start, stop = (finite(name, value) for value in schedule[:2])
    epochs = positive_int(f"{name}: epochs", schedule[2])
    return lambda epoch: start + (stop - start) * min(1.0, epoch / epochs)
