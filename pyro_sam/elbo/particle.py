"""The loss of one particle, or of all particles that are vectorised together."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.random_state import RandomState
from pyro_sam._flat.passes import LeanStep
from pyro_sam._flat.recorder import Surprise
from pyro_sam._step import checks
from pyro_sam._step.enumeration import enumerated_dims
from pyro_sam._step.knowledge import Dependence, Pair, dependence, signature
from pyro_sam._step.loss import data_loss, kl_loss, latent_sites, weighted
from pyro_sam._step.passes import GuideRun, Step
from pyro_sam.perturbation import Gaussian, Perturbation

T = TypeVar("T")


class Evaluated(NamedTuple):
    """A loss with its graph, its bare value, and what to call after its backward pass."""

    loss: Tensor | float
    value: Tensor | float
    finish: Callable[[], None]


@dataclass(frozen=True)
class Particle:
    """One particle: its passes, and what is known of its model and guide.

    Args:
        make_step: Makes the ordinary passes.
        make_lean: Makes the lean ones, with a graph to the parameters or without, or None; None if there are none.
        pair: What is known.
        law: Chooses the noise.
        kl_weight: Weight of the KL.
        scale_at_mean: Whether the gradient of scale is the one at the mean.
    """

    make_step: Callable[[], Step]
    make_lean: Callable[[bool], LeanStep | None] | None
    pair: Pair
    law: Perturbation
    kl_weight: float | Tensor
    scale_at_mean: bool

    @cached_property
    def step(self) -> Step:
        """The ordinary passes, made where they are needed."""
        return self.make_step()

    def loss(self, *, graph: bool = True) -> "Evaluated":
        """Return the loss with its graph, and its bare value.

        Args:
            graph: Whether the graph begins at the parameters. Otherwise their ``.grad`` is complete only when
                ``finish`` was called after the backward pass.

        Raises:
            ValueError: If a value is one that torch's checks refuse; buffers are then as they were.
        """
        # a new pair of model and guide is met under torch's own checks, which point at the user's own line
        evaluate = self._checked_afterwards if self.pair.valid and checks.enabled() else self._evaluate
        return self._shortest(evaluate, graph=graph)

    def unchecked(self) -> tuple[Tensor | float, Tensor | None]:
        """Return the loss with its graph, and whether what torch would have checked holds (None if nobody asked)."""
        with checks.postponed() if checks.enabled() else nullcontext():
            return self._shortest(partial(self._take, with_conditions=checks.enabled()), graph=True)[:2]

    def _shortest(self, take: Callable[[LeanStep | None], T], *, graph: bool) -> T:
        """Take a lean step where that is possible, else an ordinary one; buffers stay if it raises.

        A structure that is new is met, and checked, in an ordinary run at the mean that leaves no trace. So the numbers
        of a training do not depend on which of its steps was the first, before or after an interruption.
        """
        known = self.pair.known
        if self.make_lean is not None and known.is_worth_a_try:
            start = RandomState.capture()
            for is_rehearsed in (False, True):
                lean = self.make_lean(graph)
                if lean is not None and known.is_any and self._kl_is_known:
                    try:
                        with kept_buffers(on_error_only=True) as lean.buffers:
                            return take(lean)
                    except Surprise:
                        start.restore()
                if torch.is_inference_mode_enabled():  # has no graph to find out from: it says nothing of the model
                    break
                if is_rehearsed:
                    known.lose_patience()
                    break
                self._rehearse()
                start.restore()
        with kept_buffers(on_error_only=True):
            return take(None)

    @property
    def _kl_is_known(self) -> bool:
        """Whether the KL at the law's noise is the KL."""
        unused = not isinstance(self.kl_weight, Tensor) and self.kl_weight == 0
        return unused or isinstance(self.law, Gaussian) or self.pair.known.kl_ignores_noise

    def _rehearse(self) -> None:
        with kept_buffers():
            e = self.step.zeros()
            run, model = self.step.final_run(e, tracked=not self.pair.dependence, detach_scale=False)
            if enumerated_dims(model):
                self.pair.known.give_up()
            else:
                priors = {name: site["fn"] for name, site in latent_sites(model).items()}
                sees_noise = self._dependence(e, run, model).kl
                self.pair.known.add(signature(model), priors, kl_ignores_noise=not sees_noise)
        del vars(self)["step"]  # another run will have passes of its own

    def _evaluate(self, lean: LeanStep | None) -> "Evaluated":
        loss, _, _ = self._take(lean)
        return Evaluated(loss, loss.detach() if isinstance(loss, Tensor) else loss, _finish(lean))

    def _checked_afterwards(self, lean: LeanStep | None) -> "Evaluated":
        noise: list[Tensor] = []
        try:
            with checks.postponed():
                loss, holds, e = self._take(lean, noise, with_conditions=True)
        except (IndexError, RuntimeError, ValueError):
            self.step.check(noise[0] if noise else None)  # says it better, where a bad value is the cause
            raise
        if holds is None or not isinstance(loss, Tensor):
            return Evaluated(loss, loss.detach() if isinstance(loss, Tensor) else loss, _finish(lean))
        # the step's one wait for the device
        value, all_hold = torch.stack([loss.detach(), holds.to(loss)]).tolist()
        if not (all_hold and math.isfinite(value)):
            self.step.check(e)
        return Evaluated(loss, value, _finish(lean))

    def _take(
        self, lean: LeanStep | None, noise: list[Tensor] | None = None, *, with_conditions: bool = False
    ) -> tuple[Tensor | float, Tensor | None, Tensor]:
        """Return the loss with its graph, whether its values hold, and the noise, which is put into ``noise`` early."""
        e = self.law.noise(self.step if lean is None else lean)
        if noise is not None:
            noise.append(e)
        if lean is None:
            return *self.estimate(e, with_conditions=with_conditions), e
        loss, run = lean.loss(e, self.kl_weight, scale_at_mean=self.scale_at_mean)
        return loss, checks.conditions(run) if with_conditions else None, e

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
            loss = loss + weighted(self.kl_weight, kl)
        return loss, checks.conditions(run.trace, model) if with_conditions else None

    def _kl(self, e: Tensor, run: GuideRun, model: Trace) -> Tensor | float:
        sees_noise = self._dependence(e, run, model)
        if not sees_noise.kl:
            return kl_loss(run.trace, model)
        run, model_there = self.step.gaussian_run(with_model=sees_noise.prior)
        return kl_loss(run.trace, model if model_there is None else model_there)

    def _dependence(self, e: Tensor, run: GuideRun, model: Trace) -> Dependence:
        key = run.signature, signature(model)
        if key not in self.pair.dependence:
            has_graph = run.tracked and torch.is_grad_enabled()
            tracked, its_model = (run, model) if has_graph else self.step.trial_run(e)
            noise = [site.noise for site in tracked.sites.values()]
            self.pair.dependence[key] = dependence(tracked.trace, its_model, noise)
        return self.pair.dependence[key]


def _finish(lean: LeanStep | None) -> Callable[[], None]:
    return (lambda: None) if lean is None else lean.finish


def _scale_gradient_at_mean(run: GuideRun, mean_gradients: dict[str, Tensor]) -> Tensor | float:
    """Return zero, with the gradient ``g(loc) * e`` to scale."""
    terms = [(mean_gradients[name] * site.displacement).sum() for name, site in run.sites.items() if mean_gradients]
    linear = sum(terms)
    return linear - linear.detach() if isinstance(linear, Tensor) else 0.0
