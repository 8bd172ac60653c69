r"""The ordinary passes: any guide, any handler. Guide and model run under Pyro's own handlers, at a chosen noise.

All passes of a step share the minibatch, the dropout masks and the samples of unperturbed sites: a later pass rewinds
the random streams to where the first one began.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Normal

from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.cures import NO_LATENTS
from pyro_sam._base.random_state import RandomState, rewound
from pyro_sam._step.call import Call
from pyro_sam._step.dependence import are_equal, besides, prior_parameters, reaches
from pyro_sam._step.handlers import Bookmarks, NoiseMessenger, ReplayMessenger
from pyro_sam._step.knowledge import Pair
from pyro_sam._step.loss import data_loss, kl_loss, latent_sites
from pyro_sam._step.memory import Average, Layout, flat, version
from pyro_sam._step.mistakes import inspect
from pyro_sam._step.passes import Dependence, Loss, Passes, Ran, gradients
from pyro_sam._step.settings import Settings
from pyro_sam._step.signatures import kind
from pyro_sam._step.sites import CoreNormal, NoiseSite, place, pull_back, standard_normal, zero_noise
from pyro_sam.perturbation import Gaussian, Perturbation


@dataclass(frozen=True)
class GuideRun:
    """A guide's trace, the sites where noise was placed (in order), and why the others were left alone.

    Args:
        trace: The trace.
        sites: Where noise was placed.
        unperturbed: Reasons by the names of the other sites.
        kind: What the run's structure is known by.
        tracked: Whether the noise is a leaf of the graph.
    """

    trace: Trace
    sites: dict[str, NoiseSite]
    unperturbed: dict[str, str]
    kind: Hashable
    tracked: bool

    def at(self, noise: Callable[[str], Tensor], *, tracked: bool, detach_scale: bool) -> "GuideRun":
        """Return the run as it would be at other noise, of a guide in which nothing else depends on the noise."""
        trace, sites = self.trace.copy(), {}
        for name, site in self.sites.items():
            e = noise(name).detach().requires_grad_(tracked)
            value, sites[name] = place(trace.nodes[name]["fn"], lambda core, e=e: e, detach_scale)  # type: ignore[misc]
            sites[name] = replace(sites[name], scale=None) if site.scale is None else sites[name]
            trace.nodes[name] = {**trace.nodes[name], "value": value}
        return GuideRun(trace, sites, self.unperturbed, self.kind, tracked)


class OrdinaryRan(Ran):
    """What came of an ordinary pass.

    Args:
        passes: The passes.
        guide: The guide's run.
        trace_model: Traces the model; it may edit what the guide drew.
        e: The noise.
    """

    def __init__(
        self, passes: "OrdinaryPasses", guide: GuideRun, trace_model: Callable[[GuideRun], Trace], e: Tensor
    ) -> None:
        self._passes, self._e, self.guide = passes, e, guide
        samples = {name: site.sample for name, site in guide.sites.items() if site.sample.requires_grad}
        self._nodes = [sample.grad_fn for sample in samples.values()]
        self._by_value: dict[str, Tensor] = {}
        if guide.tracked:
            for name, sample in samples.items():  # a hook: the model may edit the value in place
                sample.register_hook(partial(self._by_value.__setitem__, name))
        self.model = trace_model(guide)
        self.data_loss = data_loss(self.model)

    def gradients(self) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the gradients in the noise and in the values."""
        sites = self.guide.sites
        in_noise = gradients(self.data_loss, [site.noise for site in sites.values()])
        in_values = [self._by_value.get(name, torch.zeros_like(site.displacement)) for name, site in sites.items()]
        return flat(in_noise, self._passes.num_particles), in_values

    def displacements(self) -> Sequence[Tensor]:
        """Return the values less their loc."""
        return [site.displacement for site in self.guide.sites.values()]

    def kl(self) -> Loss:
        """Return the KL, or its estimate at this run's values."""
        return kl_loss(self.guide.trace, self.model)

    def sees_noise(self, kl: Loss) -> Dependence:
        """Return what depends on the noise: in the graph of this run, or behind its back."""
        if reaches(prior_parameters(self.model), self._nodes):
            return Dependence(kl=True, prior=True)  # what the graph says now is not remembered of the kind
        hidden = self._passes.hidden_dependence(self, kl, self._e)
        return Dependence(kl=hidden.kl or hidden.prior or reaches([kl], self._nodes), prior=hidden.prior)


