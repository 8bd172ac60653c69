"""The diagnosis of a model, a guide and their training."""

from collections.abc import Callable
from typing import Any

from pyro.infer import SVI

from pyro_sam._base.cures import explained
from pyro_sam._step.call import Call
from pyro_sam._step.knowledge import Pair
from pyro_sam._step.loss import latent_sites
from pyro_sam._step.settings import Settings
from pyro_sam.diagnosis.causes import Causes
from pyro_sam.diagnosis.measure import Measured, measure, untouched
from pyro_sam.diagnosis.report import Diagnosis, Problem
from pyro_sam.diagnosis.sites import describe
from pyro_sam.elbo import SAM_ELBO
from pyro_sam.perturbation import AscendedSample, Gaussian
from pyro_sam.predictive.streaming import check_pair

_NUM_SAMPLES = 32
_EVEN = 0.02  # nats an observation, as 4 % of the variance of a Normal are worth
_MANY = 100  # latent scalars: a network, where a constant prediction is no answer
# A posterior that trains well loses 0.01 to 0.18 of what its mean network gains; Adversarial() on digits 0.78.
_LOST = 0.22
_LOST_NATS = 0.1


def diagnose(svi: SVI, *args: Any, **kwargs: Any) -> Diagnosis:
    """Say."""
    return examine(svi, args, kwargs, _NUM_SAMPLES)


@explained
def _examine(model: Callable[..., Any], guide: Callable[..., Any], settings: Settings, num_samples: int, args: Any, kwargs: Any) -> Diagnosis:
    pair = Pair(model, guide)
    call = pair.complete(Call(model, guide, args, kwargs), fast=False)
    seen = pair.surroundings(call)
    with untouched(call, seen):
        measured = measure(call, settings, num_samples)
        sites = describe(measured.samples)
        problems = tuple(_problems(call, measured, Causes(call, measured, seen.modules)))
    data = measured.data
    return Diagnosis(
        sites, data.observations if data else 0.0, sum(site.kl for site in sites), settings.kl_weight,
        *((data.at_mean, data.at_samples, data.at_noise, data.predictive, data.constant) if data else [None] * 5),
        problems,
    )


def examine(svi, args, kwargs, num_samples):
    elbo = getattr(svi.loss, "__self__", None)
    settings = elbo._settings if isinstance(elbo, SAM_ELBO) else Settings(perturbation=Gaussian())
    check_pair(svi.model, svi.guide)
    return _examine(svi.model, svi.guide, settings, num_samples, args, kwargs)


def _problems(call: Call, measured: Measured, causes: Causes):
    data = measured.data
    if data is None:
        yield Problem("no data", "The model observes nothing, so that only the KL is learnt.", "obs", "y")
        return
    if data.constant is None or data.predictive is None or not _is_network(measured, causes):
        return
    n = data.observations
    numbers = (
        f"{data.predictive / n:.3f} nats an observation, {data.at_mean / n:.3f} by its mean network, "
        f"{data.constant / n:.3f} by the best constant."
    )
    gain, gain_of_mean = data.constant - data.predictive, data.constant - data.at_mean
    if max(gain, gain_of_mean) < _EVEN * n:
        yield from causes.problems(f"The posterior predicts no better than a constant: {numbers}")
        return
    if gain < 0.5 * causes.nats and (poor := [*causes.poor(f"The posterior has learnt little: it predicts with {numbers}")]):
        yield from poor
    elif data.predictive - data.at_mean > max(_LOST * gain_of_mean, _LOST_NATS * n):
        what = f"The posterior is too wide: it predicts with {numbers}"
        law, weight = measured.settings.perturbation, measured.settings.kl_weight
        if law.ascends_from_mean:
            yield Problem("wide", f"{what} The law hardly shows the likelihood what the scales do.", "perturbation", AscendedSample())
        else:
            yield Problem("wide", what, "kl_weight", weight / 10)
        yield from causes.wide_start(what)


def _is_network(measured: Measured, causes: Causes) -> bool:
    sites = [s for s in latent_sites(measured.mean.model).values() if not any(f.vectorized for f in s["cond_indep_stack"])]
    return bool(causes.weights) or sum(s["value"].numel() for s in sites) >= _MANY
