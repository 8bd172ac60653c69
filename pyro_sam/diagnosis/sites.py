"""The latent sites one by one: KL, share of scalars at the prior, signal-to-noise."""

from collections.abc import Collection
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch import distributions as td

from pyro_sam._step.enumeration import depends_on, enumerated_dims
from pyro_sam._step.loss import kl_of_site, latent_sites
from pyro_sam._step.ordinary import OrdinaryRan
from pyro_sam._step.sites import NoiseSite, unwrap
from pyro_sam.diagnosis.report import Site

# nats: the KL of a Normal whose loc is 0.2 standard deviations off, or whose scale is 15 to 20 % off
AT_PRIOR = 0.02
_NORMALS = tuple({td.Normal, pyro.distributions.Normal})
_SUFFIX = "_unconstrained"  # of the auxiliary sites of Pyro's AutoNormal


def describe(samples: list[OrdinaryRan]) -> tuple[Site, ...]:
    """Return what is said of each latent, given runs at samples of the guide.

    A guide's site that stands for several latents is one.
    """
    first = samples[0]
    left, found = dict.fromkeys(latent_sites(first.model)), []
    auxiliary = [name for name in first.guide.sites if _latent(name) not in left]
    for name in (name for name in first.guide.sites if name not in auxiliary):
        left.pop(_latent(name))
        found.append(_site(_latent(name), [_latent(name)], name, samples))
    for name in auxiliary[:1]:
        found.append(_site(name, left, name, samples))
        left = {}
    return *found, *(_site(name, [name], None, samples) for name in left)


def elementwise_kl(site: NoiseSite, q: Any, prior: Any) -> Tensor | None:
    """Return the KL of each scalar of a latent; None unless guide and prior are elementwise Normal."""
    p = unwrap(prior["fn"])
    plain = not any(_is_transformed(node["fn"]) for node in (q, prior))
    if site.scale is None or type(p) not in _NORMALS or not plain or p.loc.numel() > site.scale.numel():
        return None
    if q["value"] is not site.sample and not torch.equal(q["value"], site.sample):  # an autoguide's transform
        return None
    return td.kl_divergence(td.Normal(site.loc, site.scale), td.Normal(p.loc, p.scale))


def _site(label: str, latents: Collection[str], noise: str | None, samples: list[OrdinaryRan]) -> Site:
    run = samples[0]
    kl = sum(_kl(run, latents, noise) for run in samples) / len(samples)
    if noise is None:
        value: Any = run.model.nodes[label]["value"]
        return Site(label, value.numel(), kl, None, None)
    site, each = run.guide.sites[noise], None
    if label in latents:
        each = elementwise_kl(site, run.guide.trace.nodes[label], run.model.nodes[label])
    at_prior = None if each is None else float((each < AT_PRIOR).double().mean())
    ratio = None if site.scale is None else float((site.loc.abs() / site.scale).median())
    return Site(label, site.noise.numel(), kl, at_prior, ratio)


def _kl(run: OrdinaryRan, latents: Collection[str], noise: str | None) -> float:
    guide, dims = run.guide.trace.nodes, enumerated_dims(run.model)
    kl: Any = 0.0
    for name in latents:
        prior = run.model.nodes[name]
        kl = kl + (_log_prob(guide[name]) if depends_on(prior, dims) else kl_of_site(guide[name], prior))
    if noise is not None and noise not in latents:
        kl = kl + _log_prob(guide[noise])
    return float(kl)


def _log_prob(site: Any) -> Any:
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"]).sum()


def _latent(name: str) -> str:
    return name.removesuffix(_SUFFIX)


def _is_transformed(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        if isinstance(fn, td.TransformedDistribution):
            return True
        fn = fn.base_dist
    return False
