r"""The passes of a mean-field guide whose model is known: the same numbers as the ordinary ones, by a short way.

The guide is not run: its parameters are two vectors, the noise is a third one. The model runs under one handler that
hands out the values. Nothing is traced, and what an ordinary run has checked is not checked again. A run that differs
from what is known ends in :class:`Surprise`, and the step is taken in the ordinary way.
"""

import operator
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_sam._base.buffers import Buffers
from pyro_sam._base.random_state import RandomState, rewound
from pyro_sam._base.recent import Recent
from pyro_sam._flat.place import Place, Where
from pyro_sam._flat.priors import NormalPriors
from pyro_sam._flat.recorder import Recorder, Surprise
from pyro_sam._flat.vectors import FlatNormal
from pyro_sam._step.call import Call
from pyro_sam._step.dependence import reaches, tensors_of
from pyro_sam._step.handlers import Bookmarks
from pyro_sam._step.knowledge import Pair
from pyro_sam._step.loss import closed_form, data_loss_of, kl_of_site
from pyro_sam._step.memory import Average, Layout
from pyro_sam._step.mistakes import check_shapes, warn_of_sizes
from pyro_sam._step.passes import Dependence, Loss, Passes, Ran
from pyro_sam._step.settings import Settings
from pyro_sam._step.signatures import kind_of_sites, signature_of_sites
from pyro_sam.perturbation import Perturbation

_VIEWS = 64


