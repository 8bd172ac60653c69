r"""Which guide sites are Gaussian, and the handler that places a chosen noise there.

A site qualifies when its distribution is a Normal, MultivariateNormal or LowRankMultivariateNormal, also inside
Independent, Masked, Expanded or an invertible TransformedDistribution. Such a site draws its value as
:math:`w = T(e)`, :math:`e \sim N(0, I)`, and this module computes ``T`` for any ``e``, with torch's own arithmetic and
in torch's own order of random numbers.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch import distributions as td

from pyro_sam._base.random_state import RandomState
from pyro_sam._step.enumeration import EnumerableSite, is_marked

CoreNormal = td.Normal | td.MultivariateNormal | td.LowRankMultivariateNormal
FAMILIES: tuple[type[CoreNormal], ...] = (td.Normal, td.MultivariateNormal, td.LowRankMultivariateNormal)
WRAPPERS = (td.Independent, MaskedDistribution, ExpandedDistribution, td.TransformedDistribution)


def unwrap(fn: Any) -> Any:
    """Return the distribution inside Independent, Masked, Expanded and Transformed wrappers."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def why_not_gaussian(fn: Any) -> str | None:
    """Return the reason why ``fn`` carries no Gaussian noise, or None if it does."""
    base = unwrap(fn)
    plain = any(type(base).rsample is family.rsample for family in FAMILIES if isinstance(base, family))
    if not plain or not base.has_rsample:
        return f"{type(base).__name__} is no reparameterised Gaussian"
    while isinstance(fn, WRAPPERS):
        if isinstance(fn, td.TransformedDistribution) and not all(t.bijective for t in fn.transforms):
            return f"{type(fn).__name__} folds the real line: its transform is not invertible"
        fn = fn.base_dist
    return None


@dataclass(frozen=True)
class NoiseSite:
    """One perturbed site of one guide run.

    Args:
        core: The Gaussian inside the wrappers.
        noise: The noise ``e`` as placed, of shape :func:`noise_shape`.
        sample: The value of the Gaussian at the core, before any transform.
        displacement: ``sample - loc``, with the graph to the guide's scale.
        loc: The mean, shaped like ``noise`` (of the values, where the two differ).
        scale: The standard deviation shaped like ``noise``, or None for a full covariance or whitened noise.
        group_size: Number of noise scalars of one batch element, for the norm's scope ``"event"``.
    """

    core: CoreNormal
    noise: Tensor
    sample: Tensor
    displacement: Tensor
    loc: Tensor
    scale: Tensor | None
    group_size: int


def place(fn: Any, noise: Callable[[CoreNormal], Tensor], detach_scale: bool = False) -> tuple[Tensor, NoiseSite]:
    r"""Return the value :math:`T(e)` of ``fn`` at a chosen noise.

    Args:
        fn: A distribution that :func:`why_not_gaussian` has no objection to.
        noise: Called with the Gaussian at the core; returns ``e`` of shape :func:`noise_shape`.
        detach_scale: Whether to cut the value's gradient to the scale (it stays in ``displacement``).
    Returns:
        The value, and the record of the site.
    """
    if isinstance(fn, ExpandedDistribution):
        return place(fn.base_dist.expand(fn.batch_shape), noise, detach_scale)
    if isinstance(fn, td.TransformedDistribution):
        value, site = place(fn.base_dist, noise, detach_scale)
        for transform in fn.transforms:
            value = transform(value)
        return value, site
    if isinstance(fn, td.Independent):
        value, site = place(fn.base_dist, noise, detach_scale)
        event = fn.event_shape.numel() // max(fn.base_dist.event_shape.numel(), 1)
        return value, replace(site, group_size=site.group_size * event)
    if isinstance(fn, MaskedDistribution):
        return place(fn.base_dist, noise, detach_scale)
    e = noise(fn)
    displacement = _displace(fn, e)
    sample = fn.loc + (_displace(fn, e, detach_scale=True) if detach_scale else displacement)
    scale = fn.scale.expand(e.shape) if isinstance(fn, td.Normal) else None
    return sample, NoiseSite(fn, e, sample, displacement, fn.loc, scale, e.shape[-1] if fn.event_shape else 1)


def noise_shape(core: CoreNormal) -> torch.Size:
    """Return the shape of a Gaussian's noise: ``rank + d`` numbers per draw for LowRankMultivariateNormal."""
    shape = core.batch_shape + core.event_shape
    if isinstance(core, td.LowRankMultivariateNormal):
        return torch.Size([*shape[:-1], core.cov_factor.shape[-1] + shape[-1]])
    return shape


def zero_noise(core: CoreNormal) -> Tensor:
    """Return the noise of a Gaussian's mean."""
    return torch.zeros(noise_shape(core), dtype=core.loc.dtype, device=core.loc.device)


def standard_normal(core: CoreNormal) -> Tensor:
    """Draw a Gaussian's noise, in the order in which its own ``rsample`` would."""
    randn = partial(torch.randn, dtype=core.loc.dtype, device=core.loc.device)
    if isinstance(core, td.LowRankMultivariateNormal):
        shape = core.batch_shape + core.event_shape
        factor = randn(shape[:-1] + core.cov_factor.shape[-1:])
        return torch.cat([factor, randn(shape)], -1)
    return randn(noise_shape(core))


