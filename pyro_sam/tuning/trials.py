"""A batch of trials: built as replicas of one guide, trained, and each told its own validation NLL."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.random_state import RandomState, Streams
from pyro_sam._base.replicas import replicas_of, speaking
from pyro_sam.training.advice import check_run
from pyro_sam.training.estimator import elbo_of
from pyro_sam.training.fitting import fit
from pyro_sam.training.loop import Training
from pyro_sam.training.numbers import by_replica
from pyro_sam.training.position import Position, arguments
from pyro_sam.training.validation import Validation
from pyro_sam.tuning.space import Settings, Space, examples

Build = Callable[[Settings], SVI]


class BuildError(ValueError):
    """A mistake in ``build`` or ``space``, which no trial is to blame for."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Args:
        nll: Smallest validation NLL of its epochs; NaN if it failed.
        epoch: The epoch that had it.
        pruned: Whether the study's pruner ended it.
        why: What it failed of.
        guide: Gives its guide, at its best weights, with the parameters in the store; None if it failed.
    """

    nll: float = math.nan
    epoch: int = 0
    pruned: bool = False
    why: str = ""
    guide: Callable[[], "Trained"] | None = None


@dataclass(frozen=True)
class Trained:
    """A guide and its model, and what the param store holds for them."""

    model: Any
    guide: Any
    store: Any

    def publish(self) -> None:
        """Put the parameters into the param store, in the place of others of the same names."""
        store = pyro.get_param_store()
        for name in self.store["params"].keys() & set(store):
            del store[name]
        store.set_state(self.store)


@dataclass
class Job:
    """What all trials have in common.

    Args:
        build: The user's function from settings to an SVI.
        space: What is searched.
        train: Batches to train on.
        validation: Data to choose by, and the number of replicas of each trial.
        num_epochs: Number of epochs of a trial.
        seed: Seed of each batch of trials.
    """

    build: Build
    space: Space
    train: Any
    validation: Validation
    num_epochs: int
    seed: int
    _reported: set[tuple[int, int]] = field(default_factory=set)

    def check(self, most: int) -> None:
        """Build the space's examples, and see that they can be trained on and validated.

        Raises:
            ValueError: If not; nothing was trained.
        """
        read: set[str] = set()
        for params in examples(self.space):
            with self._apart():
                svi = self._built([params] * min(most, 2), read)
                check_run(svi, self.train, self.num_epochs, ())
                self.validation.check(svi.model, svi.guide)
        unread = [name for name in self.space if name not in read]
        if unread:
            raise BuildError(
                f"space has a setting that build does not read, {unread[0]!r}; build reads "
                f"{', '.join(sorted(read)) or 'none'}."
            )
        self._check_apart(min(most, 2))

    def _check_apart(self, number: int) -> None:
        """See that trials share nothing that training changes, which each would find as another left it."""
        first, seen = next(examples(self.space)), []
        for _ in range(2):
            with self._apart():
                seen.append(_changing(self._built([first] * number), next(iter(self.validation.batches()))))
        for key in seen[0].keys() & seen[1].keys():
            raise BuildError(
                f"build must make the network and the guide anew: two calls of it share {seen[0][key][0]}, which "
                "training changes, so that a trial would begin where another ended."
            )

    def run(self, trials: Sequence[Any], on_epoch: Callable[[Training], Any]) -> Iterator[tuple[Any, Outcome]]:
        """Train trials of equal categories side by side, and yield each with how it ended.

        If that fails they are taken in halves, so that none fails but those that do by themselves.
        """
        try:
            outcomes = self.outcomes(
                [trial.params for trial in trials], _Reports(trials, self._reported, self._members), on_epoch
            )
        except BuildError:
            raise
        except Exception as error:
            if len(trials) == 1:
                yield trials[0], Outcome(why=_in_words(error))
                return
            half = len(trials) // 2
            yield from self.run(trials[:half], on_epoch)
            yield from self.run(trials[half:], on_epoch)
        else:
            yield from zip(trials, outcomes, strict=True)

    def outcomes(
        self, params: Sequence[dict[str, Any]], reports: Any = None, on_epoch: Callable[[Training], Any] | None = None
    ) -> list[Outcome]:
        """Train settings side by side, and return how each ended."""
        with self._apart() as store:
            svi = self._built(params)
            callbacks = [each for each in (on_epoch, reports) if each]
            history = fit(
                svi, self.train, self.num_epochs, progress=False, callbacks=callbacks, validation=self.validation
            )
            columns = by_replica(history["validation"])[:: self._members]
        pruned = reports.pruned if reports else [False] * len(params)
        return [
            _outcome(column, is_pruned, partial(self._trained, svi, r, store))
            for r, (column, is_pruned) in enumerate(zip(columns, pruned, strict=True))
        ]

    def refit(self, params: dict[str, Any], num_epochs: int) -> Trained:
        """Train settings on the training and the validation data."""
        with self._apart() as store:
            svi = self._built([params])
            fit(svi, _Both(self.train, self.validation.batches()), num_epochs, progress=False)
        return self._trained(svi, 0, store)

    def _trained(self, svi: SVI, r: int, store: Any) -> Trained:
        """Return a trial's guide with what it and its model use of the store."""
        with self._apart(store), torch.no_grad(), kept_buffers():
            args, kwargs = arguments(next(iter(self.train)))
            guide = self._guide(svi, r)
            with poutine.trace(param_only=True) as capture, speaking(guide, 0):
                latents = poutine.trace(guide).get_trace(*args, **kwargs)
                poutine.replay(svi.model, trace=latents)(*args, **kwargs)
            kept: dict[str, Any] = {**pyro.get_param_store().get_state()}
        names = capture.trace.nodes
        return Trained(
            svi.model, guide, {kind: {name: of[name] for name in names if name in of} for kind, of in kept.items()}
        )

    def _guide(self, svi: SVI, r: int) -> Any:
        if self._members > 1:
            return svi.guide.replicas(r * self._members, (r + 1) * self._members)
        return svi.guide if replicas_of(svi.guide) is None else svi.guide.replica(r)

    @property
    def _members(self) -> int:
        return self.validation.members

    def _apart(self, store: Any = None) -> AbstractContextManager[Any]:
        own = [stream for data in (self.train, self.validation.data) for stream in Position(data).generators()]
        return _apart(self.seed, Streams(own=tuple(own)), store)

    def _built(self, params: Sequence[dict[str, Any]], read: set[str] | None = None) -> SVI:
        params = [each for each in params for _ in range(self._members)]
        try:
            svi = self.build(Settings(params, self.space, read))
        except KeyError as error:
            if str(error.args[0]).startswith("build reads"):
                raise BuildError(f"{error.args[0]}.") from error
            raise
        if not isinstance(svi, SVI):
            raise BuildError(f"build must return a pyro.infer.SVI, got {svi!r}.")
        number = replicas_of(svi.guide)
        if (1 if number is None else number) != len(params):
            raise BuildError(_NUMBER.format(len(params), "trials" if self._members == 1 else "members", number))
        settings = getattr(elbo_of(svi), "_settings", None)
        if settings is not None:
            try:
                settings.check_replicas(number)
            except ValueError as error:
                raise BuildError(str(error)) from error
        return svi


