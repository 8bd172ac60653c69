"""The handlers of a pass: one places noise in the guide, one replays the guide's values in the model.

All passes of a step share what they draw. A pass that replays a site draws nothing there, so that it jumps, after each
site, to where the first pass left the random streams.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sam._base.random_state import RandomState, Streams
from pyro_sam._base.vectorised import unmapped
from pyro_sam._step.enumeration import EnumerableSite, is_marked
from pyro_sam._step.sites import (
    CoreNormal,
    NoiseSite,
    is_discrete,
    is_whitened,
    place,
    standard_normal,
    unwrap,
    why_not_gaussian,
)


class Bookmarks:
    """States of the random streams after each draw of a pass: made by the first pass, jumped to by later ones.

    Args:
        streams: The streams, besides torch's default ones.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._states: dict[str, RandomState] = {}

    def keep(self, name: str) -> None:
        """Jump to where the streams were after ``name`` the first time, or make a note of it."""
        if name in self._states:
            self._states[name].restore()
        else:
            self._states[name] = RandomState.capture(self._streams)


class NoiseMessenger(Messenger):
    """Place noise at the Gaussian sites of a guide run, and record them in ``sites``.

    Args:
        noise: Called with the site's name and its core Gaussian; returns the noise.
        hidden: Tells from its name whether a site is left at its own random sample.
        held: Indices of subsampling plates. Filled by the first run, used by later ones.
        hidden_noise: Noise of hidden sites, likewise.
        bookmarks: Where the random streams are after each draw at a Gaussian site, so that all other draws (encoder
            dropout, other sites) repeat; None for a single run.
        detach_scale: Whether values have no gradient to the scale.
    """

    def __init__(
        self,
        noise: Callable[[str, CoreNormal], Tensor],
        hidden: Callable[[str], bool],
        held: dict[str, Tensor],
        hidden_noise: dict[str, Tensor],
        bookmarks: Bookmarks | None,
        detach_scale: bool = False,
    ) -> None:
        super().__init__()
        self._noise = noise
        self._hidden = hidden
        self._held = held
        self._noise_held = hidden_noise
        self._bookmarks = bookmarks
        self._detach_scale = detach_scale
        self.sites: dict[str, NoiseSite] = {}
        self.unperturbed: dict[str, str] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or msg["value"] is not None:
            return
        name, fn = msg["name"], msg["fn"]
        _refuse_enumeration(name, fn, msg["infer"])
        if site_is_subsample(msg):
            hold_subsample(msg, self._held, self._bookmarks)
            return
        reason = why_not_gaussian(fn)
        if reason is not None:
            _refuse_unreparameterised(name, fn)
            self.unperturbed[name] = reason
            return
        if self._hidden(name):
            self.unperturbed[name] = "hidden by hide"
            msg["value"] = place(fn, lambda core: self._hidden_noise(name, core))[0]
        else:
            msg["value"], site = place(fn, lambda core: self._noise(name, core), self._detach_scale)
            self.sites[name] = replace(site, scale=None) if is_whitened(msg, site) else site
        msg["done"] = True
        if self._bookmarks is not None:
            self._bookmarks.keep(name)

    def _hidden_noise(self, name: str, core: CoreNormal) -> Tensor:
        if name not in self._noise_held:
            self._noise_held[name] = standard_normal(core)
        return self._noise_held[name]