def _displace(core: CoreNormal, e: Tensor, detach_scale: bool = False) -> Tensor:
    def part(tensor: Tensor) -> Tensor:
        return tensor.detach() if detach_scale else tensor

    if isinstance(core, td.Normal):
        return e * part(core.scale)
    if isinstance(core, td.MultivariateNormal):
        return (part(core._unbroadcasted_scale_tril) @ e.unsqueeze(-1)).squeeze(-1)
    rank = core.cov_factor.shape[-1]
    along_factor = (part(core._unbroadcasted_cov_factor) @ e[..., :rank].unsqueeze(-1)).squeeze(-1)
    return along_factor + part(core._unbroadcasted_cov_diag).sqrt() * e[..., rank:]


def pull_back(core: CoreNormal, gradient: Tensor) -> Tensor:
    """Return the gradient in a Gaussian's noise, given the one in its value."""
    if isinstance(core, td.Normal):
        return gradient * core.scale
    if isinstance(core, td.MultivariateNormal):
        return (core._unbroadcasted_scale_tril.mT @ gradient.unsqueeze(-1)).squeeze(-1)
    along_factor = (core._unbroadcasted_cov_factor.mT @ gradient.unsqueeze(-1)).squeeze(-1)
    return torch.cat([along_factor, core._unbroadcasted_cov_diag.sqrt() * gradient], -1)


class NoiseMessenger(Messenger):
    """Place noise at the Gaussian sites of a guide run, and record them in ``sites``.

    Args:
        noise: Called with the site's name and its core Gaussian; returns the noise.
        hidden: Tells from its name whether a site is left at its own random sample.
        held: Noise of hidden sites and indices of subsampling plates. Filled by the first run, used by later ones.
        bookmarks: States of the random stream after each draw at a Gaussian site. Filled by the run that draws;
            later runs jump to them, so that all other draws (encoder dropout, other sites) repeat.
        detach_scale: Whether values have no gradient to the scale.
    """

    def __init__(
        self,
        noise: Callable[[str, CoreNormal], Tensor],
        hidden: Callable[[str], bool],
        held: dict[str, Tensor],
        bookmarks: dict[str, RandomState] | None,
        detach_scale: bool = False,
    ) -> None:
        super().__init__()
        self._noise = noise
        self._hidden = hidden
        self._held = held
        self._bookmarks = bookmarks
        self._detach_scale = detach_scale
        self.sites: dict[str, NoiseSite] = {}
        self.unperturbed: dict[str, str] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or msg["value"] is not None:
            return
        name, fn = msg["name"], msg["fn"]
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
            self.sites[name] = replace(site, scale=None) if _is_whitened(msg, site) else site
        msg["done"] = True
        _keep_stream(name, self._bookmarks)

    def _hidden_noise(self, name: str, core: CoreNormal) -> Tensor:
        if name not in self._held:
            self._held[name] = standard_normal(core)
        return self._held[name]


class ReplayMessenger(Messenger):
    """Replay a guide's values in the model, and hold the model's own subsample indices over several runs.

    Args:
        values: The guide's messages by site name.
        held: Indices of the model's subsampling plates. Filled by the first run, used by later ones.
        bookmarks: States of the random stream after each draw of such indices, likewise; None for a single run.
        free: For predictions, names of the latent sites that the model may sample itself.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        held: dict[str, Tensor],
        bookmarks: dict[str, RandomState] | None = None,
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


def hold_subsample(msg: Any, held: dict[str, Tensor], bookmarks: dict[str, RandomState] | None) -> None:
    """Give a subsampling plate the indices that it drew the first time, and leave the random stream as it did then."""
    name = msg["name"]
    if name not in held:
        held[name] = msg["fn"](*msg["args"], **msg["kwargs"])
    _keep_stream(name, bookmarks)
    msg["value"], msg["done"] = held[name], True


def _keep_stream(name: str, bookmarks: dict[str, RandomState] | None) -> None:
    """Jump to where the random stream was after ``name`` the first time, or make a note of it."""
    if bookmarks is None:
        return
    if name in bookmarks:
        bookmarks[name].restore()
    else:
        bookmarks[name] = RandomState.capture()


def _is_whitened(msg: Any, site: NoiseSite) -> bool:
    """Return whether an auxiliary site is N(0, 1) for good: its guide applies loc and scale later, out of sight."""
    if not msg["infer"].get("is_auxiliary") or site.scale is None:
        return False
    if site.loc.requires_grad or site.scale.requires_grad:
        return False
    return bool((site.loc == 0).all() and (site.scale == 1).all())


def is_discrete(fn: Any) -> bool:
    """Return whether a distribution's support is discrete."""
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):
        return False


def _refuse_unreparameterised(name: str, fn: Any) -> None:
    if is_discrete(fn):
        raise ValueError(
            f"guide site '{name}' is discrete ({type(unwrap(fn)).__name__}): SAM_ELBO needs continuous latents. "
            "Have it summed out of the model (pyro.infer.config_enumerate), and keep it out of the guide."
        )
    if not getattr(fn, "has_rsample", False):
        raise ValueError(
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
            "latents. Have it summed out, by pyro.infer.config_enumerate on the model or by "
            "infer={'enumerate': 'parallel'} at the site, and keep it out of the guide."
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