class _Reports:
    """Callback that reports each trial's NLL to its study, and ends a batch that is pruned to the last."""

    def __init__(self, trials: Sequence[Any], reported: set[tuple[int, int]], members: int) -> None:
        self._trials, self._reported, self._members = trials, reported, members
        self.pruned = [False] * len(trials)

    def __call__(self, training: Training) -> bool:
        """Report the last epoch."""
        values = by_replica(training.history["validation"][-1:])[:: self._members]
        for r, (trial, (value,)) in enumerate(zip(self._trials, values, strict=True)):
            if self.pruned[r] or not math.isfinite(value):
                continue
            if (trial.number, training.epoch) not in self._reported:  # a batch that failed is run again in halves
                trial.report(value, training.epoch)
                self._reported.add((trial.number, training.epoch))
            self.pruned[r] = trial.should_prune()
        return all(self.pruned)


class _Both:
    """Training batches, then validation batches."""

    def __init__(self, train: Any, validation: Any) -> None:
        self._parts = (train, validation)

    def __iter__(self) -> Iterator[Any]:
        for part in self._parts:
            yield from part


@contextmanager
def _apart(seed: int, streams: Streams, store: Any = None) -> Iterator[Any]:
    """Run the body from a seed and with a param store of its own, and leave store and streams as they were.

    What is yielded holds the body's store afterwards.
    """
    now = RandomState.capture(streams)
    try:
        pyro.set_rng_seed(seed)
        with pyro.get_param_store().scope(store) as state:
            yield state
    finally:
        now.restore()


def _changing(svi: SVI, batch: Any) -> dict[Any, tuple[str, Any]]:
    """Return what a step changes, parameters by their place in memory and modules, each with its name and itself."""
    args, kwargs = arguments(batch)
    try:
        with torch.no_grad(), kept_buffers() as buffers, poutine.trace(param_only=True) as capture:
            svi.loss(svi.model, svi.guide, *args, **kwargs)
            written = buffers.now()
    except Exception:  # a trial will fail of it
        return {}
    sites: Any = capture.trace.nodes.items()
    params = {name: site["value"].unconstrained() for name, site in sites if site["type"] == "param"}
    found: dict[Any, tuple[str, Any]] = {
        param.data_ptr(): (f"the parameter '{name}'", param) for name, param in params.items() if param.numel()
    }
    for (module, name), value in written.items():
        if value is not None and not torch.equal(value, module._buffers[name]):  # type: ignore[arg-type]
            found[module] = f"the buffer '{name}' of {type(module).__name__}", module
    return found


def _outcome(column: list[float], pruned: bool, guide: Callable[[], Trained]) -> Outcome:
    finite = [value for value in column if math.isfinite(value)]
    if not finite:
        return Outcome(why="no epoch ended with a finite validation NLL")
    nll = min(finite)
    return Outcome(nll, column.index(nll) + 1, pruned, "", guide)


def _in_words(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"


_NUMBER = (
    "build must return an SVI over a guide with a replica for each trial, MeanFieldNormal(model, "
    "num_replicas=len(settings['...'])): there are {} {}, and the guide has num_replicas={}. Or pass "
    "max_replicas=1, and no members."
)
