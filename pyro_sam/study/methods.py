r"""The methods of the comparison: which noise, which guide, how many gradients a step.

A radius ``rho`` has its method's unit. SAM, RandomSAM and MixSAM move the weights by ``rho``, in the units of a weight:
the last two do it by a guide with the fixed scale :math:`\rho / \sqrt d`, whose noise has length :math:`\sqrt d`.
VariationalSAM and the ascended sample move them by ``rho`` and ``alpha`` posterior standard deviations.

The default radii, ``alpha`` and the learning rate have the smallest geometric mean of the validation NLL on digits and
mnist-5k, among steps of a factor of two to three. A fifth of the training rows validated, in splits of the seeds 100 to
102; the test rows of those splits had no part.

References:
    Ujváry et al. (2022), "Rethinking Sharpness-Aware Minimization as Variational Inference", arXiv:2210.10452.
"""

from dataclasses import dataclass
from typing import Literal

import pyro_sam as ps
from pyro_sam.study.settings import Settings

Guide = Literal["point", "radius", "learnt"]
# a guide with no spread to speak of; zero is no scale of a Normal
_POINT_SCALE = 1e-4


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: Name on the command line.
        summary: What it is, one line.
        guide: ``"point"`` for a tiny fixed scale, ``"radius"`` for the fixed scale ``rho / sqrt(d)``, ``"learnt"``.
        rho: Default radius; None for a method that has none.
    """

    name: str
    summary: str
    guide: Guide
    rho: float | None = None

    def perturbation(self, settings: Settings) -> ps.Perturbation:
        """Return the law of the noise under ``settings``."""
        radius = self.radius(settings)
        laws: dict[str, ps.Perturbation] = {
            "map": ps.Mean(),
            "mfvi": ps.Gaussian(),
            "random-sam": ps.Gaussian(),
            "mix-sam": ps.MixSAM(rho=None, kappa=settings.kappa),
            "ascended": ps.AscendedSample(alpha=settings.alpha),
        }
        if self.name in laws:
            return laws[self.name]
        return ps.Adversarial(rho=radius, geometry="euclidean" if self.name == "sam" else "posterior")

    def radius(self, settings: Settings) -> float | None:
        """Return the radius under ``settings``; None for a method that has none."""
        return None if self.rho is None else settings.rho.get(self.name, self.rho)

    def cost(self, settings: Settings) -> int:
        """Return the gradients that one step takes."""
        idle = self.radius(settings) == 0 or (self.name == "ascended" and settings.alpha == 0)
        return 2 if self.perturbation(settings).uses_gradient and not idle else 1

    def init_scale(self, settings: Settings) -> float | ps.SAMRadius:
        """Return the guide's standard deviation at the start."""
        if self.guide == "learnt":
            return settings.init_scale
        radius = self.radius(settings)
        return _POINT_SCALE if self.guide == "point" or radius is None else ps.SAMRadius(radius)


_ALL = (
    Method("map", "loss at the mean, fixed scale: maximum a posteriori", "point"),
    Method("mfvi", "Gaussian noise: mean-field variational inference", "learnt"),
    Method("sam", "worst noise in a Euclidean ball, fixed scale: SAM", "point", rho=0.2),
    Method("random-sam", "Gaussian noise of length rho, fixed scale: RandomSAM", "radius", rho=0.1),
    Method("variational-sam", "worst noise in the posterior's ball: VariationalSAM", "learnt", rho=10.0),
    Method("mix-sam", "worst and random noise mixed, length rho, fixed scale: MixSAM", "radius", rho=0.3),
    Method("ascended", "Gaussian noise, then a climb of alpha: ascended sample", "learnt"),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
