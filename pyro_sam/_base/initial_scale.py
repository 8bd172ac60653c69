"""How wide a guide starts: a number, a radius in SAM's units, or a rule for each site."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_sam._base.arguments import positive


@dataclass(frozen=True)
class SAMRadius:
    r"""Initial scale of a guide in SAM's units: Gaussian noise then moves all latents together by ``radius``.

    .. math:: \mathrm{scale} = r / \sqrt d

    d is the number of the guide's latent scalars. Noise of length :math:`\sqrt d` moves them by r: that of
    :class:`~pyro_sam.MixSAM` with its default ``rho=None`` exactly, that of :class:`~pyro_sam.Gaussian` (RandomSAM) to
    a share of about :math:`1 / \sqrt{2d}`. Sites that ``SAM_ELBO(hide=...)`` leaves out are counted too.

    Args:
        radius: r, in the units of the (unconstrained) latents, positive; SAM's are 0.05 to 0.2.
    Raises:
        ValueError: If ``radius`` is not positive and finite.
    """

    radius: float

    def __post_init__(self) -> None:
        """Check the argument."""
        positive("radius", self.radius)


def small_start(site: Any) -> float:
    r"""Return the scale that a guide starts a site at if it is not told: next to nothing for a network's weights.

    .. math:: 0.01 / \sqrt n

    for a weight of a :class:`~pyro_sam.BayesianModule` with fan-in n, the number of elements of ``weight[0]`` (1 for
    biases and other vectors), so that a layer begins with as little noise whatever its width; 0.1 for any other latent,
    as in Pyro's ``AutoNormal``.
    """
    if (site["infer"] or {}).get("init_value") is None:
        return 0.1
    return 0.01 / math.sqrt(max(site["fn"].event_shape[1:].numel(), 1))


def check_rule(rule: Any) -> None:
    """Check what is known of a rule before there is a site.

    Raises:
        ValueError: If it is neither a positive finite number nor a rule.
    """
    if isinstance(rule, type) or not (callable(rule) or isinstance(rule, SAMRadius)):
        _check(rule, "")


def initial_scale(rule: Any, site: Any, loc: Tensor, number: int) -> Tensor:
    """Return the initial scale of a site, shaped like its loc.

    Args:
        rule: A number, a radius, or a callable from the site to a number or a tensor.
        site: Pyro's message of the site.
        loc: Its loc.
        number: Number of the guide's latent scalars.
    Raises:
        ValueError: If it is not positive and finite, or does not broadcast to the loc.
    """
    scale = rule(site) if callable(rule) else rule
    if isinstance(scale, SAMRadius):
        scale = scale.radius / math.sqrt(number)
    where = f" at site '{site['name']}'"
    if not isinstance(scale, Tensor):
        _check(scale, where)
        return torch.full_like(loc, scale)
    if scale.device.type != "meta" and not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError(
            f"init_scale must be positive and finite{where}, got a tensor with minimum {float(scale.min()):g} and "
            f"maximum {float(scale.max()):g}."
        )
    try:
        return scale.detach().to(loc).expand_as(loc).clone()
    except RuntimeError as error:
        raise ValueError(
            f"init_scale must broadcast to the loc's shape {tuple(loc.shape)}{where}, got shape {tuple(scale.shape)}."
        ) from error


def _check(scale: Any, where: str) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ValueError(f"init_scale must be a positive finite number{where}, got init_scale={scale!r}.")
