r"""The methods of the study: which law, which guide, what is tuned, what a step costs.

Every space has ``kl_weight`` (0.0003 to 1) and ``lr`` (0.0003 to 0.03; bSAM's, of another kind, 0.01 to 3), both on a
log scale, and every radius begins at 0. The first trial of each that Pyro's SVI trains has ``kl_weight`` 1 and
``alpha`` 0.
"""

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

import pyro_sam as ps
from pyro_sam.study.survey.laws import Antithetic

Numbers = Mapping[str, Any]  # a vector with a number for each replica
Guide = Literal["point", "radius", "learnt"]
_INIT_SCALE, _POINT_SCALE = 0.02, 1e-4


@dataclass(frozen=True)
class Method:
    """A method.

    Args:
        name: Name on the command line.
        summary: What it is, one line.
        law: Makes the law of the noise from the numbers of R replicas.
        space: Range of each of its own numbers.
        cost: Gradients a step, on average.
        guide: ``"point"`` for a tiny fixed scale, ``"radius"`` for the fixed scale ``rho / sqrt(d)``, ``"learnt"``.
        elbo: Further arguments of the estimator.
        like: Method whose tuned settings it takes; None to be tuned itself.
        budget: Its gradients over those of the others.
        members: Networks whose predictions are mixed.
        mixes: How many it may mix in the place of one, as validation rows decide; 1 for a method with no choice.
        zero: Its number that may be 0, where it is plain variational inference or a network without a climb.
        own: Whether it has an optimiser of its own in the place of Pyro's SVI.
        plain: Whether that trains a network without Pyro, one run after another.
        outside: Whether it is none of the library's methods.
        needs: Module of a further package that it is from.
    """

    name: str
    summary: str
    law: Callable[[Numbers], ps.Perturbation]
    space: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    cost: float = 2.0
    guide: Guide = "learnt"
    elbo: Mapping[str, Any] = field(default_factory=dict)
    like: str | None = None
    budget: float = 1.0
    members: int = 1
    mixes: int = 1
    zero: str | None = None
    own: bool = False
    plain: bool = False
    outside: bool = False
    needs: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the package that it is from is there."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    def of(self, settings: Mapping[str, float]) -> "Method":
        """Return the method with the number of members that settings choose; itself where they choose none."""
        return replace(self, members=int(settings["members"])) if "members" in settings else self

    def distributions(self) -> dict[str, Any]:
        """Return what is searched, as Optuna's distributions by name."""
        from optuna.distributions import FloatDistribution

        shared = {"kl_weight": FloatDistribution(3e-4, 1.0, log=True), "lr": FloatDistribution(3e-4, 3e-2, log=True)}
        return {**shared, **{name: FloatDistribution(*each) for name, each in self.space.items()}}

    def estimator(self, numbers: Numbers) -> ps.SAM_ELBO:
        """Return the estimator of R replicas."""
        return ps.SAM_ELBO(self.law(numbers), kl_weight=numbers["kl_weight"], **self.elbo)

    def posterior(self, model: Callable[..., Any], num_weights: int, numbers: Numbers) -> ps.MeanFieldNormal:
        """Return the guide of R replicas."""
        replicas = len(numbers["kl_weight"])
        scale = torch.full((replicas,), _INIT_SCALE if self.guide == "learnt" else _POINT_SCALE)
        scale = numbers.get("init_scale", scale)
        if self.guide == "radius":
            scale = (numbers["rho"] / math.sqrt(num_weights)).clamp_min(_POINT_SCALE)
        asked: Counter[str] = Counter()

        def one_each(site: Any) -> float:
            r = asked[site["name"]] % replicas  # a guide asks once for each replica, in their order
            asked[site["name"]] += 1
            return float(scale[r])

        return ps.MeanFieldNormal(model, init_scale=one_each, learn_scale=self.guide == "learnt", num_replicas=replicas)


_CLIMB = {"alpha": (0.0, 10.0)}
_ALPHA, _RADIUS, _KAPPA = {"alpha": (-3.0, 15.0)}, {"rho": (0.0, 15.0)}, {"kappa": (0.0, 3.0)}
_SAM, _ASAM, _FIXED = {"rho": (0.0, 0.5)}, {"rho": (0.0, 3.0)}, {"rho": (0.0, 2.0)}
_BSAM = {"rho": (0.0, 2.0), "lr": (1e-2, 3.0, True)}
_SWAG, _DROPOUT = {"swa_lr": (1e-4, 1e-2, True)}, {"rate": (0.0, 0.5)}
_PREVIOUS: dict[str, Any] = {"ascent": "previous"}


def _mean(numbers: Numbers) -> ps.Perturbation:
    return ps.Mean()