def _remember(average: Average, decay: float, core: CoreNormal, gradient: Tensor) -> None:
    with torch.no_grad():
        average.add(decay, pull_back(core, gradient))


class OrdinaryPasses(Passes):
    """The ordinary passes of one step.

    Args:
        call: Model and guide, each inside its particle plate where particles are vectorised, and their arguments.
        pair: What is known of them.
        settings: The estimator's settings.
        law: The law that will choose the noise.
        first_dim: Finds the first dimension left of all plates.
        held: Indices of subsampling plates, which the first pass fills; replicas share them.
    """

    def __init__(
        self,
        call: Call,
        pair: Pair,
        settings: Settings,
        law: Perturbation,
        first_dim: Callable[[], int],
        held: dict[str, Tensor] | None = None,
    ) -> None:
        self._call, self._pair, self._settings, self._first_dim = call, pair, settings, first_dim
        self._is_new = not len(pair.valid)
        self._many_passes = not isinstance(law, Gaussian)
        self._remembers = law.uses_gradient and settings.ascent == "previous"
        self._ascends = law.uses_gradient and not self._remembers
        self._held: dict[str, Tensor] = {} if held is None else held
        self._hidden_noise: dict[str, Tensor] = {}
        self._bookmarks = Bookmarks(call.streams) if self._many_passes else None
        self._model_bookmarks = Bookmarks(call.streams) if self._many_passes else None
        self._guide_start: RandomState | None = None
        self._model_start: RandomState | None = None
        self._layout: Layout | None = None
        self._first: GuideRun | None = None  # the guide's first run, and its noise until a pass uses it
        self._first_noise: tuple[Tensor, int] | None = None

    @property
    def modules(self) -> Sequence[Any]:
        """Modules that the model may write to without calling them."""
        return self._call.modules

    @property
    def num_particles(self) -> int:
        """Number of vectorised particles."""
        return self._settings.together

    def layout(self) -> Layout:
        """Return the perturbed sites."""
        if self._layout is None:
            sites = self._sites()
            shapes = tuple(site.noise.shape for site in sites.values())
            self._layout = Layout(tuple(sites), shapes, self.num_particles)
        return self._layout

    def group_sizes(self) -> Sequence[int]:
        """Return for each site the number of noise scalars of one batch element."""
        return [site.group_size for site in self._sites().values()]

    def zeros(self) -> Tensor:
        """Return the noise of the guide's mean."""
        return self._draw(lambda name, core: zero_noise(core))

    def gaussian(self) -> Tensor:
        """Draw standard normal noise; where it comes first, in the guide's own order of random numbers."""
        return self._draw(lambda name, core: standard_normal(core))

    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return the means and standard deviations, which only diagonal sites have."""
        locs, scales = [], []
        for name, site in self._sites().items():
            if site.scale is None:
                reason = "is whitened noise" if isinstance(site.core, Normal) else "has a full covariance"
                raise ValueError(
                    f"guide site '{name}' {reason}; geometry='euclidean', 'adaptive' and 'fisher' need diagonal Normal "
                    "sites. Use geometry='posterior', or a mean-field guide."
                )
            locs.append(site.loc.expand(site.noise.shape))
            scales.append(site.scale)
        return flat(locs, self.num_particles), flat(scales, self.num_particles)

    def ascend(self, e: Tensor) -> OrdinaryRan:
        """Run guide and model at a chosen noise, without a trace."""
        with torch.enable_grad(), kept_buffers(self._call.modules):
            run = self._guide_run(e, tracked=True)
            return OrdinaryRan(self, run, partial(self._model_run, look=self._is_new), e)

    def descend(self, e: Tensor, *, detach_scale: bool = False, average: Average | None = None) -> OrdinaryRan:
        """Run guide and model at a chosen noise; buffers keep what the model writes, unless it raises."""
        run = self._guide_run(e, tracked=False, detach_scale=detach_scale)
        if average is not None:
            _refuse_subsampled(run)
            for name, part in average.split(self.layout()).items():
                site = run.sites[name]
                if site.sample.requires_grad:
                    # not the site: a hook that holds its own tensor keeps it, and its graph, for ever
                    site.sample.register_hook(partial(_remember, part, self._settings.ascent_decay, site.core))
        return OrdinaryRan(self, run, self._model_run, e)

    def kl_at(self, e: Tensor, there: Ran, *, with_model: bool) -> Loss:
        """Return the KL's estimate at other noise."""
        with kept_buffers(self._call.modules):
            run = self._guide_run(e, tracked=False)
            if with_model:
                return kl_loss(run.trace, self._model_run(run))
        return kl_loss(run.trace, there.model)  # type: ignore[attr-defined]

    # What others ask for

    def hidden_dependence(self, ran: OrdinaryRan, kl: Loss, e: Tensor) -> Dependence:
        """Return what changed at other noise, when such a structure was met for the first time."""
        one = len(latent_sites(ran.guide.trace)) == 1 == len(latent_sites(ran.model))  # no other latent to hang on
        view = None if one else self._pair.view(self._call)
        key = ran.guide.kind, kind(ran.model), torch.is_grad_enabled(), view  # without a graph all is hidden
        known = self._pair.hidden.get(key)
        if known is None:
            with torch.no_grad(), kept_buffers(self._call.modules):
                run = self._rerun(self._per_site(e + 1))
                model = self._model_run(run, look=False)
                prior = not are_equal(prior_parameters(ran.model), prior_parameters(model))
                changed = prior or not are_equal([kl], [kl_loss(run.trace, model)])
            known = self._pair.hidden.put(key, Dependence(kl=changed, prior=prior))
        return known

    def check(self, e: Tensor | None) -> None:
        """Run guide and model under torch's own checks of their distributions, which raise; at noise 0 for None.

        Noise that is not finite comes from bad values as well, so that the run at 0 comes first.
        """
        with kept_buffers(self._call.modules):
            mean = self.zeros()  # finds the sites, if no pass has
            noises = [mean] if e is None else [e] if bool(e.isfinite().all()) else [mean, e]
            for noise in noises:
                run = self._rerun(self._per_site(noise))
                for trace in (run.trace, self._model_run(run)):
                    trace.compute_log_prob()

    def _sites(self) -> dict[str, NoiseSite]:
        if self._first is None:
            self.zeros()
        return self._first.sites  # type: ignore[union-attr]

    # Passes

    def _draw(self, noise: Callable[[str, CoreNormal], Tensor]) -> Tensor:
        """Return the noise of all sites, flat; the first draw finds the sites by running the guide."""
        if self._first is not None:
            return flat([noise(name, site.core) for name, site in self._first.sites.items()], self.num_particles)
        with torch.enable_grad() if self._ascends else nullcontext():
            run = self._run_guide(noise, tracked=self._ascends, detach_scale=False)
        if not run.sites and self._many_passes:
            raise ValueError(_no_gaussian_site(run.unperturbed))
        self._first = run
        e = flat([site.noise for site in run.sites.values()], self.num_particles)
        self._first_noise = e, version(e)
        return e

    def _guide_run(self, e: Tensor, *, tracked: bool, detach_scale: bool = False) -> GuideRun:
        self._sites()
        first, noise = self._first, self._first_noise
        is_first = noise is not None and e is noise[0] and version(e) == noise[1]
        if first is not None and is_first and first.tracked == tracked and not detach_scale:
            self._first_noise = None
            return first
        parts = self._per_site(e)
        if first is not None and self._noise_ends_at_sites(first):
            return first.at(parts.__getitem__, tracked=tracked, detach_scale=detach_scale)
        return self._rerun(parts, tracked=tracked, detach_scale=detach_scale)

    def _noise_ends_at_sites(self, run: GuideRun) -> bool:
        """Return whether only the values of the guide's Gaussian sites depend on the noise, as far as is known."""
        key = run.kind, None if isinstance(self._pair.guide, AutoGuide) else self._pair.view(self._call)
        known = self._pair.ends.get(key)
        if known is False or not run.tracked:
            return False
        here = besides(run.trace, run.sites)
        if reaches(here, [site.noise for site in run.sites.values()]):
            return False
        if known is None:
            elsewhere = self._rerun({name: site.noise + 1 for name, site in run.sites.items()})
            known = self._pair.ends.put(key, are_equal(here, besides(elsewhere.trace, run.sites)))
        return known

    def _rerun(self, noise: Mapping[str, Tensor], *, tracked: bool = False, detach_scale: bool = False) -> GuideRun:
        with kept_buffers(self._call.modules):
            return self._run_guide(lambda name, core: noise[name], tracked=tracked, detach_scale=detach_scale)

    def _run_guide(self, noise: Callable[[str, CoreNormal], Tensor], *, tracked: bool, detach_scale: bool) -> GuideRun:
        def leaf(name: str, core: CoreNormal) -> Tensor:
            return noise(name, core).detach().requires_grad_(tracked)

        handler = NoiseMessenger(
            leaf, self._settings.is_hidden, self._held, self._hidden_noise, self._bookmarks, detach_scale
        )
        self._guide_start, stream = self._stream(self._guide_start)
        with stream, handler:
            trace = poutine.trace(self._call.guide).get_trace(*self._call.args, **self._call.kwargs)
        return GuideRun(trace, handler.sites, handler.unperturbed, kind(trace), tracked)

    def _model_run(self, run: GuideRun, *, look: bool = True) -> Trace:
        self._model_start, stream = self._stream(self._model_start)
        with stream, ReplayMessenger(run.trace.nodes, self._held, self._model_bookmarks):
            trace = self._pair.enumeration.trace(self._call, self._first_dim)
        if look:
            inspect(self._pair, self._settings, run, trace, self._call.has_tensors())
        return trace

    def _stream(self, start: RandomState | None) -> tuple[RandomState | None, AbstractContextManager[None]]:
        if start is not None:
            return start, rewound(start, self._call.streams)
        return (RandomState.capture(self._call.streams) if self._many_passes else None), nullcontext()

    def _per_site(self, e: Tensor) -> dict[str, Tensor]:
        sites = self._sites()
        return {
            name: part.to(sites[name].noise.device, sites[name].noise.dtype)
            for name, part in self.layout().split(e.detach()).items()
        }


def _no_gaussian_site(unperturbed: dict[str, str]) -> str:
    if not unperturbed:
        return f"the guide has no Gaussian site to perturb (it has no latent site at all). {NO_LATENTS}"
    reasons = "; ".join(f"'{name}': {reason}" for name, reason in unperturbed.items())
    return (
        f"the guide has no Gaussian site to perturb ({reasons}). Use MeanFieldNormal or another guide with "
        "reparameterised Normal sites, or perturbation=Gaussian()."
    )


def _refuse_subsampled(run: GuideRun) -> None:
    for name in run.sites:
        site: Any = run.trace.nodes[name]
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"ascent='previous' needs the same latents at every step, and site '{name}' is inside the "
                    f"subsampled plate '{frame.name}'; name it in hide=, or use ascent='fresh'."
                )
