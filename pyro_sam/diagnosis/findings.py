r"""What is wrong, by criteria that each have a reason, and thresholds that were measured on some sixty trainings.

Only networks are judged (a :class:`~pyro_sam.BayesianModule`, or at least a hundred latent scalars that are no data
point's own): elsewhere a constant may be the right prediction, as it nearly is of eight schools.
"""

from collections.abc import Iterator

from pyro_sam._step.loss import latent_sites
from pyro_sam.diagnosis.causes import Causes, round_value
from pyro_sam.diagnosis.measure import Measured
from pyro_sam.diagnosis.report import Data, Problem
from pyro_sam.perturbation import AscendedSample

_MANY = 100
_FEW = 16  # rows, on which the best constant is better than it is
# Nats an observation. 0.02 are worth 4 % of a Normal's variance; collapsed networks were between -0.1 and 0.005, a
# wine's quality, the weakest signal that was tried, gives 0.2.
_EVEN = 0.02
# Share of the mean network's gain that the posterior loses on the same data. Samples of a posterior that trained well
# lose up to 0.17; adversaries close to the mean, which leave the scales to the KL, 0.22 to 1.5.
_LOST = 0.2
_LOST_NATS = 0.1
_LITTLE = 0.5  # share of what the data can give


def find(measured: Measured, causes: Causes) -> Iterator[Problem]:
    """Yield what is wrong; nothing where it cannot be judged."""
    data = measured.data
    if data is None:
        yield Problem("no data", "The model observes nothing, so that only the KL is learnt.", "obs", "y")
    elif (
        data.constant is not None
        and data.predictive is not None
        and measured.rows >= _FEW
        and _is_network(measured, causes)
    ):
        yield from _of_network(data.predictive, data.constant, data, measured, causes)


def is_doubtful(measured: Measured) -> bool:
    """Return whether a few samples leave the possibility of a finding, which takes more of them to tell."""
    data = measured.data
    if data is None:
        return True
    if data.constant is None or data.predictive is None or measured.rows < _FEW:
        return False
    gain, n = data.constant - data.at_mean, data.observations
    return gain < _EVEN * n or data.predictive - data.at_mean > max(_LOST * gain, _LOST_NATS * n)


def _of_network(
    predictive: float, constant: float, data: Data, measured: Measured, causes: Causes
) -> Iterator[Problem]:
    n, gain, gain_of_mean = data.observations, constant - predictive, constant - data.at_mean
    numbers = (
        f"{predictive / n:.3g} nats an observation, {data.at_mean / n:.3g} by its mean network, {constant / n:.3g} by "
        "the best constant."
    )
    if max(gain, gain_of_mean) < _EVEN * n:
        yield from causes.problems(f"The posterior predicts no better than a constant: {numbers}")
        return
    if gain < _LITTLE * causes.nats:
        poor = [*causes.poor(f"The posterior has learnt little: it predicts with {numbers}")]
        if poor:
            yield from poor
            return
    if predictive - data.at_mean > max(_LOST * gain_of_mean, _LOST_NATS * n):
        yield from _narrower(f"The posterior is too wide: it predicts with {numbers}", measured, causes)


def _narrower(what: str, measured: Measured, causes: Causes) -> Iterator[Problem]:
    law = measured.settings.perturbation
    if law.ascends_from_mean:
        why = f"{what} {law!r} leaves most scales to the KL."
        yield Problem("wide", why, "perturbation", AscendedSample())
    else:
        yield Problem("wide", what, "kl_weight", round_value(measured.kl_weight / 10))
    yield from causes.wide_start(what, "wide")


def _is_network(measured: Measured, causes: Causes) -> bool:
    latents = latent_sites(measured.mean.model).values()
    shared = [site for site in latents if not any(frame.vectorized for frame in site["cond_indep_stack"])]
    return bool(causes.weights) or sum(site["value"].numel() for site in shared) >= _MANY