def _gaussian(numbers: Numbers) -> ps.Perturbation:
    return ps.Gaussian()


def _sam(numbers: Numbers) -> ps.Perturbation:
    return ps.Adversarial(numbers["rho"], geometry="euclidean")


def _asam(numbers: Numbers) -> ps.Perturbation:
    return ps.Adversarial(numbers["rho"], geometry="adaptive")


def _adversarial(numbers: Numbers) -> ps.Perturbation:
    return ps.Adversarial(numbers["rho"])


def _mix_fixed(numbers: Numbers) -> ps.Perturbation:
    return ps.MixSAM(None, numbers["kappa"])


def _mix(numbers: Numbers) -> ps.Perturbation:
    return ps.MixSAM(numbers["rho"], numbers["kappa"])


def _ascended(numbers: Numbers) -> ps.Perturbation:
    return ps.AscendedSample(numbers["alpha"])


def _mixture(numbers: Numbers) -> ps.Perturbation:
    return ps.Mixture([ps.Gaussian(), ps.AscendedSample(numbers["alpha"])], [0.5, 0.5])


_PLAIN: dict[str, Any] = {"law": _mean, "cost": 1, "guide": "point", "own": True, "plain": True, "outside": True}
_ALL = (
    Method("mfvi", "Gaussian noise: mean-field variational inference", _gaussian, cost=1),
    Method("map", "maximum a posteriori", _mean, cost=1, guide="point"),
    Method("ascended", "Gaussian noise, then a climb of alpha", _ascended, _ALPHA, zero="alpha"),
    Method("ascended-previous", "the same along remembered gradients", _ascended, _ALPHA, 1, elbo=_PREVIOUS,
           zero="alpha"),
    Method("variational-sam", "worst noise in the posterior's ball", _adversarial, _RADIUS),
    Method("sam", "worst noise in a Euclidean ball, fixed scale: SAM", _sam, _SAM, guide="point",
           zero="rho"),
    Method("mix-sam", "worst and random noise of length rho, learnt scale", _mix, {**_RADIUS, **_KAPPA}),
    Method("antithetic", "pairs of Gaussian noises z and -z", lambda _: Antithetic(), elbo={"num_particles": 2}),
    Method("mixture", "a coin between Gaussian noise and the climb", _mixture, _ALPHA, 1.5, zero="alpha"),
    Method("variational-sam-mean", "variational-sam, scale gradient at the mean", _adversarial, _RADIUS,
           elbo={"scale_gradient": "mean"}),
    Method("variational-sam-previous", "variational-sam along remembered gradients", _adversarial, _RADIUS, 1,
           elbo=_PREVIOUS),
    Method("mix-sam-previous", "mix-sam along remembered gradients", _mix, {**_RADIUS, **_KAPPA}, 1, elbo=_PREVIOUS),
    Method("random-sam", "Gaussian noise of the fixed length rho", _gaussian, _FIXED, 1, "radius"),
    Method("mix-sam-fixed", "worst and random noise of length rho, fixed scale", _mix_fixed, {**_FIXED, **_KAPPA}, 2,
           "radius"),
    Method("asam", "worst noise in an adaptive ball, fixed scale: ASAM", _asam, _ASAM, guide="point", zero="rho"),
    Method("sam-previous", "sam along remembered gradients", _sam, _SAM, 1, "point", _PREVIOUS, zero="rho"),
    Method("mfvi-mixed", "four posteriors of mfvi mixed, each of a quarter of its gradients", _gaussian, cost=1,
           members=4),
    Method("ascended-previous-mixed", "four posteriors of ascended-previous mixed, likewise", _ascended, _ALPHA, 1,
           elbo=_PREVIOUS, members=4, zero="alpha"),
    Method("choice", "mfvi, ascended-previous or mfvi-mixed, whichever validation rows ask for", _ascended, _CLIMB, 1,
           elbo=_PREVIOUS, mixes=4, zero="alpha"),
    Method("mfvi-twice", "mfvi with twice the gradients: has it converged?", _gaussian, cost=1, like="mfvi", budget=2),
    Method("ensemble", "five networks of map mixed, five times the gradients", _mean, cost=1, guide="point",
           like="map", budget=5, members=5, outside=True),
    Method("bsam", "bSAM, an optimiser with a posterior of its own", _gaussian, _BSAM, zero="rho", own=True,
           outside=True),
    Method("laplace", "Laplace's approximation on the last layer of map", needs="laplace", like="map", **_PLAIN),
    Method("swag", "SWAG: a Gaussian of the weights that map passes through", space=_SWAG, **_PLAIN),
    Method("dropout", "MC dropout", space=_DROPOUT, zero="rate", **_PLAIN),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
