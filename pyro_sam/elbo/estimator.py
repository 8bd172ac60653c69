r"""SAM_ELBO: the ELBO whose reparameterised sample is replaced by a chosen noise.

.. math:: \mathrm{loss} = E_q[-\log p(x \mid w)] \Big|_{w = T(e)} + \mathrm{kl\_weight} \cdot KL(q \Vert p)

The noise ``e`` is a constant of the outer gradient, which reaches loc and scale through ``T``. The KL never sees ``e``.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_sam._base.cures import explained
from pyro_sam._base.random_state import RandomState
from pyro_sam._base.replicas import check_own, check_statistics, replicas_of, sum_of, sum_of_good
from pyro_sam._flat.recorder import only_parameters_are_traced
from pyro_sam._graph.replay import Replayed, replayed
from pyro_sam._step import checks
from pyro_sam._step.call import Call
from pyro_sam._step.knowledge import Knowledge, Pair
from pyro_sam._step.memory import StepMemory
from pyro_sam._step.minibatch import follow_minibatch
from pyro_sam._step.mistakes import refuse_bare_parameters, warn_of_writing
from pyro_sam._step.own_laws import Tossed
from pyro_sam._step.passes import Loss
from pyro_sam._step.settings import NAMES, Ascent, ScaleGradient, Scope, Settings
from pyro_sam._step.space import Terms
from pyro_sam.elbo import sentinel
from pyro_sam.elbo.particle import Evaluated, Particle
from pyro_sam.guide import MeanFieldNormal
from pyro_sam.perturbation import Adversarial, AscendedSample, MixSAM, Perturbation

_LAW_NUMBERS = {each.name: law.__name__ for law in (MixSAM, AscendedSample, Adversarial) for each in fields(law)}


class SAM_ELBO(ELBO):
    r"""ELBO estimator whose noise comes from a law of :mod:`pyro_sam.perturbation` instead of a random draw.

    It takes the place of :class:`pyro.infer.TraceMeanField_ELBO` in :class:`pyro.infer.SVI`, and with
    :class:`~pyro_sam.Gaussian` it is that estimator. Called with a model and a guide it returns Pyro's ``ELBOModule``
    for any ``torch.optim`` optimiser.

    The KL is in closed form where torch knows it. Otherwise, and for priors whose parameters depend on perturbed
    latents, it is estimated at a Gaussian sample of the guide; that costs a run of the guide, and of the model
    without gradient of the likelihood where such priors are.

    Discrete latents of the model that are marked for enumeration (:func:`pyro.infer.config_enumerate`) are summed out
    of the likelihood, as in :class:`pyro.infer.TraceEnum_ELBO`, and the adversary climbs the sum; the guide leaves them
    out.

    Every setting is an attribute of the same name and may be assigned later, say to anneal ``kl_weight``; it is checked
    as here, together with all others.

    Args:
        perturbation: Law of the noise; ``AscendedSample()`` for None.
        kl_weight: Weight of the KL, non-negative. 1 is the ELBO.
        scale_gradient: ``"perturbed"`` takes the gradient of scale at the perturbed point, ``g(w) * e``; ``"mean"`` at
            the mean, ``g(loc) * e`` (laws that ascend from the mean only).
        scope: What one norm of the noise runs over: ``"global"`` all perturbed sites of a particle, ``"site"`` each
            site, ``"event"`` each batch element of a site (local latents of a data plate). A law's ``rho`` is then per
            site or per element.
        hide: Names of guide sites, or a predicate on names, that are left at their own random sample.
        num_particles: Number of independent noises that the loss averages over.
        vectorize_particles: Whether to run all particles at once, in a plate left of all others.
        max_plate_nesting: Largest number of nested plates, as in :class:`pyro.infer.ELBO`; found by a trial run
            if infinite and needed.
        retain_graph: Passed on to ``backward``.
        strict_enumeration_warning: Taken as Pyro's ELBOs take it; a model without enumerated sites is nothing to warn
            of here.
        ascent: ``"fresh"`` spends a pass on each ascent gradient; ``"previous"`` climbs along an average of the earlier
            steps' own gradients, at no extra pass, and not at all in the first step. That average is the ELBO's state,
            one for each pair of model and guide.
        ascent_decay: Weight of the past in that average, in [0, 1).
        compile: Whether to capture the whole step as one graph, once per shape of the data, and to replay it compiled,
            without Pyro's Python. What the model sees besides its arguments (closures, attributes, layers, buffers,
            handlers, random streams) is watched, and a change captures anew; a step that is no fixed graph runs as
            usual, after a logged warning.
        sync_ascent: Whether to average the ascent gradient over all processes of ``torch.distributed``: one adversary
            against the whole batch. Otherwise each process has its own against its share (m-sharpness, SAM's usual).
        fast: Whether shortened steps may be taken where they are known to give the same numbers; the 2nd, 4th, 8th,
            ... and then each 1000th of them is checked by an ordinary one. False takes ordinary steps only, and
            ``compile`` then does nothing.
    Raises:
        ValueError: If an argument is out of its range.
    References:
        Ujváry et al. (2022), "Rethinking Sharpness-Aware Minimization as Variational Inference", arXiv:2210.10452.
    """

    if TYPE_CHECKING:
        perturbation: Perturbation
        kl_weight: float
        scale_gradient: ScaleGradient
        scope: Scope
        hide: Any
        ascent: Ascent
        ascent_decay: float
        compile: bool
        sync_ascent: bool
        fast: bool

    def __init__(
        self,
        perturbation: Perturbation | None = None,
        *,
        kl_weight: float = 1.0,
        scale_gradient: ScaleGradient = "perturbed",
        scope: Scope = "global",
        hide: Collection[str] | Callable[[str], bool] = (),
        num_particles: int = 1,
        vectorize_particles: bool = False,
        max_plate_nesting: float = float("inf"),
        retain_graph: bool | None = None,
        strict_enumeration_warning: bool = True,
        ascent: Ascent = "fresh",
        ascent_decay: float = 0.9,
        compile: bool = False,
        sync_ascent: bool = False,
        fast: bool = True,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in NAMES}
        settings = Settings(**{**given, "perturbation": AscendedSample() if perturbation is None else perturbation})
        super().__init__()
        for name in NAMES:
            vars(self).pop(name, None)
        self._settings = settings
        self._knowledge = Knowledge()
        self._last_terms: Terms | None = None
        self._replica_losses: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """Return a setting."""
        if name in NAMES and "_settings" in vars(self):
            return getattr(self._settings, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a setting, checked together with the others; or another attribute."""
        if name in NAMES and "_settings" in vars(self):
            self._settings = replace(self._settings, **{name: value})
        elif name in _LAW_NUMBERS and name not in vars(self):
            raise AttributeError(
                f"{name} is a number of the law, which does not change: assign another law, such as "
                f"elbo.perturbation = {_LAW_NUMBERS[name]}({name}={value!r})."
            )
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Return settings and state; what was found out about models stays behind."""
        knowledge = Knowledge()
        knowledge.load_ascent(self._knowledge.ascent())
        return {**self.__dict__, "_knowledge": knowledge, "_last_terms": None, "_replica_losses": None}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the state: the averages of ``ascent="previous"`` by guide site; empty for ``"fresh"``."""
        return {} if self._settings.ascent == "fresh" else {"ascent": self._knowledge.ascent()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over a state.

        Raises:
            ValueError: If it was saved with another ``ascent``.
        """
        if (self._settings.ascent == "previous") != ("ascent" in state):
            raise ValueError(f"state was saved with another ascent than ascent={self._settings.ascent!r}.")
        if "ascent" in state:
            self._knowledge.load_ascent(state["ascent"])

    @explained
    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return an estimate of minus the ELBO at Gaussian samples, whatever the perturbation and ``kl_weight``.

        It is the number to compare methods by.
        """
        settings = self._settings_for(guide).evaluation()
        call, pair = self._meet(Call(model, guide, args, kwargs), settings)
        total: Loss = 0.0
        for particle in self._particles(call, pair, settings):
            total = total + particle.loss(graph=False).value / settings.num_particles
        return _number(sum_of_good(total))

    @explained
    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the perturbed loss as a scalar tensor, with its graph to the parameters of model and guide."""
        settings = self._settings_for(guide)
        call, pair = self._meet(Call(model, guide, args, kwargs), settings)

        def take(settings: Settings) -> Any:
            replay = self._replay(call, pair, settings)
            if replay is not None:
                return sum_of(replay.differentiable())
            total: Any = 0.0
            for particle in self._particles(call, pair, settings):
                total = total + particle.loss().loss / settings.num_particles
            return sum_of(total)

        if self._is_watched(pair, settings):
            slow = replace(settings, fast=False, compile=False)
            look = partial(self._look, call, pair, slow)
            law = settings.perturbation
            return sentinel.watched_loss(pair, call, law, lambda: take(settings), look, lambda: take(slow))
        return take(settings)

    @explained
    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return the perturbed loss, and add its gradients to ``.grad`` of the parameters of model and guide."""
        settings = self._settings_for(guide)
        refuse_bare_parameters(guide)
        call, pair = self._meet(Call(model, guide, args, kwargs), settings)
        versions = call.versions()
        loss = self._step(call, pair, settings)
        warn_of_writing(pair, versions, call.versions())
        return loss

    def _step(self, call: Call, pair: Pair, settings: Settings) -> float:
        if self._is_watched(pair, settings):
            slow = replace(settings, fast=False, compile=False)
            fast, ordinary = (partial(self._accumulate, call, pair, each) for each in (settings, slow))
            look = partial(self._look, call, pair, slow)
            return sentinel.watched(pair, call, settings.perturbation, fast, look, ordinary)
        return self._accumulate(call, pair, settings)

    def _look(self, call: Call, pair: Pair, settings: Settings) -> tuple[Any, float]:
        """Return the loss with its graph to all leaves, and its value as a step returns it."""
        loss: Any = 0.0
        value: Loss = 0.0
        for particle in self._particles(call, pair, settings):
            found = particle.loss()
            loss = loss + sum_of(found.loss) / settings.num_particles
            value = value + found.value / settings.num_particles
        return loss, _number(sum_of_good(value))

    def _accumulate(self, call: Call, pair: Pair, settings: Settings) -> float:
        self._last_terms = self._replica_losses = None
        replay = self._replay(call, pair, settings)
        if replay is not None:
            self._note_losses(replay.loss)
            return replay.accumulate()
        total: Loss = 0.0
        number = settings.num_particles
        terms: list[Terms] = []
        for particle in self._particles(call, pair, settings):
            found = particle.loss(graph=False)
            _backward(found, number, settings.retain_graph)
            total = total + found.value / number
            terms.append(found.terms)
        self._last_terms = Terms(*(_mean(each) for each in zip(*terms, strict=True)))
        self._note_losses(total)
        return _number(sum_of_good(total))

    @property
    def replica_losses(self) -> Tensor | None:
        """The losses of the last step by replica, shape ``(R,)``; None before a step, or for a single guide."""
        return self._replica_losses

    def _note_losses(self, loss: Loss) -> None:
        self._replica_losses = loss if isinstance(loss, Tensor) and loss.dim() else None

    # From a call to its particles

    def _settings_for(self, guide: Any) -> Settings:
        """Return the settings; of replicas, which run as one, particles are taken one by one."""
        single = replicas_of(guide) is None or not self._settings.vectorize_particles
        return self._settings if single else replace(self._settings, vectorize_particles=False)

    def _meet(self, call: Call, settings: Settings) -> tuple[Call, Pair]:
        """Return a call with all that its passes share, and what is known of its model and guide."""
        guide = poutine.unwrap(call.guide)
        if isinstance(guide, Messenger):
            raise ValueError(
                f"guide {type(guide).__name__} is an effect handler, which cannot be run at a chosen "
                "noise; use a guide that is called on its own, such as MeanFieldNormal."
            )
        number = replicas_of(call.guide)
        settings.check_replicas(number)
        check_own((call.args, dict(call.kwargs)), number)
        if number is not None and guide is not call.guide:
            raise ValueError(
                "a guide with num_replicas cannot be trained inside of a handler, which would hide the replicas; give "
                "the guide itself, and put handlers such as poutine.scale around the model."
            )
        if isinstance(call.guide, MeanFieldNormal):
            call.guide.initialize(*call.args, **call.kwargs)
        pair = self._knowledge.of(call)
        if number is not None:
            check_statistics(pair.surroundings(call).modules)
        call = pair.complete(call, fast=_may_be_flat(call, pair, settings))
        if settings.together > 1:  # where a trial run is needed, it comes first, as in Pyro's estimators
            pair.nesting(settings, call.with_functions(call.model, follow_minibatch(call)))
        return call, pair

    def _particles(
        self, call: Call, pair: Pair, settings: Settings, kl_weight: Tensor | None = None
    ) -> Iterator[Particle]:
        memory = None
        if settings.ascent == "previous" and settings.perturbation.uses_gradient:
            memory = StepMemory(self._knowledge.memory_of(pair), 1 if settings.together > 1 else settings.num_particles)
        weight = settings.kl_weight if kl_weight is None else kl_weight
        fast = _may_be_flat(call, pair, settings)
        for _ in range(1 if settings.together > 1 else settings.num_particles):
            yield Particle(call, pair, settings, settings.perturbation, weight, memory, fast)

    def _is_watched(self, pair: Pair, settings: Settings) -> bool:
        """Return whether this step, if it is a fast one, is one that the sentinel looks at."""
        replicas = replicas_of(pair.guide) is not None
        if replicas and pair.draws is not False:
            return False  # mapped over replicas, a model draws in another order
        if pair.slow or not settings.fast or torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
            return False
        if not only_parameters_are_traced() or not (settings.compile or len(pair.known)):
            return False  # an ordinary one
        pair.fast_steps += 1
        return sentinel.is_due(pair.fast_steps, replicas=replicas)

    def _replay(self, call: Call, pair: Pair, settings: Settings) -> Replayed | None:
        """Return this step as a captured one gives it; None if it cannot be captured, or has values to complain of."""
        if not _may_be_captured(call, pair, settings) or not only_parameters_are_traced():
            return None
        start, single = RandomState.capture(), replicas_of(call.guide) is None
        law = settings.perturbation.toss() if settings.num_particles == 1 and single else settings.perturbation
        if law is not settings.perturbation:
            remembers = settings.ascent == "previous" and settings.perturbation.uses_gradient
            settings = replace(settings, perturbation=Tossed(law) if remembers and not law.uses_gradient else law)

        def step(kl_weight: Tensor, call: Call) -> tuple[Any, Tensor | None]:
            total: Any = 0.0
            conditions = []
            for particle in self._particles(call, pair, settings, kl_weight if settings.kl_weight else None):
                loss, holds = particle.unchecked()
                total = total + loss / settings.num_particles
                conditions += [] if holds is None else [holds]
            return total, torch.stack(conditions).all(0) if conditions else None

        def first() -> None:
            for particle in self._particles(call, pair, settings):
                particle.loss()

        found = replayed(call, pair, settings, checks.enabled(), first, step)
        if found is None:
            start.restore()
        return found

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Trace, Trace]:
        """Return the traces of model and guide at the chosen noise; Pyro's abstract hook."""
        call, pair = self._meet(Call(model, guide, args, kwargs), self._settings)
        return next(iter(self._particles(call, pair, self._settings))).traces()


def _may_be_flat(call: Call, pair: Pair, settings: Settings) -> bool:
    """Return whether a step may be a flat one; with ``sync_ascent`` no rank may take a pass that others do not."""
    if not settings.fast or pair.slow or settings.hide or settings.sync_ascent:
        return False
    return isinstance(call.guide, MeanFieldNormal) and call.guide.can_be_flat()


def _may_be_captured(call: Call, pair: Pair, settings: Settings) -> bool:
    # parameters of another guide than ours come to be in its first step, some at random
    is_made = len(pair.valid) or isinstance(call.guide, MeanFieldNormal)
    return bool(settings.compile and settings.fast and not pair.slow and is_made)


def _backward(found: Evaluated, number: int, retain_graph: bool | None) -> None:
    loss = sum_of(found.loss)
    if isinstance(loss, Tensor) and loss.requires_grad:
        (loss / number if number > 1 else loss).backward(retain_graph=retain_graph)
        found.finish()


def _mean(values: tuple[Loss, ...]) -> Loss:
    bare = [value.detach() if isinstance(value, Tensor) else value for value in values]
    total: Any = bare[0]
    for value in bare[1:]:
        total = total + value
    return total / len(bare) if len(bare) > 1 else total


def _number(loss: Loss) -> float:
    number: Any = torch_item(loss)
    warn_if_nan(number, "loss")
    return float(number)
