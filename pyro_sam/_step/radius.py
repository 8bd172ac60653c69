"""Whether the adversary's radius suits the guide: how far it moves the latents, in their own units."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from pyro_sam._step.sites import NoiseSite
from pyro_sam.perturbation import Mixture, Perturbation

# Digits, a net of 4,810 weights: an adversary at distance 0.7 is learnt from, at 1.04 accuracy stays at chance.
FAR = 1.0
# A tenth of SAM's smallest usual radius is 0.005: the law is then Mean() in all but name.
_NEAR = 0.01
_MANY = 100
_SMALL, _LARGE = 0.2, 3.0  # posterior standard deviations that nobody takes for nothing, or for a sample
_USUAL = 0.1  # SAM's radii are 0.05 to 0.2


def complaints(sites: Iterable[NoiseSite], law: Perturbation, num_particles: int) -> Iterator[str]:
    """Yield what is wrong with the radii of a law, in a guide as it is now; each replica may have its own."""
    scales = [site.scale for site in sites if site.scale is not None]
    d = sum(scale.numel() for scale in scales) // num_particles
    if not d or any(scale.is_meta for scale in scales):
        return
    size = math.sqrt(sum(scale.detach().double().square().sum().item() for scale in scales) / num_particles / d)
    for each in law.perturbations if isinstance(law, Mixture) else [law]:
        name = "rho" if hasattr(each, "rho") else "alpha"
        radius = getattr(each, name, 0.0)
        if radius is None or isinstance(radius, int | float):
            said = _of_default(each, d, size) if radius is None else _of_number(each, name, abs(radius), d, size)
            if said:
                yield said


def _of_default(law: Perturbation, d: int, size: float) -> str | None:
    distance = math.sqrt(d) * size
    if d < _MANY or distance <= FAR:
        return None
    return (
        f"{law!r} moves the {d} latent scalars by {distance:.3g} in their own units, as far as a random draw but all "
        f"in the worst direction. rho=None is meant for a fixed scale r/√d, r from 0.05 to 0.2: give the guide "
        f"init_scale={_USUAL / math.sqrt(d):.2g} and learn_scale=False, or take rho={_USUAL / size:.2g}, which moves "
        f"them by {_USUAL:g} at the present scale."
    )


def _of_number(law: Any, name: str, radius: float, d: int, size: float) -> str | None:
    posterior = getattr(law, "geometry", "posterior") == "posterior"
    if not posterior:
        size = 1.0
    if getattr(law, "ord", 2) == math.inf:
        radius *= math.sqrt(d)
    distance, draw = radius * size, math.sqrt(d)
    far = radius > max(_LARGE, draw / 2 if d >= _MANY else 10 * draw) if posterior else radius > 10 * FAR
    if far and distance > FAR and getattr(law, "geometry", "") != "adaptive":
        return (
            f"{law!r} moves the {d} latent scalars by {distance:.3g} in their own units, all in the worst direction: "
            f"what is learnt there is to expect anything. Take {name}={_USUAL / size:.2g}, which moves them by "
            f"{_USUAL:g} at the present scale, as SAM usually does."
        )
    if posterior and name == "rho" and 0 < radius <= _SMALL and d >= _MANY and distance < _NEAR:
        return (
            f"{law!r} moves the {d} latent scalars by {distance:.2g} in their own units, next to nothing: rho counts "
            f"posterior standard deviations here. For SAM's radius of {radius:g} in the weights' own units take "
            f"rho={radius / size:.2g} at the present scale, or geometry='euclidean'."
        )
    return None
