r"""The two terms of the loss: :math:`E_q[-\log p(x \mid w)]` at a run's values, and :math:`KL(q \Vert p)`."""

import math
from collections.abc import Iterable
from typing import Any

from pyro.distributions import Delta, Independent, Normal
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_sam._step.enumeration import depends_on, enumerated_dims, is_enumerated, marginal_log_prob
from pyro_sam._step.sites import unwrap


def data_loss(model: Trace) -> Tensor | float:
    """Return minus the sum of the log probabilities of observed sites and factors, scaled and masked.

    Enumerated sites are summed out.
    """
    if enumerated_dims(model):
        return -marginal_log_prob(model)
    return data_loss_of(model.nodes.values())


def data_loss_of(sites: Iterable[Any]) -> Tensor | float:
    """Return the same of some sites, none of them enumerated."""
    total: Tensor | float = 0.0
    for site in sites:
        if site["type"] == "sample" and site["is_observed"]:
            total = total - _log_prob(site, site["value"])
    return total


def latent_sites(trace: Trace) -> dict[str, Any]:
    """Return the latent sample sites of a trace, without enumerated ones."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not (site["is_observed"] or site_is_subsample(site) or is_enumerated(site))
    }


def kl_loss(guide: Trace, model: Trace) -> Tensor | float:
    r"""Return the KL of the guide from the prior, scaled and masked.

    Closed form, scaled and masked as the guide's site is, where :func:`torch.distributions.kl_divergence` knows it;
    otherwise the estimate :math:`\log q(w) - \log p(w)` at the guide run's values. Auxiliary guide sites add
    :math:`\log q`. A Delta is always estimated: its closed form in Pyro leaves out its ``log_density``.

    Args:
        guide: Trace of the guide.
        model: Trace of the model; only its distributions are read, not its values.
    """
    latents, dims = latent_sites(model), enumerated_dims(model)
    kl: Tensor | float = 0.0
    for name, prior in latents.items():
        site = guide.nodes[name]
        if depends_on(prior, dims):
            # the prior is inside of the sum over the enumerated sites
            kl = kl + _log_prob(site, site["value"])
            continue
        kl = kl + kl_of_site(site, prior)
    for name, site in guide.nodes.items():
        if site["type"] == "sample" and name not in model.nodes and not site_is_subsample(site):
            kl = kl + _log_prob(site, site["value"])
    return kl


def kl_of_site(site: Any, prior: Any) -> Tensor | float:
    """Return the term of one latent, given the guide's node and the model's."""
    exact = closed_form(site, prior)
    return _log_prob(site, site["value"]) - _log_prob(prior, site["value"]) if exact is None else exact


def closed_form(guide_site: Any, model_site: Any) -> Tensor | float | None:
    """Return the same where torch knows it whatever the values, else None."""
    if isinstance(unwrap(guide_site["fn"]), Delta):
        return None
    q, p = _without_dims(guide_site["fn"], model_site["fn"])
    if q is not guide_site["fn"] and guide_site["mask"] is None and guide_site["scale"] == 1:
        return kl_divergence(q, p).sum()
    try:
        kl = kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:
        return None
    if isinstance(kl, Tensor):
        return scale_and_mask(kl, guide_site["scale"], guide_site["mask"]).sum()
    # a bool mask of False gives the number 0
    return scale_and_mask(kl, guide_site["scale"], guide_site["mask"]) * math.prod(guide_site["fn"].batch_shape)


def _without_dims(q: Any, p: Any) -> tuple[Any, Any]:
    """Take Independent off two Normals of one shape: where all is summed, it only costs time."""
    inner = tuple(fn.base_dist if isinstance(fn, Independent) else fn for fn in (q, p))
    if all(type(fn) is Normal for fn in inner) and inner[0].shape() == inner[1].shape():
        return inner
    return q, p


def _log_prob(site: Any, value: Any) -> Tensor | float:
    log_prob = site["fn"].log_prob(value, *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
