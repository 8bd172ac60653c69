"""The validation NLL of a training run: data that is looked at after every epoch, and leaves no trace."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_sam._base.arguments import positive_int
from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.random_state import RandomState, Streams
from pyro_sam._base.ranks import gathered
from pyro_sam.predictive import predict
from pyro_sam.training.advice import not_finite
from pyro_sam.training.position import Position, arguments, check_arguments

_SEED = 0  # of every look: what differs between epochs is the posterior, not the noise


@dataclass(frozen=True)
class Validation:
    r"""Data that :func:`pyro_sam.fit` validates on after every epoch, and how.

    .. math:: \mathrm{NLL} = -\frac1N \sum_n \log \frac1S \sum_s p(y_n \mid x_n, w_s), \qquad w_s \sim q

    Args:
        data: Batches with their observations, iterable anew after every epoch, as a DataLoader or a list; or a single
            batch, as a tuple ``(x, y)``, a dict or a tensor.
        num_samples: Number S of posterior samples, at least 1; the same noise in every epoch.
        site: Name of the observed site; None for the only one there is, or ``"obs"`` among several.
    Raises:
        ValueError: If ``data`` cannot be iterated anew, or ``num_samples`` is not positive.
    """

    data: Any
    num_samples: int = 32
    site: str | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        positive_int("num_samples", self.num_samples)
        if not isinstance(self.data, Iterable) or isinstance(self.data, str | bytes):
            raise ValueError(f"validation must be batches, or one batch such as (x, y), got {self.data!r}.")
        if isinstance(self.data, Iterator):
            raise ValueError(
                "validation is looked at after every epoch, and an iterator is used up after one: pass a list of "
                "batches, a DataLoader, or one batch such as (x, y)."
            )

    def check(self, model: Callable[..., Any]) -> None:
        """Raise ValueError unless the first batch has what the model observes; the model runs once, at its prior."""
        with _unseen(self.data, ()), pyro.get_param_store().scope(), torch.no_grad():
            batch = next(iter(self._batches()), None)
            if batch is None:
                raise ValueError("validation must hold observations, got no batch.")
            check_arguments(model, batch, "validation")
            args = _by_place(model, batch)
            if any(isinstance(arg, Tensor) and not arg.numel() for arg in args):
                raise ValueError("validation must hold observations, got a batch of none.")
            try:
                trace = poutine.trace(model).get_trace(*args)
            except Exception:  # not every model runs at draws from its prior
                return
            _observed(trace, self.site)

    def nll(self, svi: SVI, modules: Iterable[nn.Module]) -> float:
        """Return the NLL per observation, over all processes.

        Args:
            svi: Model and guide, trained.
            modules: Modules that run; they are in evaluation mode meanwhile.
        """
        total, count = 0.0, 0
        with _unseen(self.data, modules):
            for batch in self._batches():
                with _explained(batch):
                    found = self._log_prob(svi.model, svi.guide, _by_place(svi.model, batch))
                total, count = total - float(found.sum()), count + found.numel()
        totals, counts = zip(*gathered((total, count)), strict=True)
        return float(sum(totals) / sum(counts))

    @torch.no_grad()
    def _log_prob(self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
        """Return the log predictive probability of each observation of a batch."""
        pyro.set_rng_seed(_SEED)
        latents = poutine.trace(guide).get_trace(*args)
        site, y = _observed(poutine.trace(poutine.replay(model, trace=latents)).get_trace(*args), self.site)
        pyro.set_rng_seed(_SEED)  # every batch sees the same posterior samples
        found = predict(model, guide, *args, num_samples=self.num_samples, site=site).log_prob(y)
        return found.cpu().double()

    def _batches(self) -> Iterable[Any]:
        return [self.data] if isinstance(self.data, tuple | Mapping | Tensor) else self.data


@contextmanager
def _unseen(data: Any, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leave random streams, buffers and modes as they were; inside, streams start anew and modules evaluate."""
    modes = {part: part.training for module in modules for part in module.modules()}
    now = RandomState.capture(Streams(own=tuple(Position(data).generators())))
    pyro.set_rng_seed(_SEED)
    try:
        for part in modes:
            part.training = False
        with kept_buffers():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        now.restore()


@contextmanager
def _explained(batch: Any) -> Iterator[None]:
    """Name what is not finite in a batch that has no log probability."""
    try:
        yield
    except ValueError as error:
        if where := not_finite(batch):
            raise ValueError(f"validation must be finite, and {where}.") from error
        raise


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


def _observed(trace: Trace, wanted: str | None) -> tuple[str, Tensor]:
    """Return name and value of the observed site."""
    sites: dict[str, Any] = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    observed = [name for name, site in sites.items() if site["is_observed"] and not site_is_subsample(site)]
    name = wanted or (observed[0] if len(observed) == 1 else "obs")
    if name not in observed:
        raise ValueError(
            f"validation must hold observations, as the training batches do: with its first batch the model observes "
            f"{', '.join(observed) or 'nothing'}, and is to observe one site, or one of name {name!r}. A tuple is one "
            "batch, such as (x, y); a list holds batches."
        )
    shape = sites[name]["fn"].shape()
    value: Tensor = sites[name]["value"]
    return name, value if value.shape == shape else value.expand(shape)
