"""Where training stands in its data: batches as a model's arguments, and a loader that starts again where it was."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from pyro_sam.training.checkpoint import CheckpointError
from pyro_sam.training.streams import random_states, restore_random_states

Call = tuple[tuple[Any, ...], dict[str, Any]]


def arguments(batch: Any) -> Call:
    """Return a batch as arguments: of a tuple or list each one, of a dict by their names, anything else alone."""
    if isinstance(batch, Mapping):
        return (), {str(name): value for name, value in batch.items()}
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def check_arguments(model: Callable[..., Any], batch: Any, whose: str = "the loader") -> None:
    """Raise ValueError unless the model can be called with a batch."""
    args, kwargs = arguments(batch)
    try:
        signature = inspect.signature(getattr(model, "forward", model))
    except (TypeError, ValueError):  # a callable that does not tell
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join([type(arg).__name__ for arg in args] + [f"{name}=..." for name in kwargs])
        raise ValueError(
            f"{whose}'s batches do not fit the model: model({names}) fails with '{error}', and the model is "
            f"model{signature}. A batch that is a tuple or list is unpacked, a dict is passed by name, anything else "
            "is the first argument."
        ) from error


class Position:
    """A place in a loader's epoch that an equal loader can be put to, in another process.

    Args:
        loader: Any iterable that can be iterated anew.
        own: Returns the random streams of the model's own.
    """

    def __init__(self, loader: Any, own: Callable[[], list[Any]] = list) -> None:
        self.loader, self._own = loader, own
        self.start: dict[str, Any] = {}  # random states as the epoch began
        self.last: Any = None  # the last batch

    def batches(self, epoch: int, done: int, now: dict[str, Any] | None) -> Iterator[Any]:
        """Iterate over the rest of an epoch.

        Args:
            epoch: Number of the epoch, for samplers that shuffle by it.
            done: Number of batches that are behind.
            now: Random states to go on from; None to begin an epoch.
        """
        samplers: list[Any] = [getattr(self.loader, name, None) for name in ("sampler", "batch_sampler")]
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        if now is not None:
            self.restore(self.start)
        else:
            self.start = self.states()
        iterator = iter(self.loader)
        for _ in range(done):
            self.last = next(iterator, None)
        if now is not None and done:
            restore_random_states(now, self._own())
        return iterator

    def states(self) -> dict[str, Any]:
        """Return all random states, those of the loader's own generators among them."""
        return {**random_states(self._own()), "generators": [generator.get_state() for generator in self.generators()]}

    def generators(self) -> list[torch.Generator]:
        """Return the loader's own random streams."""
        owners = [self.loader, getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None)]
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())

    def check(self, states: dict[str, Any]) -> None:
        """Raise CheckpointError unless the streams are as many as were saved."""
        own, generators = states.get("own"), states["generators"]  # an older version kept none of the model's
        for whose, saved, here in (("model", own, self._own()), ("loader", generators, self.generators())):
            if saved is not None and len(saved) != len(here):
                raise CheckpointError(
                    f"the checkpoint has {len(saved)} random streams of the {whose}'s own, this {whose} "
                    f"has {len(here)}. Make its generators before fit, as in the run that wrote it, or begin anew with "
                    "resume=False."
                )

    def restore(self, states: dict[str, Any]) -> None:
        """Put all random states back."""
        restore_random_states(states, self._own())
        for generator, state in zip(self.generators(), states["generators"], strict=True):
            generator.set_state(state)
