r"""SAM_ELBO: the ELBO whose reparameterised sample is replaced by a chosen noise.

.. math:: \mathrm{loss} = E_q[-\log p(x \mid w)] \Big|_{w = T(e)} + \mathrm{kl\_weight} \cdot KL(q \Vert p)

The noise ``e`` is a constant of the outer gradient, which reaches loc and scale through ``T``. The KL never sees ``e``.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_sam._base.arguments import finite, flag, non_negative, one_of
from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.cures import explained
from pyro_sam._flat.passes import LeanStep
from pyro_sam._graph.capture import Replayed, Replays
from pyro_sam._step import checks
from pyro_sam._step.knowledge import Pair, Structures, refuse_enumerated_priors, signature, validate
from pyro_sam._step.memory import PreviousGradients
from pyro_sam._step.minibatch import follow_minibatch
from pyro_sam._step.passes import SCOPES, GuideRun, Scope, Step
from pyro_sam.elbo.mistakes import advise
from pyro_sam.elbo.particle import Particle
from pyro_sam.guide import MeanFieldNormal
from pyro_sam.perturbation import Adversarial, Gaussian, Mixture, Perturbation

ScaleGradient = Literal["perturbed", "mean"]
Ascent = Literal["fresh", "previous"]


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

    Args:
        perturbation: Law of the noise.
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
        ascent: ``"fresh"`` spends a pass on each ascent gradient; ``"previous"`` climbs along an average of the earlier
            steps' own gradients, at no extra pass, and not at all in the first step. That average is the ELBO's state.
        ascent_decay: Weight of the past in that average, in [0, 1).
        compile: Whether to capture the whole step as one graph, once per shape of the data, and to replay it compiled,
            without Pyro's Python. All data must be arguments of the step: a tensor that the model reaches in another
            way is taken as it was. A step that is no fixed graph runs as usual, after a logged warning.
        sync_ascent: Whether to average the ascent gradient over all processes of ``torch.distributed``: one adversary
            against the whole batch. Otherwise each process has its own against its share (m-sharpness, SAM's usual).
    Raises:
        ValueError: If an argument is out of its range.
    References:
        Ujváry et al. (2022), "Rethinking Sharpness-Aware Minimization as Variational Inference", arXiv:2210.10452.
    """

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
        ascent: Ascent = "fresh",
        ascent_decay: float = 0.9,
        compile: bool = False,
        sync_ascent: bool = False,
    ) -> None:
        perturbation = Adversarial() if perturbation is None else perturbation
        if not isinstance(perturbation, Perturbation):
            raise ValueError(
                f"perturbation must be a Perturbation such as Adversarial(rho=1.0), got {perturbation!r} "
                f"of type {type(perturbation).__name__}."
            )
        one_of("scale_gradient", scale_gradient, ("perturbed", "mean"))
        one_of("scope", scope, SCOPES)
        switches = {"vectorize_particles": vectorize_particles, "compile": compile, "sync_ascent": sync_ascent}
        for name, value in switches.items():
            flag(name, value)
        one_of("ascent", ascent, ("fresh", "previous"))
        _check_ascent(perturbation, scale_gradient, ascent, ascent_decay, sync_ascent, compile)
        if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(
                f"num_particles must be a whole number of at least 1, got num_particles={num_particles!r}."
            )
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        self.perturbation = perturbation
        self.kl_weight = non_negative("kl_weight", kl_weight)
        self.scale_gradient = scale_gradient
        self.scope = scope
        self.sync_ascent = sync_ascent
        self.hide: Callable[[str], bool] | frozenset[str] = hide if callable(hide) else _names(hide)
        self.ascent, self.compile = ascent, compile
        self._memory = PreviousGradients(ascent_decay) if ascent == "previous" else None
        self._structures = Structures()
        self._replays = Replays()

    def __getstate__(self) -> dict[str, Any]:
        """Return settings and state; what was found out about models stays behind."""
        memory = None
        if self._memory is not None:
            memory = PreviousGradients(self._memory.decay)
            memory.load_state_dict(self._memory.state_dict())
        return {**self.__dict__, "_memory": memory, "_structures": Structures(), "_replays": Replays()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the state: the averages of ``ascent="previous"`` by guide site; empty for ``"fresh"``."""
        return {} if self._memory is None else {"ascent": self._memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over a state.

        Raises:
            ValueError: If it was saved with another ``ascent``.
        """
        if (self._memory is not None) != ("ascent" in state):
            raise ValueError(f"state was saved with another ascent than ascent={self.ascent!r}.")
        if self._memory is not None:
            self._memory.load_state_dict(state["ascent"])

    @explained
    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return an estimate of minus the ELBO at Gaussian samples, whatever the perturbation and ``kl_weight``.

        It is the number to compare methods by.
        """
        total: Tensor | float = 0.0
        for particle in self._particles(Gaussian(), 1.0, model, guide, args, kwargs):
            total = total + particle.loss(graph=False).value / self.num_particles
        return _number(total)

    @explained
    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the perturbed loss as a scalar tensor, with its graph to the parameters of model and guide."""
        if self.compile and (replay := self._replay(model, guide, args, kwargs)) is not None:
            return replay.differentiable()
        total: Any = 0.0
        for particle in self._particles(self.perturbation, self.kl_weight, model, guide, args, kwargs):
            total = total + particle.loss().loss / self.num_particles
        return total

    @explained
    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return the perturbed loss, and add its gradients to ``.grad`` of the parameters of model and guide."""
        if self.compile and (replay := self._replay(model, guide, args, kwargs)) is not None:
            return replay.accumulate()
        total: Tensor | float = 0.0
        for particle in self._particles(self.perturbation, self.kl_weight, model, guide, args, kwargs):
            loss, value, finish = particle.loss(graph=False)
            if isinstance(loss, Tensor) and loss.requires_grad:
                (loss / self.num_particles if self.num_particles > 1 else loss).backward(retain_graph=self.retain_graph)
                finish()
            total = total + value / self.num_particles
        return _number(total)

    def _replay(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Replayed | None:
        """Return this step as a captured one gives it; None if it cannot be captured, or has values to complain of."""
        law = self.perturbation.toss() if self.num_particles == 1 else self.perturbation

        def step(kl_weight: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
            total: Any = 0.0
            conditions = []
            weight = kl_weight if self.kl_weight else 0.0
            for particle in self._particles(law, weight, model, guide, args, kwargs):
                loss, holds = particle.unchecked()
                total = total + loss / self.num_particles
                conditions += [] if holds is None else [holds]
            return total, torch.stack(conditions).all() if conditions else None

        def first(*args: Any, **kwargs: Any) -> None:
            for particle in self._particles(law, self.kl_weight, model, guide, args, kwargs):
                particle.loss()

        settings = law, self.kl_weight == 0, self.scale_gradient, self.scope, self.num_particles, checks.enabled()
        weight = torch.tensor(self.kl_weight, dtype=torch.float64)
        return self._replays.run(settings, (model, guide), first, step, self._state, weight, args, kwargs)

    def _state(self) -> list[Tensor]:
        return [] if self._memory is None else self._memory.tensors()

    def _inspect(self, pair: Pair, run: GuideRun, model: Trace) -> None:
        key = run.signature, signature(model)
        if key in pair.valid:
            return
        self._check_hide(run)
        if not (isinstance(self.perturbation, Gaussian) and self.kl_weight == 1):
            refuse_enumerated_priors(model)
        advise(pair, run.trace, model, run.sites, self)
        validate(run.trace, model, self.max_plate_nesting)
        pair.valid.add(key)

    def _is_hidden(self, name: str) -> bool:
        return self.hide(name) if callable(self.hide) else name in self.hide

    def _check_hide(self, run: GuideRun) -> None:
        if callable(self.hide):
            return
        unknown = [name for name in sorted(self.hide) if name not in run.trace.nodes]
        if unknown:
            there = [*run.sites, *(name for name in run.unperturbed if name in self.hide)]
            raise ValueError(
                f"hide must name sites of the guide, got {', '.join(unknown)}; its Gaussian sites are "
                f"{', '.join(there)}."
            )

    def _get_trace(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Trace, Trace]:
        """Return the traces of model and guide at the chosen noise; Pyro's abstract hook."""
        step = next(iter(self._particles(self.perturbation, self.kl_weight, model, guide, args, kwargs))).step
        run, trace = step.final_run(self.perturbation.noise(step), tracked=False, detach_scale=False)
        return trace, run.trace

    def _particles(
        self,
        law: Perturbation,
        kl_weight: float | Tensor,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Iterator[Particle]:
        if isinstance(poutine.unwrap(guide), Messenger):
            raise ValueError(
                f"guide {type(poutine.unwrap(guide)).__name__} is an effect handler, which cannot be run at a chosen "
                "noise; use a guide that is called on its own, such as MeanFieldNormal."
            )
        pair = self._structures.of(model, guide)
        run = _Run(law, pair, model, guide, args, kwargs)
        together = self.vectorize_particles and self.num_particles > 1
        if isinstance(guide, MeanFieldNormal):
            guide.initialize(*args, **kwargs)
        if together:
            self._finite_max_plate_nesting(model, follow_minibatch(model, guide, args, kwargs), args, kwargs)
        # with sync_ascent no rank may take a pass that others do not
        ordinary = self.hide or self.sync_ascent or (together and self._memory is not None)
        make_lean = None
        if isinstance(guide, MeanFieldNormal) and not ordinary and guide.can_be_flat():
            make_lean = partial(self._lean_step, run)
        at_mean = self.scale_gradient == "mean" and law.ascends_from_mean
        for _ in range(1 if together else self.num_particles):
            yield Particle(partial(self._step, run), make_lean, pair, law, kl_weight, at_mean)

    def _step(self, run: "_Run") -> Step:
        guide = follow_minibatch(run.model, run.guide, run.args, run.kwargs)
        nesting = partial(self._finite_max_plate_nesting, run.model, guide, run.args, run.kwargs)
        together = self.num_particles if self.vectorize_particles else 1
        return Step(
            self._vectorized_num_particles(run.model) if together > 1 else run.model,
            self._vectorized_num_particles(guide) if together > 1 else guide,
            run.args,
            run.kwargs,
            num_particles=together,
            law=run.law,
            hidden=self._is_hidden,
            scope=self.scope,
            memory=None if self._memory is None else self._memory.of(run.pair),
            sync_ascent=self.sync_ascent,
            trace_model=partial(run.pair.enumeration.trace, first_dim=lambda: -1 - nesting()),
            inspect=partial(self._inspect, run.pair),
            is_new=not run.pair.valid,
            noise_ends_there=run.pair.noise_ends_at_sites,
        )

    def _lean_step(self, run: "_Run", graph: bool) -> LeanStep | None:
        guide: Any = run.guide
        flat = guide.flat(graph=graph)
        if flat is None:
            return None
        together = self.vectorize_particles and self.num_particles > 1
        return LeanStep(
            flat,
            run.pair.known,
            self._vectorized_num_particles(run.model) if together else run.model,
            run.args,
            run.kwargs,
            lead=(self.num_particles, *[1] * (int(self.max_plate_nesting) - 1)) if together else (),
            law=run.law,
            scope=self.scope,
            memory=None if self._memory is None else self._memory.of(run.pair),
            finish=partial(guide.hand_out, flat),
        )

    def _finite_max_plate_nesting(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> int:
        if self.max_plate_nesting == float("inf"):
            with kept_buffers():
                self._guess_max_plate_nesting(model, guide, args, kwargs)
        return int(self.max_plate_nesting)


@dataclass(frozen=True)
class _Run:
    """What the passes of a particle have in common."""

    law: Perturbation
    pair: Pair
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _check_ascent(
    perturbation: Perturbation, scale_gradient: str, ascent: str, ascent_decay: float, sync_ascent: bool, compile: bool
) -> None:
    if scale_gradient == "mean" and not perturbation.ascends_from_mean:
        raise ValueError(
            f"scale_gradient='mean' needs a gradient at the guide's mean, which {perturbation!r} never takes; "
            "use perturbation=Adversarial() or MixSAM(), or scale_gradient='perturbed'."
        )
    if scale_gradient == "mean" and ascent == "previous":
        raise ValueError("scale_gradient='mean' takes a fresh gradient at the mean; use ascent='fresh'.")
    if not 0 <= finite("ascent_decay", ascent_decay) < 1:
        raise ValueError(f"ascent_decay must be in [0, 1), got ascent_decay={ascent_decay!r}.")
    if sync_ascent and (compile or ascent == "previous"):
        raise ValueError("sync_ascent=True averages fresh gradients step by step; use ascent='fresh', compile=False.")
    if sync_ascent and isinstance(perturbation, Mixture):
        raise ValueError(
            f"sync_ascent=True needs a law of the same passes everywhere, and processes of {perturbation!r} "
            "may choose differently and wait for each other forever; use sync_ascent=False, or one law."
        )


def _names(names: Collection[str]) -> frozenset[str]:
    if isinstance(names, str):  # one name, not its letters
        return frozenset([names])
    if (
        isinstance(names, Tensor)
        or not isinstance(names, Collection)
        or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"hide must be a collection of site names or a predicate on names, got hide={names!r}.")
    return frozenset(names)


def _number(loss: Tensor | float) -> float:
    number: Any = torch_item(loss)
    warn_if_nan(number, "loss")
    return float(number)