class FlatPasses(Passes):
    """The passes of one step of a mean-field guide.

    Args:
        call: The model, inside its particle plate where particles are vectorised, and its arguments.
        flat: The guide's sites.
        pair: What is known of model and guide.
        settings: The estimator's settings.
        law: The law that will choose the noise.
        lead: Dimensions that vectorised particles put at the left of a value, the number of particles first.
        finish: What is to be called after the backward pass.
    Attributes:
        buffers: Watches the modules that are called, and puts back what a pass has done to their buffers.
    """

    runs_guide = False

    def __init__(
        self,
        call: Call,
        flat: FlatNormal,
        pair: Pair,
        settings: Settings,
        law: Perturbation,
        lead: Sequence[int],
        finish: Callable[[], None],
    ) -> None:
        self._call, self._pair, self._settings, self._lead = call, pair, settings, tuple(lead)
        self.flat, self.finish = flat, finish  # type: ignore[method-assign]
        many_passes = law.uses_gradient and settings.ascent != "previous"
        self._many_passes = many_passes
        self._held: dict[str, Tensor] = {}
        self._bookmarks = Bookmarks(call.streams) if many_passes else None
        self._model_start: RandomState | None = None
        self.buffers = Buffers(call.modules)
        self._looked_at: set[Any] = set()
        self._layout = flat.layout
        if lead:
            shapes = tuple(torch.Size((*self._lead, *shape)) for shape in flat.layout.shapes)
            self._layout = Layout(flat.layout.names, shapes, self._lead[0])

    @property
    def num_particles(self) -> int:
        """Number of vectorised particles."""
        return self._lead[0] if self._lead else 1

    def layout(self) -> Layout:
        """Return the perturbed sites."""
        return self._layout

    def group_sizes(self) -> Sequence[int]:
        """Return the sizes of the sites, none of which is in a plate."""
        return self._layout.sizes

    def zeros(self) -> Tensor:
        """Return the noise of the guide's mean."""
        return self.flat.loc.new_zeros(self.num_particles, len(self.flat.loc))

    def gaussian(self) -> Tensor:
        """Draw standard normal noise, site by site as the guide would."""
        flat = self.flat
        if not self._lead:
            e = torch.empty_like(flat.loc).detach()
            for part, shape in zip(e.split(self._layout.sizes), self._layout.shapes, strict=True):
                part.view(shape).normal_()
            return e.unsqueeze(0)
        dtype, device = flat.loc.dtype, flat.loc.device
        draws = [torch.randn(shape, dtype=dtype, device=device) for shape in self._layout.shapes]
        return torch.cat([draw.view(self.num_particles, -1) for draw in draws], -1)

    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return the means and standard deviations."""
        shape = self.num_particles, len(self.flat.loc)
        return self.flat.loc.detach().expand(shape).clone(), self.flat.scale.detach().expand(shape).clone()

    def ascend(self, e: Tensor) -> "FlatRan":
        """Run the model at a chosen noise, without a trace."""
        leaf = self.flat.loc.detach()
        leaf = (leaf.expand_as(e).clone() if self._lead else leaf).requires_grad_()
        values = Place.apply(leaf, self.flat.scale.detach(), e, Where(self._layout))
        ran = FlatRan(self, self._run(values), e, leaf, values)
        self.buffers.restore()
        return ran

    def descend(self, e: Tensor, *, detach_scale: bool = False, average: Average | None = None) -> "FlatRan":
        """Run the model at a chosen noise for good.

        Raises:
            Surprise: If its run is not of a kind that is known.
        """
        where = Where(self._layout, detach_scale, average, self._settings.ascent_decay)
        values = Place.apply(self.flat.loc, self.flat.scale, e, where)
        node = values[0].grad_fn
        run = self._run(values)
        ran = FlatRan(self, run, e, None, values, node)
        ran.known = self._look_up(run)
        return ran

    def kl_at(self, e: Tensor, there: Ran, *, with_model: bool) -> Loss:
        """Leave a KL that must be estimated elsewhere to the ordinary passes."""
        raise Surprise

    def _run(self, values: Sequence[Tensor]) -> Recorder:
        stream: AbstractContextManager[None] = nullcontext()
        if self._model_start is not None:
            stream = rewound(self._model_start, self._call.streams)
        elif self._many_passes:
            self._model_start = RandomState.capture(self._call.streams)
        by_site = dict(zip(self._layout.names, values, strict=True))
        with stream, Recorder(by_site, self._held, self._bookmarks, self._looked_at, self.buffers, self._lead) as run:
            self._call.run_model()
        return run

    def _look_up(self, run: Recorder) -> "KnownModel":
        """Return what is known of models with such a run."""
        key, last, latents = signature_of_sites(run.nodes.values()), self._pair.last_flat, run.latents()
        # a prior that stands outside of the model hangs on nothing in it, and a single one on no other latent
        is_free = not latents or len(run.values) == 1
        view = None if is_free else self._pair.view(self._call)
        if last is not None and last[1] == key and last[0].has_priors(run) and last[0].was_seen(view):
            return last[0]
        known: KnownModel | None = self._pair.known.get(_kind(run))
        if known is None or not known.has_all or len(run.values) != len(latents) + len(run.priors()):
            raise Surprise
        if not known.was_seen(view):
            raise Surprise
        known.is_free = is_free
        if not self._pair.valid.get(("flat", key)):
            self._check(run)
            self._pair.valid.put(("flat", key), True)
        known.normal(run, self.flat)
        self._pair.last_flat = known, key
        return known

    def _check(self, run: Recorder) -> None:
        """Check the shapes of a run of a known kind whose sizes are new."""
        if not is_validation_enabled():
            return
        sites = [dict(site) for name, site in run.nodes.items() if site["is_observed"] or name in run.values]
        for site in sites:
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            site["log_prob"] = scale_and_mask(log_prob, site["scale"], site["mask"])
        check_shapes(sites, self._pair.known_nesting(self._settings))
        warn_of_sizes(self._pair, self._settings, run.nodes, run.values)


@dataclass
class KnownModel:
    """What an ordinary run has found out about a model.

    Args:
        kl_ignores_noise: Whether its KL was seen not to depend on the noise.
        has_all: Whether it has all the guide's latents, and no site that is summed out.
        views: What it saw when that was found out.
        is_free: Whether its priors could hang on no latent the last time.
        priors: Normal priors that were served at one go the last time, and those that it was made from.
    """

    kl_ignores_noise: bool
    has_all: bool
    views: Recent[Hashable, bool] = field(default_factory=lambda: Recent(_VIEWS))
    is_free: bool = False
    priors: tuple[tuple[Any, ...], NormalPriors] | None = None

    def was_seen(self, view: Hashable) -> bool:
        """Return whether what is known was found out where the model saw this; None where it does not matter."""
        return view is None or view in self.views

    def has_priors(self, run: Recorder) -> bool:
        """Return whether a run served the priors of the last time."""
        known = self.priors
        return known is not None and len(known[0]) == len(run.batches) and all(map(operator.is_, known[0], run.batches))

    def normal(self, run: Recorder, flat: FlatNormal) -> NormalPriors:
        """Return the priors that a run served at one go."""
        if self.priors is None or not self.has_priors(run):
            self.priors = tuple(run.batches), NormalPriors(flat.layout, run.priors())
        return self.priors[1]


class FlatRan(Ran):
    """What came of a run of the model.

    Args:
        passes: The passes.
        run: The run.
        e: The noise.
        leaf: Where the graph begins, in an ascent.
        values: Values by site.
        node: The operation that they came of; None without a graph.
    """

    known: KnownModel

    def __init__(
        self, passes: FlatPasses, run: Recorder, e: Tensor, leaf: Tensor | None, values: Any, node: Any = None
    ) -> None:
        self._passes, self.run, self._e, self._leaf, self._node = passes, run, e, leaf, node
        self.data_loss = data_loss_of(run.nodes.values())
        self._is_estimate = False

    def gradients(self) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the gradients in the noise and in the values, each as one vector per particle."""
        leaf: Any = self._leaf
        g = torch.zeros_like(leaf)
        if isinstance(self.data_loss, Tensor) and self.data_loss.requires_grad:
            found = torch.autograd.grad(self.data_loss.sum(), [leaf], allow_unused=True)[0]
            g = g if found is None else found
        g = g.view_as(self._e)
        return g * self._passes.flat.scale.detach(), [g]

    def displacements(self) -> Sequence[Tensor]:
        """Return the values less their loc."""
        return [self._e * self._passes.flat.scale]

    def kl(self) -> Loss:
        """Return the KL, or its estimate at this run's values."""
        flat = self._passes.flat
        normal = self.known.normal(self.run, flat)
        terms: list[Any] = list(normal.kl(flat))
        particles = self._passes.num_particles
        if particles > 1 and normal.others:
            raise Surprise  # priors without a dimension for the particles
        terms = [particles * term if particles > 1 else term for term in terms]
        others, self._is_estimate = kl_terms(self.run, normal, flat)
        return reduce(operator.add, terms + others)

    def sees_noise(self, kl: Loss) -> Dependence:
        """Return what depends on the noise: in the graph of this run, or in an ordinary run of this kind."""
        parameters = [t for site in self.run.latents().values() for t in tensors_of(site["fn"]) if t.requires_grad]
        prior = bool(parameters) and self._node is not None and reaches(parameters, [self._node])
        return Dependence(kl=prior or self._is_estimate or not self.known.kl_ignores_noise, prior=prior)


def kl_terms(run: Recorder, normal: NormalPriors, flat: FlatNormal) -> tuple[list[Any], bool]:
    """Return the KL's terms of all priors but constant Normal ones, and whether one of them is an estimate."""
    priors = {name: {**_PLAIN, "fn": fn} for name, fn in normal.others.items()} | run.latents()
    terms, is_estimate = [], False
    for name, prior in priors.items():
        site = {**_PLAIN, "value": run.values[name], "fn": flat.site(name)}
        exact = closed_form(site, prior)
        is_estimate = is_estimate or exact is None
        terms.append(kl_of_site(site, {**prior, "value": site["value"]}) if exact is None else exact)
    return terms, is_estimate


_PLAIN: dict[str, Any] = {"args": (), "kwargs": {}, "scale": 1.0, "mask": None}


def _kind(run: Recorder) -> Hashable:
    served = [
        {"type": "sample", "name": name, "is_observed": False, "fn": prior, "cond_indep_stack": ()}
        for name, prior in run.priors().items()
    ]
    return frozenset(kind_of_sites([*served, *run.nodes.values()]))
