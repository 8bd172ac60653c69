r"""Which guide sites are Gaussian, and their value at a chosen noise.

A site qualifies when its distribution is a Normal, MultivariateNormal or LowRankMultivariateNormal, also inside
Independent, Masked, Expanded or an invertible TransformedDistribution. Such a site draws its value as
:math:`w = T(e)`, :math:`e \sim N(0, I)`, and this module computes ``T`` for any ``e``, with torch's own arithmetic and
in torch's own order of random numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch import distributions as td

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


def is_whitened(msg: Any, site: NoiseSite) -> bool:
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
