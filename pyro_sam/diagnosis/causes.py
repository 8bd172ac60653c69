"""Why a network predicts no better than a constant: what in the settings can bring that about, and the cure."""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from pyro_sam._step.call import Call
from pyro_sam._step.radius import FAR
from pyro_sam._step.sites import is_discrete, unwrap
from pyro_sam.diagnosis.measure import Measured, observed_sites
from pyro_sam.diagnosis.prior import contrast, draw, starting_weights
from pyro_sam.diagnosis.report import Problem
from pyro_sam.nn import BayesianModule, FanInNormal
from pyro_sam.perturbation import Mixture

# LeNet under the priors that ruin it has a contrast of 0.004 to 0.05, under those that do not 0.4 and more; digits 0.2.
_TIGHT = 0.1
# LeNet on 5000 images has 0.19 nats a weight and trains; 200 points and 2752 weights have 0.07 and do not.
_POOR = 0.1
_STILL = 0.1  # of the size of the weights


class Causes:
    """What can have kept a network from learning.

    Args:
        call: Model, guide and arguments.
        measured: Runs of both.
        modules: Modules that the model can see.
    """

    def __init__(self, call: Call, measured: Measured, modules: list[Any]) -> None:
        self._call, self._measured = call, measured
        self._networks = [module for module in modules if isinstance(module, BayesianModule)]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The weights that the networks started at, by site."""
        return starting_weights(draw(self._call))

    def problems(self, what: str) -> Iterator[Problem]:
        """Yield a problem for each cause.

        Args:
            what: What is wrong.
        """
        if self._is_untrained():
            yield Problem(
                "untrained", f"{what} Its locs are still where they started.", "lr", "a larger one, or more steps"
            )
            return
        found = [*self._far(what), *self.poor(what), *self._tight(what), *self.wide_start(what, "collapsed")]
        weight = self._measured.kl_weight / 10
        yield from found or [
            Problem("collapsed", f"{what} The KL outweighs the data.", "kl_weight", round_value(weight))
        ]

    def _is_untrained(self) -> bool:
        sites = self._measured.mean.guide.sites
        pairs = [(sites[name].loc, start) for name, start in self.weights.items() if name in sites]
        if not pairs:
            return False
        moved = sum(float((loc - start).square().sum()) for loc, start in pairs)
        return moved < _STILL**2 * sum(float(start.square().sum()) for _, start in pairs)

    def _far(self, what: str) -> Iterator[Problem]:
        law, scale = self._measured.settings.perturbation, self._initial_scale()
        for each in law.perturbations if isinstance(law, Mixture) else [law]:
            name = "rho" if hasattr(each, "rho") else "alpha"
            rho = getattr(each, name, 0.0)
            unit = 1.0 if getattr(each, "geometry", "posterior") != "posterior" else scale
            if unit is None:
                continue
            distance = unit * (math.sqrt(self._size()) if rho is None else abs(rho))
            if distance > FAR:
                yield Problem(
                    "far",
                    f"{what} {each!r} moves the weights by {distance:.2g} in one direction, the worst.",
                    name,
                    round_value(0.1 / unit),
                )

    def _tight(self, what: str) -> Iterator[Problem]:
        now = contrast(self._call, 1.0) if self.weights else None
        if now is None or now >= _TIGHT:
            return
        factors = [2 ** (k / 2) for k in range(1, 9)]
        factor = next((f for f in factors if (contrast(self._call, f) or 0.0) >= 2 * _TIGHT), factors[-1])
        yield Problem(
            "collapsed",
            f"{what} The prior is too tight: networks drawn from it tell two inputs apart by {now:.2g} nats only.",
            "prior",
            self._wider(factor),
        )

    def _wider(self, factor: float) -> str:
        prior = self._networks[0].prior if self._networks else None
        if isinstance(prior, FanInNormal):
            return f"ps.nn.fan_in_normal({prior.std * factor:.2g})"
        core = unwrap(prior) if isinstance(prior, td.Distribution) else None
        if isinstance(core, td.Normal) and core.scale.numel() == 1:
            return f"dist.Normal({float(core.loc):g}, {float(core.scale) * factor:.2g})"
        return f"priors {factor:.2g} times as wide"

    def poor(self, what: str) -> Iterator[Problem]:
        """Yield a problem if the data have too few nats to give."""
        weight, size, nats = self._measured.kl_weight, self._size(), self.nats
        if nats < _POOR * weight * size:
            less = round_value(nats / size)
            yield Problem(
                "collapsed",
                f"{what} The data have {nats:.3g} nats to give for {size} latent scalars, which at "
                f"kl_weight={weight:g} is too few for them to leave their prior. Which weight between {less} and "
                f"{weight:g} predicts best, ps.tune finds on validation rows.",
                "kl_weight",
                less,
            )

    def wide_start(self, what: str, kind: str) -> Iterator[Problem]:
        """Yield a problem if the guide started wider than the network's weights."""
        scale = self._initial_scale()
        sizes = [float(w.square().mean().sqrt()) for w in self.weights.values() if w.dim() > 1]
        if scale is not None and sizes and scale > min(sizes):
            yield Problem(
                kind,
                f"{what} The guide started at a scale of {scale:.2g}, wider than the network's own weights, of size "
                f"{min(sizes):.2g}: what a layer passed on was more noise than signal.",
                "init_scale",
                round_value(min(sizes) / 2),
            )

    @cached_property
    def nats(self) -> float:
        """What the data can give: what a constant leaves open, or a nat for each continuous scalar."""
        data, model = self._measured.data, self._measured.mean.model
        continuous = [site for site in observed_sites(model).values() if not is_discrete(site["fn"])]
        if data is None or data.constant is None or continuous:
            scalars = sum(site["fn"].event_shape.numel() for site in continuous) or 1
            return scalars * (data.observations if data else 0.0)
        return data.constant

    def _size(self) -> int:
        return sum(site.noise.numel() for site in self._measured.mean.guide.sites.values())

    def _initial_scale(self) -> float | None:
        """Return the scale that the guide began with, the largest of its weights'; None where it does not say."""
        guide = self._call.guide
        given = getattr(guide, "init_scale", getattr(guide, "_init_scale", None))
        if callable(given):
            nodes: Any = guide.prototype_trace.nodes  # type: ignore[attr-defined]
            scales = [torch.as_tensor(given(nodes[name])) for name, w in self.weights.items() if w.dim() > 1]
            return max((float(scale.max()) for scale in scales), default=None)
        return float(given) if isinstance(given, int | float) else None


def round_value(value: float) -> float:
    """Return a value to try: two digits would pretend to know more."""
    return float(f"{value:.1g}")
