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
class Data:
    r"""The data term and its kin: minus log likelihoods in nats over the whole data set, as the plates scale it.

    Attributes:
        observations: Number of observations.
        constant: Of the best distribution of the same family that is one for all observations; None where the family's
            is not known, or with enumerated sites.
        at_mean: :math:`-\log p(y \mid \mathrm{loc})`, of the mean network.
        predictive: :math:`-\sum_n \log E_q\, p(y_n \mid w)`; None with enumerated sites.
        at_samples: :math:`-E_q \log p(y \mid w)`, the ELBO's data term.
        at_noise: At the noise that the law chooses.
    """

    observations: float
    constant: float | None
    at_mean: float
    predictive: float | None
    at_samples: float
    at_noise: float


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`pyro_sam.diagnose` found. ``str()`` of it is a page to read.

    Attributes:
        sites: The latent sites.
        kl: KL of the guide from the prior in nats, unweighted.
        kl_weight: Its weight in the loss.
        data: The data term beside others; None where nothing is observed.
        problems: The findings, none for a network that trains well.
    """

    sites: tuple[Site, ...]
    kl: float
    kl_weight: float
    data: Data | None
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
        weight = f"KL {self.kl:.4g} nats, kl_weight={self.kl_weight:g}"
        if self.data is None:
            return [weight]
        n, named = self.data.observations, {label: getattr(self.data, name) for name, label in _LABELS.items()}
        rows = [f"  {label:<30} {value / n:>10.4g}" for label, value in named.items() if value is not None]
        return [f"{weight}; minus log likelihood per observation, of {n:g}:", *rows]

    def _findings(self) -> list[str]:
        return [f"- {problem}" for problem in self.problems] or ["Nothing looks wrong."]


_LABELS = {
    "constant": "best constant prediction",
    "at_mean": "mean network",
    "predictive": "posterior predictive",
    "at_samples": "samples, the ELBO's data term",
    "at_noise": "at the law's noise",
}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
