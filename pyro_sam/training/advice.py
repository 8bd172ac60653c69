"""What a training loop can tell a user: advice on models that do not count what they should, and what is wrong."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_sam._base import takeover
from pyro_sam._base.cures import Data
from pyro_sam._base.replicas import replicas_of
from pyro_sam._base.torch_optimisers import check_replicas
from pyro_sam.guide import MeanFieldNormal
from pyro_sam.optim import JointOptim
from pyro_sam.training.terms import terms


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
    if isinstance(guide, MeanFieldNormal) or getattr(guide, "prototype_trace", guide) is not None:  # the first says it
        return None
    return set(pyro.get_param_store().keys())


def warn_of_takeover(before: set[str] | None, used: Mapping[str, Tensor]) -> None:
    """Warn of parameters that a guide new to training found in the param store."""
    takeover.warn_of((before or set()) & used.keys())


def not_finite(batch: Any) -> str:
    """Return which part of a batch has NaN or infinity, and in which row; empty if none has."""
    parts = (
        batch if isinstance(batch, Mapping) else dict(enumerate(batch if isinstance(batch, tuple | list) else [batch]))
    )
    for name, part in parts.items():
        if where := Data([part]).not_finite():
            return f"in part {name!r} of the batch {where}"
    return ""


def check_run(svi: Any, loader: Any, num_epochs: Any, callbacks: Any) -> None:
    """Raise ValueError unless these are what a training run needs."""
    _check_svi(svi)
    if not isinstance(loader, Iterable) or isinstance(loader, str | bytes):
        raise ValueError(f"loader must be an iterable of batches, such as a DataLoader or a list, got {loader!r}.")
    if isinstance(loader, tuple) and all(isinstance(part, Tensor) for part in loader) and _differ(loader):
        raise ValueError(
            "loader must hold batches, got a tuple of different tensors, each of which would be a batch: for a single "
            "batch of all rows give it in a list, [(x, y)]."
        )
    if type(num_epochs) is not int or num_epochs < 1:
        raise ValueError(f"num_epochs must be a positive whole number, got num_epochs={num_epochs!r}.")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise ValueError(f"callbacks must be a sequence of callables, got callbacks={callbacks!r}.")
    if classes := [callback.__name__ for callback in callbacks if isinstance(callback, type)]:
        raise ValueError(f"callbacks must be objects, got the class {classes[0]}: give {classes[0]}(...).")


def _check_svi(svi: Any) -> None:
    if not isinstance(svi, SVI) or not isinstance(svi.optim, PyroOptim):
        raise ValueError(
            f"svi must be a pyro.infer.SVI with a PyroOptim such as JointOptim(torch.optim.Adam, {{'lr': 1e-3}}), "
            f"got {svi!r}."
        )
    if (number := replicas_of(svi.guide)) is not None and not isinstance(svi.optim, JointOptim):
        _check_optim(svi.optim, number)
    if not torch.is_grad_enabled():
        raise ValueError("training needs gradients: call it outside of torch.no_grad() and torch.inference_mode().")


def _check_optim(optim: Any, number: int) -> None:
    """Raise ValueError if one of Pyro's optimisers would let replicas touch each other."""
    check_replicas(getattr(optim, "pt_optim_constructor", None), number, None, needs_closure=False)
    clip = getattr(optim, "pt_clip_args", None)
    if isinstance(clip, Mapping) and clip.get("clip_norm") is not None:
        raise ValueError(
            "clip_args={'clip_norm': ...} of Pyro's optimisers bounds the norm over all replicas, which would touch "
            "each other; use pyro_sam.optim.JointOptim(..., clip_norm=...)."
        )


def _differ(parts: Sequence[Tensor]) -> bool:
    return len({(part.dtype, part.shape[1:]) for part in parts}) > 1
