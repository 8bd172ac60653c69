"""Autoguides use the minibatch that the model names by ``pyro.plate(..., subsample=indices)``, or are refused."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGaussian, AutoGuide, AutoStructured
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.random_state import RandomState, rewound
from pyro_sam._step.call import Call

# these keep one parameter per position in the prototype's minibatch
POSITIONAL = (AutoContinuous, AutoStructured, AutoGaussian)


def follow_minibatch(call: Call) -> Callable[..., Any]:
    """Return the guide, an autoguide with the plates of its local latents at the indices that the model gives.

    Pyro's autoguides draw indices of their own there, and the model then runs at those. To find the model's, it is run
    up to the last plate of a local latent; a guide without local latents, or with ``create_plates``, costs nothing.

    Raises:
        ValueError: If the guide has no parameters of its own for each data point of a subsampled local latent.
    """
    guide = call.guide
    auto = poutine.unwrap(guide)
    if not isinstance(auto, AutoGuide):
        return guide
    parts = [part for part in auto.modules() if isinstance(part, AutoGuide)]
    for part in parts:
        if isinstance(part, POSITIONAL):
            started = part.prototype_trace is not None
            of_part = call.with_functions(part.model, guide)
            _check_positions(part, part._prototype_frames if started else _scout(of_part).frames)
    if auto.create_plates is not None:
        return guide
    frames: dict[str, Any] | None = None
    if auto.prototype_trace is not None:
        frames = {name: frame for part in parts for name, frame in part._prototype_frames.items()}
        if not frames:
            return guide
    scout = _scout(call, frames)
    if not scout.given.keys() & scout.frames.keys():
        return guide
    return _with_plates(auto, guide, scout)


class _AllSeen(Exception):
    """Ends the run of a model early."""


class _Scout(Messenger):
    """Notes the plates around latent sites, and the indices that the model gives to plates."""

    def __init__(self, wanted: Mapping[str, Any] | None) -> None:
        super().__init__()
        self._wanted = wanted
        self.given: dict[str, Tensor] = {}
        self.frames: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.given[msg["name"]] = msg["value"]

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        self.frames.update((frame.name, frame) for frame in msg["cond_indep_stack"] if frame.vectorized)
        if self._wanted is not None and self._wanted.keys() <= self.frames.keys():
            raise _AllSeen


def _scout(call: Call, wanted: Mapping[str, Any] | None = None) -> _Scout:
    scout, start = _Scout(wanted), RandomState.capture(call.streams)
    still = kept_buffers(call.modules), rewound(start, call.streams)
    with torch.no_grad(), still[0], still[1], poutine.block(), scout, suppress(_AllSeen):
        call.run_model()
    return scout


def _check_positions(guide: AutoGuide, frames: Mapping[str, Any]) -> None:
    for name, frame in frames.items():
        if (frame.full_size or frame.size) != frame.size:
            raise ValueError(
                f"guide {type(guide).__name__} cannot hold the local latents of plate '{name}', which takes "
                f"{frame.size} of {frame.full_size} data points at a time: it has parameters for positions in the "
                "minibatch, not for data points. Use MeanFieldNormal or AutoNormal, or an amortised guide."
            )


def _with_plates(auto: AutoGuide, guide: Callable[..., Any], scout: _Scout) -> Callable[..., Any]:
    def plates(*args: Any, **kwargs: Any) -> list[Any]:
        return [
            pyro.plate(name, frame.full_size or frame.size, subsample=scout.given[name], dim=frame.dim)
            for name, frame in scout.frames.items()
            if name in scout.given
        ]

    def run(*args: Any, **kwargs: Any) -> Any:
        auto.create_plates = plates
        try:
            return guide(*args, **kwargs)
        finally:
            auto.create_plates = None

    return run
