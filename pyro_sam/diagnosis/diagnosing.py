r"""The diagnosis of a model and a guide: what came of training, and which setting to change."""

from collections.abc import Mapping
from typing import Any

from pyro.infer import SVI

from pyro_sam._base.cures import explained
from pyro_sam._base.replicas import replicas_of
from pyro_sam._base.surroundings import Surroundings
from pyro_sam._step.call import Call
from pyro_sam._step.knowledge import Pair
from pyro_sam._step.settings import Settings
from pyro_sam.diagnosis.causes import Causes
from pyro_sam.diagnosis.findings import find, is_doubtful
from pyro_sam.diagnosis.measure import Measured, measure, untouched
from pyro_sam.diagnosis.report import Diagnosis, Problem
from pyro_sam.diagnosis.sites import describe
from pyro_sam.elbo import SAM_ELBO
from pyro_sam.perturbation import Gaussian
from pyro_sam.predictive.streaming import check_pair

_NUM_SAMPLES = 32
_FEW = 2


def diagnose(svi: SVI, *args: Any, **kwargs: Any) -> Diagnosis:
    r"""Say what came of a training so far, what is wrong, and which setting to change.

    Guide and model run at the guide's mean, at 32 samples of it and at the noise that the law chooses, all with the
    same minibatch and dropout. What they say of the observations is compared with the best constant prediction, and
    the guide with the prior. Nothing changes: no random stream, parameter, gradient or buffer, not the param store nor
    the optimiser's state.

    Args:
        svi: Model, guide and loss. A loss of Pyro's counts as mean-field VI.
        *args: Arguments of model and guide, observations included: the data, or a good part of them (say 1000 rows)
            inside of a plate that knows the size of all.
        **kwargs: Likewise.
    Returns:
        The :class:`~pyro_sam.diagnosis.Diagnosis`; ``print`` it.
    Raises:
        ValueError: If ``svi`` is no SVI, the guide was not trained yet, has replicas (diagnose ``guide.replica(r)``) or
            no Gaussian site, or model and guide do not fit together.
    """
    return _diagnose(svi, args, kwargs)


def problems(svi: SVI, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Problem, ...]:
    """Return the findings alone, at little cost where there are none: two samples tell that a network is well.

    Raises:
        ValueError: As :func:`diagnose`.
    """
    call, settings, seen = _prepared(svi, args, kwargs)
    with untouched(call, seen):
        if not is_doubtful(measure(call, settings, _FEW)):
            return ()
        measured = measure(call, settings, _NUM_SAMPLES)
        return tuple(find(measured, Causes(call, measured, seen.modules)))


def _diagnose(svi: SVI, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Diagnosis:
    call, settings, seen = _prepared(svi, args, kwargs)
    with untouched(call, seen):
        measured = _measure(call, settings)
        sites = describe(measured.samples)
        found = tuple(find(measured, Causes(call, measured, seen.modules)))
    return Diagnosis(sites, sum(site.kl for site in sites), measured.kl_weight, measured.data, found)


def _measure(call: Call, settings: Settings) -> Measured:
    """Measure, with errors that say what to change in the user's own arguments."""

    @explained
    def run(*args: Any, **kwargs: Any) -> Measured:
        return measure(call, settings, _NUM_SAMPLES)

    return run(*call.args, **call.kwargs)


def _prepared(svi: SVI, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Call, Settings, Surroundings]:
    """Return the call, the settings of its estimator, and what it can see."""
    if not isinstance(svi, SVI):
        raise ValueError(f"svi must be a pyro.infer.SVI, got {svi!r}.")
    check_pair(svi.model, svi.guide)
    if (replicas := replicas_of(svi.guide)) is not None:
        raise ValueError(
            f"the guide has {replicas} replicas: diagnose guide.replica(r), in an SVI whose loss has its numbers."
        )
    elbo = getattr(svi.loss, "__self__", None)
    settings = elbo._settings if isinstance(elbo, SAM_ELBO) else Settings(perturbation=Gaussian())
    settings.check_replicas(None)
    pair = Pair(svi.model, svi.guide)
    call = pair.complete(Call(svi.model, svi.guide, args, kwargs), fast=False)
    return call, settings, pair.surroundings(call)
