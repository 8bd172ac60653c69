r"""The two terms of the loss in the history: an epoch's means, or those at a Gaussian sample of its last batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor

from pyro_sam._base.ranks import gathered
from pyro_sam._base.replicas import of_replica, speaking
from pyro_sam._step.call import Call
from pyro_sam._step.loss import data_loss, kl_loss, latent_sites
from pyro_sam._step.minibatch import follow_minibatch
from pyro_sam.training.numbers import Number, each, mapped
from pyro_sam.training.streams import untouched

Pair = Sequence[Tensor | float]


@dataclass(frozen=True)
class Terms:
    """The two terms of minus the ELBO at one Gaussian sample of the guide.

    Args:
        data: Minus the log likelihood, scaled as the model scales it.
        kl: KL of the guide from the prior, or its estimate.
        scales: Scale of each observed site: the size of the data over that of the batch, if a plate says so.
    """

    data: float
    kl: float
    scales: dict[str, float]


def terms(svi: SVI, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Terms | None:
    """Return the terms of the loss, leaving no trace; None for a guide that does not sample all latents."""
    with untouched(svi.model, svi.guide), torch.no_grad(), speaking(svi.guide, 0):
        args, kwargs = of_replica((args, kwargs), 0)
        guide = follow_minibatch(Call(svi.model, svi.guide, args, kwargs))
        run = poutine.trace(guide).get_trace(*args, **kwargs)
        model = poutine.trace(poutine.replay(svi.model, trace=run)).get_trace(*args, **kwargs)
    if not latent_sites(model).keys() <= run.nodes.keys():
        return None
    observed = [site for site in model.nodes.values() if site["type"] == "sample" and site["is_observed"]]
    scales = {site["name"]: float(torch.as_tensor(site["scale"]).max()) for site in observed}
    with torch.no_grad():
        return Terms(float(data_loss(model)), float(kl_loss(run, model)), scales)


class TermSums:
    """Sums of data term and weighted KL over the steps of an epoch, added up without waiting for the device."""

    def __init__(self) -> None:
        self._sums: Pair | None = (0.0, 0.0)

    def add(self, pair: Pair | None) -> None:
        """Add a step's terms; after a step that does not know them the epoch's sums are unknown."""
        known = self._sums is not None and pair is not None
        self._sums = [_plus(*both) for both in zip(self._sums, pair, strict=True)] if known else None  # type: ignore[arg-type]

    def means(self, steps: int, loss: Number) -> list[Number] | None:
        """Return the means over steps and ranks; None where they are unknown, or are not the terms of this loss."""
        sums = mean_pair(self.state())
        if sums is None:
            return None
        data, kl = (mapped(lambda total: total / steps, total) for total in sums)
        # a loss of the user's own may be made of an estimator's, and be another number
        return [data, kl] if all(each(mapped(_add_up, data, kl, loss))) else None

    def state(self) -> list[Number] | None:
        """Return the sums as numbers, of replicas as lists."""
        return None if self._sums is None else [torch.as_tensor(total).tolist() for total in self._sums]

    def load(self, state: Sequence[Number] | None) -> None:
        """Take over what :meth:`state` returned."""
        self._sums = None if state is None else [torch.tensor(total, dtype=torch.float64) for total in state]


_PRECISION = 1e-3  # of a mean that was added up in single precision


def _add_up(data: float, kl: float, loss: float) -> bool:
    """Return whether a loss is the sum of its terms; one that is not finite has none."""
    return not math.isfinite(loss) or abs(data + kl - loss) <= _PRECISION * (abs(data) + abs(kl))


def mean_pair(pair: Sequence[Number] | None) -> list[Number] | None:
    """Return the mean of all ranks' pairs of numbers; None if one of them has none."""
    pairs = gathered(pair)
    if None in pairs:
        return None
    return [mapped(lambda *values: sum(values) / len(values), *part) for part in zip(*pairs, strict=True)]


def _plus(total: Tensor | float, value: Tensor | float) -> Tensor | float:
    if not isinstance(value, Tensor):
        return total + float(value)
    dtype = torch.float32 if value.device.type == "mps" else torch.float64  # it knows no double precision
    return torch.as_tensor(total, dtype=dtype, device=value.device) + value.detach()
