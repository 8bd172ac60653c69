"""The validation NLL of a training run: data that is looked at after every epoch, and leaves no trace."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_sam._base.arguments import positive_int
from pyro_sam._base.ranks import gathered
from pyro_sam._base.replicas import check_own, has_own, of_replica, replicas_of, speaking
from pyro_sam.predictive import Prediction, predict
from pyro_sam.training.advice import not_finite
from pyro_sam.training.numbers import Number
from pyro_sam.training.observation import Observation, can_run, observation
from pyro_sam.training.position import Position, arguments, check_arguments
from pyro_sam.training.streams import untouched

_SEED = 0  # of every look: what differs between epochs is the posterior, not the noise


@dataclass(frozen=True)
class Validation:
    r"""Data that :func:`pyro_sam.fit` validates on after every epoch, and how.

    .. math:: \mathrm{NLL} = -\frac1N \sum_n \log \frac1S \sum_s p(y_n \mid x_n, w_s), \qquad w_s \sim q

    Args:
        data: Batches with their observations, iterable anew after every epoch, as a DataLoader or a list; or a single
            batch, as a tuple ``(x, y)``, a dict or a tensor. Each replica may have rows of its own
            (:func:`pyro_sam.per_replica`), such as its fold.
        num_samples: Number S of posterior samples, at least 1; the same noise in every epoch.
        site: Name of the observed site; None for the only one there is, or ``"obs"`` among several.
        samples_at_once: Number of posterior samples, and with more than 1 of all replicas, that run together; see
            :func:`pyro_sam.predict`.
        members: Number M of replicas that predict as one mixture: the first M, the next M and so on. The NLL of each is
            then that of its mixture, of M S samples, so that all of a mixture stop, and are best, at the same epoch.
    Raises:
        ValueError: If ``data`` cannot be iterated anew, or a number is not positive.
    """

    data: Any
    num_samples: int = 32
    site: str | None = None
    samples_at_once: int = 1
    members: int = 1

    def __post_init__(self) -> None:
        """Check the arguments."""
        positive_int("num_samples", self.num_samples)
        positive_int("samples_at_once", self.samples_at_once)
        positive_int("members", self.members)
        if not isinstance(self.data, Iterable) or isinstance(self.data, str | bytes):
            raise ValueError(f"validation must be batches, or one batch such as (x, y), got {self.data!r}.")
        if isinstance(self.data, Iterator):
            raise ValueError(
                "validation is looked at after every epoch, and an iterator is used up after one: pass a list of "
                "batches, a DataLoader, or one batch such as (x, y)."
            )

    def check(self, model: Callable[..., Any], guide: Any) -> None:
        """Raise ValueError unless the first batch has what the model observes; the model runs once, at its prior."""
        with _unseen(self.data, model, guide, ()), pyro.get_param_store().scope(), torch.no_grad():
            batch = next(iter(self.batches()), None)
            if batch is None:
                raise ValueError("validation must hold observations, got no batch.")
            check_arguments(model, batch, "validation")
            args = _by_place(model, batch)
            _check_rows(args)
            check_own((args, {}), replicas_of(guide))
            self._check_members(replicas_of(guide), has_own(args))
            args = of_replica(args, 0)
            runs = [poutine.trace(model).get_trace]
            if can_run(runs, args):  # not every model does at draws from its prior
                observation(runs, args, self.site)

    def nll(self, svi: SVI, modules: Iterable[nn.Module]) -> Number:
        """Return the NLL per observation, over all processes; of a guide with replicas a list of theirs.

        Args:
            svi: Model and guide, trained.
            modules: Modules that run; they are in evaluation mode meanwhile.
        """
        total, count = torch.zeros((), dtype=torch.float64), 0
        with _unseen(self.data, svi.model, svi.guide, modules):
            for batch in self.batches():
                args = _by_place(svi.model, batch)
                _check_rows(args)
                with _explained(batch):
                    found = self._mixed(self._log_prob(svi.model, svi.guide, args))
                total, count = total - found.sum(-1), count + found.shape[-1]
        totals, counts = zip(*gathered((total, count)), strict=True)
        nll: Number = (sum(totals) / sum(counts)).tolist()
        return nll

    def _check_members(self, number: int | None, own_rows: bool) -> None:
        if self.members == 1:
            return
        if number is None or number % self.members:
            there = "a single one" if number is None else f"num_replicas={number}"
            raise ValueError(
                f"validation mixes members={self.members} replicas, and needs a guide with a multiple of that, got "
                f"{there}."
            )
        if own_rows:
            raise ValueError("validation cannot mix members that have rows of their own (per_replica).")

    def _mixed(self, log_prob: Tensor) -> Tensor:
        """Return the log probability of the mixture that each replica is a member of."""
        if self.members == 1:
            return log_prob
        of_mixture = log_prob.view(-1, self.members, log_prob.shape[-1]).logsumexp(1) - math.log(self.members)
        return of_mixture.repeat_interleave(self.members, 0)

    @torch.no_grad()
    def _log_prob(self, model: Callable[..., Any], guide: Any, args: tuple[Any, ...]) -> Tensor:
        """Return the log predictive probability of each observation of a batch, of replicas a row each."""
        number = replicas_of(guide)
        runs = [partial(_run, model, guide, r) for r in range(number or 1)]

        def look(seen: Observation, replica: int | None = None) -> Prediction:
            pyro.set_rng_seed(_SEED)  # every batch, and every replica by itself, sees the same noise
            return predict(
                model,
                guide,
                *seen.args,
                num_samples=self.num_samples,
                samples_at_once=self.samples_at_once,
                site=seen.site,
                replica=replica,
            )

        def of_own(r: int) -> Tensor:
            seen = observation([runs[r]], of_replica(args, r), self.site)
            return _flat(look(seen, r).log_prob(seen.value))

        if number is not None and has_own(args):
            return _stack([partial(of_own, r) for r in range(number)])
        seen = observation(runs, args, self.site)
        if number is None:
            return _flat(look(seen).log_prob(seen.value))
        if self.samples_at_once > 1:
            with suppress(ValueError, RuntimeError):  # one that is lost would take the others with it
                together = look(seen)
                return torch.stack([_flat(together.replica(r).log_prob(seen.value)) for r in range(number)])
        return _stack([partial(lambda r: _flat(look(seen, r).log_prob(seen.value)), r) for r in range(number)])

    def batches(self) -> Iterable[Any]:
        """Return the batches."""
        return [self.data] if isinstance(self.data, tuple | Mapping | Tensor) else self.data


@contextmanager
def _unseen(data: Any, model: Any, guide: Any, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leave random streams, buffers and modes as they were; inside, streams start anew and modules evaluate."""
    modes = {part: part.training for module in modules for part in module.modules()}
    with untouched(model, guide, Position(data).generators()):
        pyro.set_rng_seed(_SEED)
        try:
            for part in modes:
                part.training = False
            yield
        finally:
            for part, mode in modes.items():
                part.training = mode