class ReplayMessenger(Messenger):
    """Replay a guide's values in the model, and hold the model's own subsample indices over several runs.

    Args:
        values: The guide's messages by site name.
        held: Indices of the model's subsampling plates. Filled by the first run, used by later ones.
        bookmarks: Likewise, for draws of such indices.
        free: For predictions, names of the latent sites that the model may sample itself.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        held: dict[str, Tensor],
        bookmarks: Bookmarks | None = None,
        free: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self._values = values
        self._held = held
        self._bookmarks = bookmarks
        self._free = free

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            return
        site = self._values.get(msg["name"])
        if site is not None and site["type"] == "sample" and not site["is_observed"]:
            if site_is_subsample(msg) and msg["value"] is not None:
                _refuse_other_minibatch(msg["name"], msg["value"], site["value"])
            msg["value"], msg["infer"], msg["done"] = site["value"], site["infer"], True
        elif site_is_subsample(msg):
            if msg["value"] is None:
                hold_subsample(msg, self._held, self._bookmarks)
        elif msg["value"] is None and msg["name"] not in (self._free or ()):
            self._miss(msg)

    def _miss(self, msg: Any) -> None:
        if not is_marked(msg):
            _refuse_missing(msg["name"], msg["fn"], self._values)
        if self._free is None:  # a prediction draws the site, a loss sums over it
            raise EnumerableSite


def hold_subsample(msg: Any, held: dict[str, Tensor], bookmarks: Bookmarks | None) -> None:
    """Give a subsampling plate the indices that it drew the first time, and leave the random stream as it did then."""
    name = msg["name"]
    if name not in held:
        with unmapped():
            held[name] = msg["fn"](*msg["args"], **msg["kwargs"])
    if bookmarks is not None:
        bookmarks.keep(name)
    msg["value"], msg["done"] = held[name], True


def _refuse_enumeration(name: str, fn: Any, infer: Any) -> None:
    how = infer.get("enumerate") if infer else None
    if how and infer.get("num_samples") is not None:
        raise NotImplementedError(
            f"guide site '{name}' is marked for {infer['num_samples']} local samples (config_enumerate with "
            "num_samples): SAM_ELBO draws one noise per particle. Take the mark away, and use num_particles."
        )
    if how and not is_discrete(fn):
        raise NotImplementedError(
            f"guide site '{name}' is marked to be enumerated (infer={{'enumerate': '{how}'}}): SAM_ELBO draws the "
            "guide's sites, and sums over marked ones of the model. Take the mark away from the guide."
        )


def _refuse_unreparameterised(name: str, fn: Any) -> None:
    if is_discrete(fn):
        raise NotImplementedError(
            f"guide site '{name}' is discrete ({type(unwrap(fn)).__name__}): SAM_ELBO needs continuous latents. "
            "Have it summed out of the model (pyro.infer.config_enumerate), and keep it out of the guide."
        )
    if not getattr(fn, "has_rsample", False):
        raise NotImplementedError(
            f"guide site '{name}' has no reparameterised sampler ({type(unwrap(fn)).__name__}). "
            "Give it a distribution with rsample, such as a transformed Normal."
        )


def _refuse_other_minibatch(name: str, given: Tensor, drawn: Tensor) -> None:
    if given is drawn or (given.shape == drawn.shape and torch.equal(given, drawn)):
        return
    raise ValueError(
        f"plate '{name}' has subsample=indices in the model, and other indices in the guide. Give the guide's plate "
        "the same subsample (an autoguide: create_plates), or neither."
    )


def _refuse_missing(name: str, fn: Any, guide: Mapping[str, Any]) -> None:
    if is_discrete(fn):
        raise ValueError(
            f"latent site '{name}' of the model is discrete ({type(unwrap(fn)).__name__}): SAM_ELBO needs continuous "
            "latents. If it is data, pass the observations to it (obs= in the model). Otherwise have it summed out, by "
            "pyro.infer.config_enumerate on the model or by infer={'enumerate': 'parallel'} at the site, and keep it "
            "out of the guide."
        )
    if name in guide and guide[name]["type"] == "sample":
        raise ValueError(
            f"latent site '{name}' of the model is observed in the guide (poutine.condition or obs= there), so nothing "
            "samples it. Condition the model on the value instead."
        )
    sampled = ", ".join(n for n, site in guide.items() if site["type"] == "sample") or "none"
    raise ValueError(
        f"latent site '{name}' of the model is missing from the guide (guide sites: {sampled}). "
        "Sample it in the guide under the same name, or pass obs= to it in the model."
    )
