r"""What a diagnosis is drawn from: runs of guide and model at chosen noise that leave no trace."""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.random_state import RandomState
from pyro_sam._step.call import Call
from pyro_sam._step.enumeration import enumerated_dims
from pyro_sam._step.knowledge import Pair
from pyro_sam._step.ordinary import OrdinaryPasses, OrdinaryRan
from pyro_sam._step.settings import Settings
from pyro_sam._step.space import Space
from pyro_sam.diagnosis.constant import best_constant
from pyro_sam.diagnosis.report import Data
from pyro_sam.perturbation import Gaussian, Mean


@dataclass(frozen=True)
class Measured:
    """Runs at the mean and at samples, and the data term's values there."""

    settings: Settings
    kl_weight: float
    mean: OrdinaryRan
    samples: list[OrdinaryRan]
    data: Data | None

    @property
    def rows(self) -> int:
        """Number of observations at hand, not scaled."""
        return max((_weight(site).numel() for site in observed_sites(self.mean.model).values()), default=0)


@contextmanager
def untouched(call: Call, seen: Any) -> Iterator[None]:
    """Undo what the body does to random streams, buffers, param store and plain values that the model can see."""
    before = RandomState.capture(call.streams)
    store = pyro.get_param_store()
    names = set(store.keys())
    try:
        with kept_buffers(call.modules), torch.no_grad(), poutine.block(), warnings.catch_warnings(), _unlogged():
            warnings.simplefilter("ignore")  # they were said in training
            yield
    finally:
        before.restore()
        seen.restore()
        for name in set(store.keys()) - names:
            del store[name]


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep Pyro from logging the nesting of plates, which it finds out again."""
    logger = logging.getLogger("pyro.infer.elbo")
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(record: Any) -> bool:
    return False


def measure(call: Call, settings: Settings, num_samples: int) -> Measured:
    """Run guide and model at the mean, at samples and at the law's noise; minibatch and dropout are the same in all.

    Args:
        call: Model, guide and arguments.
        settings: The estimator's settings.
        num_samples: Number of samples of the guide.
    """
    settings = replace(
        settings, num_particles=1, vectorize_particles=False, ascent="fresh", scale_gradient="perturbed",
        sync_ascent=False, compile=False, fast=False,
    )  # fmt: skip
    law = settings.perturbation
    pair = Pair(call.model, call.guide)
    # any law but Gaussian() lets all passes share what they draw
    shared = Mean() if isinstance(law, Gaussian) else law
    passes = OrdinaryPasses(call, pair, settings, shared, lambda: -1 - pair.nesting(settings, call))
    mean = passes.descend(passes.zeros())
    samples = [passes.descend(passes.gaussian()) for _ in range(num_samples)]
    noise = None
    if not isinstance(law, Gaussian | Mean):
        noise = passes.descend(Space(passes, law, settings, 0.0, None).noise())
    weight: Any = settings.kl_weight  # one, as there are no replicas
    return Measured(settings, float(weight), mean, samples, _data(mean, samples, noise))


def observed_sites(model: Trace) -> dict[str, Any]:
    """Return the sites that hold data: observed, and no ``pyro.deterministic``."""
    return {
        name: site
        for name, site in model.nodes.items()
        if site["type"] == "sample" and site["is_observed"] and not (site["infer"] or {}).get("_deterministic")
    }


def _data(mean: OrdinaryRan, samples: list[OrdinaryRan], noise: OrdinaryRan | None) -> Data | None:
    sites = observed_sites(mean.model)
    if not sites:
        return None
    at_samples = sum(float(run.data_loss) for run in samples) / len(samples)
    predictive: float | None = None
    constant: float | None = None
    if not enumerated_dims(mean.model):
        predictive = _sum(sites, lambda name, site: _mixed(name, samples))
        constant = _sum(sites, lambda name, site: best_constant(site["fn"], site["value"], _weight(site)))
    return Data(
        observations=sum(float(_weight(site).sum()) for site in sites.values()),
        at_mean=float(mean.data_loss),
        at_samples=at_samples,
        at_noise=at_samples if noise is None else float(noise.data_loss),
        predictive=predictive,
        constant=constant,
    )


def _sum(sites: Mapping[str, Any], log_prob: Callable[[str, Any], Tensor | None]) -> float | None:
    """Return minus the weighted sum of log probabilities over all sites; None if one has none."""
    total = 0.0
    for name, site in sites.items():
        found = log_prob(name, site)
        if found is None:
            return None
        total -= float((_weight(site) * found).sum())
    return total


def _mixed(name: str, samples: list[OrdinaryRan]) -> Tensor:
    nodes: list[Any] = [run.model.nodes[name] for run in samples]
    each = torch.stack([node["fn"].log_prob(node["value"]) for node in nodes])
    return each.logsumexp(0) - math.log(len(samples))


def _weight(site: Any) -> Tensor:
    """Return scale and mask of a site's observations, shaped like its log probabilities."""
    fn, value = site["fn"], site["value"]
    like = value if value.is_floating_point() else torch.zeros((), device=value.device)
    weight = torch.as_tensor(site["scale"], device=value.device).to(like.dtype)
    if site["mask"] is not None:
        weight = weight * torch.as_tensor(site["mask"], device=value.device)
    # an enumerated site has dimensions that its observations have not
    return weight.expand(value.shape[: value.dim() - len(fn.event_shape)])
