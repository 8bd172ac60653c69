"""What a training loop can tell a user: the loss's terms, and advice on models that do not count what they should."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor

from pyro_sam._base.buffers import kept_buffers
from pyro_sam._step.loss import data_loss, kl_loss, latent_sites
from pyro_sam._step.minibatch import follow_minibatch
from pyro_sam.training.checkpoint import random_states, restore_random_states


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
    states = random_states()
    try:
        with torch.no_grad(), kept_buffers():
            guide = follow_minibatch(svi.model, svi.guide, args, kwargs)
            run = poutine.trace(guide).get_trace(*args, **kwargs)
            model = poutine.trace(poutine.replay(svi.model, trace=run)).get_trace(*args, **kwargs)
    finally:
        restore_random_states(states)
    if not latent_sites(model).keys() <= run.nodes.keys():
        return None
    observed = [site for site in model.nodes.values() if site["type"] == "sample" and site["is_observed"]]
    scales = {site["name"]: float(torch.as_tensor(site["scale"]).max()) for site in observed}
    with torch.no_grad():
        return Terms(float(data_loss(model)), float(kl_loss(run, model)), scales)


def warn_of_unscaled_batches(svi: SVI, loader: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Warn where the KL is counted once for every batch, because the likelihood is that of the batch alone."""
    batches = len(loader) if hasattr(loader, "__len__") else 1
    if batches < 2 or getattr(getattr(svi.loss, "__self__", None), "kl_weight", 1.0) != 1:
        return
    found = terms(svi, args, kwargs)
    if found is None or not found.scales or max(found.scales.values()) > 1:
        return
    size = len(loader.dataset) if hasattr(loader, "dataset") else "N"
    warnings.warn(
        f"the model does not scale the likelihood of a batch up to all the data, so the KL is counted {batches} times "
        f"in an epoch. Say so in the plate: pyro.plate('data', {size}, subsample_size=len(x)).",
        stacklevel=2,
    )


def store_before(guide: Callable[..., Any]) -> set[str] | None:
    """Return the names in the param store before a guide that has not been set up is, else None."""
    fresh = getattr(guide, "prototype_trace", guide) is None
    return set(pyro.get_param_store().keys()) if fresh else None


def warn_of_takeover(before: set[str] | None, used: Mapping[str, Tensor]) -> None:
    """Warn of parameters that a guide new to training found in the param store."""
    taken = sorted((before or set()) & used.keys())
    if taken:
        warnings.warn(
            f"the guide is new and took over {len(taken)} parameters that the param store held, such as '{taken[0]}'. "
            "Call pyro.clear_param_store() first to start anew.",
            stacklevel=2,
        )


def has_nan(batch: Any) -> str:
    """Return the name of the part of a batch that has a NaN, empty if none has."""
    parts = (
        batch if isinstance(batch, Mapping) else dict(enumerate(batch if isinstance(batch, tuple | list) else [batch]))
    )
    for name, part in parts.items():
        if isinstance(part, Tensor) and part.is_floating_point() and bool(part.isnan().any()):
            return f"part {name!r}"
    return ""


def elbo_of(svi: SVI) -> Any:
    """Return the ELBO whose method the loss is; None for another function."""
    return getattr(svi.loss, "__self__", None)


def elbo_settings(svi: SVI) -> dict[str, str]:
    """Return the settings of the loss as text."""
    loss = elbo_of(svi)
    public = {name: repr(value) for name, value in vars(loss).items() if not name.startswith("_")} if loss else {}
    public.pop("max_plate_nesting", None)  # found out on the way
    return {"class": type(loss).__name__, **public}
