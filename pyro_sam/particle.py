"""The loss of one particle, or of all particles that are vectorised together."""

import math
from dataclasses import dataclass

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_sam import checks
from pyro_sam.buffers import kept_buffers
from pyro_sam.loss import data_loss, kl_loss
from pyro_sam.perturbation import Perturbation
from pyro_sam.step import GuideRun, Step
from pyro_sam.structure import Pair, dependence, signature


@dataclass(frozen=True)
class Particle:
    """One particle: its passes, and what is known of its model and guide.

    Args:
        step: The passes.
        pair: What is known.
        law: Chooses the noise.
        kl_weight: Weight of the KL.
        scale_at_mean: Whether the gradient of scale is the one at the mean.
    """

    step: Step
    pair: Pair
    law: Perturbation
    kl_weight: float | Tensor
    scale_at_mean: bool

    def loss(self) -> tuple[Tensor | float, Tensor | float]:
        """Return the loss with its graph, and its bare value.

        Raises:
            ValueError: If a value is one that torch's checks refuse; buffers are then as they were.
        """
        with kept_buffers(on_error_only=True):
            # a new pair of model and guide is met under torch's own checks, which point at the user's own line
            if self.pair.valid and checks.enabled():
                return self._checked_afterwards()
            loss = self.estimate(self.law.noise(self.step))[0]
            return loss, _bare(loss)

    def unchecked(self) -> tuple[Tensor | float, Tensor | None]:
        """Return the loss with its graph, and whether what torch would have checked holds (None if nobody asked)."""
        if not checks.enabled():
            return self.estimate(self.law.noise(self.step))[0], None
        with checks.postponed():
            return self.estimate(self.law.noise(self.step), with_conditions=True)

    def _checked_afterwards(self) -> tuple[Tensor | float, Tensor | float]:
        e = None
        try:
            with checks.postponed():
                e = self.law.noise(self.step)
                loss, holds = self.estimate(e, with_conditions=True)
        except (IndexError, RuntimeError, ValueError):
            self.step.check(e)  # says it better, where what torch would have checked is the cause
            raise
        if holds is None or not isinstance(loss, Tensor):
            return loss, _bare(loss)
        # the step's one wait for the device
        value, all_hold = torch.stack([loss.detach(), holds.to(loss)]).tolist()
        if not (all_hold and math.isfinite(value)):
            self.step.check(e)
        return loss, value

    def estimate(self, e: Tensor, *, with_conditions: bool = False) -> tuple[Tensor | float, Tensor | None]:
        """Return the loss at noise ``e``, and on demand whether what torch would have checked holds."""
        ordinary = self.step.is_gaussian(e)
        # the first time, the run keeps the noise in its graph to see whether the KL depends on it
        first = not ordinary and not self.pair.dependence
        run, model = self.step.final_run(e, tracked=first, detach_scale=self.scale_at_mean)
        loss = data_loss(model)
        if self.scale_at_mean:
            loss = loss + _scale_gradient_at_mean(run, self.step.mean_gradients)
        if isinstance(self.kl_weight, Tensor) or self.kl_weight != 0:
            kl = kl_loss(run.trace, model) if ordinary else self._kl(e, run, model)
            weight = self.kl_weight
            loss = (
                loss + (weight.to(kl.dtype) if isinstance(weight, Tensor) and isinstance(kl, Tensor) else weight) * kl
            )
        return loss, checks.conditions(run.trace, model) if with_conditions else None

    def _kl(self, e: Tensor, run: GuideRun, model: Trace) -> Tensor | float:
        key = run.signature, signature(model)
        if key not in self.pair.dependence:
            tracked, its_model = (run, model) if run.tracked else self.step.trial_run(e)
            noise = [site.noise for site in tracked.sites.values()]
            self.pair.dependence[key] = dependence(tracked.trace, its_model, noise)
        sees_noise = self.pair.dependence[key]
        if not sees_noise.kl:
            return kl_loss(run.trace, model)
        run, model_there = self.step.gaussian_run(with_model=sees_noise.prior)
        return kl_loss(run.trace, model if model_there is None else model_there)


def _bare(loss: Tensor | float) -> Tensor | float:
    return loss.detach() if isinstance(loss, Tensor) else loss


def _scale_gradient_at_mean(run: GuideRun, mean_gradients: dict[str, Tensor]) -> Tensor | float:
    """Return zero, with the gradient ``g(loc) * e`` to scale."""
    terms = [(mean_gradients[name] * site.displacement).sum() for name, site in run.sites.items() if mean_gradients]
    linear = sum(terms)
    return linear - linear.detach() if isinstance(linear, Tensor) else 0.0