def _run(model: Callable[..., Any], guide: Any, r: int, *args: Any) -> Trace:
    """Return a run of the model at a sample of the guide, or of one of its replicas."""
    with speaking(guide, r):
        latents = poutine.trace(guide).get_trace(*args)
    return poutine.trace(poutine.replay(model, trace=latents)).get_trace(*args)


def _check_rows(args: tuple[Any, ...]) -> None:
    if any(isinstance(arg, Tensor) and not arg.numel() for arg in of_replica(args, 0)):
        raise ValueError("validation must hold observations, got a batch of none.")


@contextmanager
def _explained(batch: Any) -> Iterator[None]:
    """Name what is not finite in a batch that has no log probability."""
    try:
        yield
    except ValueError as error:
        if where := not_finite(batch):
            raise ValueError(f"validation must be finite, and {where}.") from error
        raise


def _flat(log_prob: Tensor) -> Tensor:
    return log_prob.cpu().double().flatten()


def _stack(rows: list[Callable[[], Tensor]]) -> Tensor:
    """Return the rows together, NaN in the place of one that fails while others do not."""
    found: list[Tensor | None] = []
    for row in rows:
        try:
            found.append(row())
        except (ValueError, RuntimeError) as error:
            found.append(None)
            failure = error
    good = next((each for each in found if each is not None), None)
    if good is None:
        raise failure
    return torch.stack([torch.full_like(good, math.nan) if each is None else each for each in found])


def _by_place(model: Callable[..., Any], batch: Any) -> tuple[Any, ...]:
    """Return a batch as the model's positional arguments."""
    args, kwargs = arguments(batch)
    if not kwargs:
        return args
    bound = inspect.signature(getattr(model, "forward", model)).bind(*args, **kwargs)
    bound.apply_defaults()
    if bound.kwargs:
        raise ValueError(
            f"validation needs a model whose arguments may be given by place, and it takes {', '.join(bound.kwargs)} "
            "by name."
        )
    return bound.args
