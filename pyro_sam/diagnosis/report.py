"""What a diagnosis says: numbers site by site, the data term beside others, and findings with their cures."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One finding.

    Attributes:
        kind: Short name: ``"collapsed"``, ``"untrained"``, ``"wide"``, ``"far"``, ``"near"``, ``"no data"``.
        what: What is wrong, in words, with the numbers that show it.
        setting: The setting to change.
        value: The value to try: a number, or what to write.
    """

    kind: str
    what: str
    setting: str
    value: Any

    def __str__(self) -> str:
        return f"{self.what} Try {self.setting}={self.value}."


@dataclass(frozen=True)
class Site:
    """One latent site of the guide.

    Attributes:
        name: Name in the model.
        size: Number of scalars.
        kl: KL of the guide from the prior in nats, unweighted.
        at_prior: Share of scalars whose own KL is below 0.02 nats, so within 0.2 prior standard deviations of the
            prior's loc and 20 % of its scale; None unless guide and prior are both elementwise Normal.
        signal_to_noise: Median of abs(loc) / scale over the scalars; None for a full covariance.
    """

    name: str
    size: int
    kl: float
    at_prior: float | None
    signal_to_noise: float | None


@dataclass(frozen=True)
class Diagnosis:
    r"""What :func:`diagnose` found. ``str()`` of it is a page to read.

    All numbers are nats over the whole data set, as the model's plates scale it. Data terms are minus log likelihoods:

    ================== ===============================================================================
    ``at_mean``        :math:`-\log p(y \mid \mathrm{loc})`, of the mean network
    ``at_samples``     :math:`-E_q \log p(y \mid w)`, the ELBO's data term
    ``at_noise``       at the noise that the law chooses
    ``predictive``     :math:`-\sum_n \log E_q\, p(y_n \mid w)`; None for a model with enumerated sites
    ``constant``       of the best distribution of the same family that is one for all observations; None where the
                       family's is not known
    ================== ===============================================================================

    Attributes:
        sites: The latent sites.
        observations: Number of observations; 0 where nothing is observed.
        kl: KL of the guide from the prior, unweighted.
        kl_weight: Its weight in the loss.
        problems: The findings, none for a model that trains well.
    """

    sites: tuple[Site, ...]
    observations: float
    kl: float
    kl_weight: float
    at_mean: float | None
    at_samples: float | None
    at_noise: float | None
    predictive: float | None
    constant: float | None
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        return "\n".join([*self._table(), "", *self._terms(), "", *self._findings()])

    def _table(self) -> list[str]:
        width = max([len("site"), *(len(site.name) for site in self.sites)])
        head = f"{'site':<{width}} {'scalars':>9} {'KL':>10} {'at prior':>9} {'|loc|/scale':>12}"
        rows = [
            f"{s.name:<{width}} {s.size:>9} {s.kl:>10.4g} {_percent(s.at_prior):>9} {_number(s.signal_to_noise):>12}"
            for s in self.sites
        ]
        return [head, *rows]

    def _terms(self) -> list[str]:
        named = {
            "best constant prediction": self.constant,
            "mean network": self.at_mean,
            "posterior predictive": self.predictive,
            "samples, the ELBO's data term": self.at_samples,
            "at the law's noise": self.at_noise,
        }
        n = self.observations
        rows = [f"  {what:<30} {value / n:>10.4g}" for what, value in named.items() if value is not None and n]
        weight = f"KL {self.kl:.4g} nats, kl_weight={self.kl_weight:g}"
        return [f"{weight}; minus log likelihood per observation, of {n:g}:", *rows] if rows else [weight]

    def _findings(self) -> list[str]:
        return [f"- {problem}" for problem in self.problems] or ["Nothing looks wrong."]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
