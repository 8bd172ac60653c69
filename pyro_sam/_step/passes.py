r"""The passes of one step: guide and model run at a chosen noise, and every pass but the last leaves no trace.

All passes of a step share the minibatch, the dropout masks and the samples of unperturbed sites: a later pass rewinds
the random stream to where the first one began.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Normal

from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.random_state import RandomState, rewound
from pyro_sam._base.ranks import mean_over_ranks
from pyro_sam._step.knowledge import signature
from pyro_sam._step.loss import data_loss
from pyro_sam._step.memory import PreviousGradients
from pyro_sam._step.sites import (
    CoreNormal,
    NoiseMessenger,
    NoiseSite,
    ReplayMessenger,
    place,
    standard_normal,
    zero_noise,
)
from pyro_sam.perturbation import Gaussian, NoiseSpace, Perturbation

Scope = Literal["global", "site", "event"]
SCOPES: tuple[str, ...] = ("global", "site", "event")


@dataclass(frozen=True)
class GuideRun:
    """A guide's trace, the sites where noise was placed (in order), and why the others were left alone.

    Args:
        trace: The trace.
        sites: Where noise was placed.
        unperturbed: Reasons by the names of the other sites.
        signature: What the run's structure is known by.
        tracked: Whether the noise is a leaf of the graph.
    """

    trace: Trace
    sites: dict[str, NoiseSite]
    unperturbed: dict[str, str]
    signature: Hashable
    tracked: bool

    def at(self, noise: Callable[[str], Tensor], *, tracked: bool, detach_scale: bool) -> "GuideRun":
        """Return the run as it would be at other noise, of a guide in which nothing else depends on the noise."""
        trace, sites = self.trace.copy(), {}
        for name, site in self.sites.items():
            e = noise(name).detach().requires_grad_(tracked)
            value, sites[name] = place(trace.nodes[name]["fn"], lambda core, e=e: e, detach_scale)  # type: ignore[misc]
            sites[name] = replace(sites[name], scale=None) if site.scale is None else sites[name]
            trace.nodes[name] = {**trace.nodes[name], "value": value}
        return GuideRun(trace, sites, self.unperturbed, self.signature, tracked)


class Step(NoiseSpace):
    """One step of one particle, or of one batch of vectorised particles: its passes, and its noise space.

    Args:
        model: Called with ``args`` and ``kwargs``; inside its particle plate where particles are vectorised.
        guide: Likewise.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        num_particles: Number of vectorised particles.
        law: The law that will choose the noise.
        hidden: Tells from its name whether a guide site is left at its own random sample.
        scope: What one norm runs over.
        memory: Where the ascent gradient comes from, if not from a pass of its own.
        sync_ascent: Whether the gradient is the mean over all processes of ``torch.distributed``.
        trace_model: Traces the model, given it, ``args`` and ``kwargs``.
        inspect: Called after a run of both, with the guide's run and the model's trace; raises on a misfit.
        is_new: Whether to inspect the ascent's runs too, as nothing is known of model and guide.
        noise_ends_there: Tells of a guide's run, and a way to run it at other noise, whether nothing but the values
            of its Gaussian sites depends on the noise. Then the guide runs only once a step.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        num_particles: int,
        law: Perturbation,
        hidden: Callable[[str], bool],
        scope: Scope,
        memory: PreviousGradients | None,
        sync_ascent: bool,
        trace_model: Callable[..., Trace],
        inspect: Callable[[GuideRun, Trace], None],
        is_new: bool,
        noise_ends_there: Callable[[GuideRun, Callable[[Mapping[str, Tensor]], GuideRun]], bool],
    ) -> None:
        super().__init__(num_particles)
        self._model, self._guide, self._args, self._kwargs = model, guide, args, kwargs
        self._hidden, self._scope, self._sync_ascent = hidden, scope, sync_ascent
        self._trace_model, self._inspect, self._noise_ends_there = trace_model, inspect, noise_ends_there
        self._memory = memory if law.uses_gradient else None
        self._is_new = is_new
        self._many_passes = not isinstance(law, Gaussian)
        self._ascends = law.uses_gradient and memory is None
        self._held: dict[str, Tensor] = {}
        self._bookmarks: dict[str, RandomState] | None = {} if self._many_passes else None
        self._model_bookmarks: dict[str, RandomState] | None = {} if self._many_passes else None
        self._guide_start: RandomState | None = None
        self._model_start: RandomState | None = None
        self._sites: dict[str, NoiseSite] = {}
        self._first: GuideRun | None = None  # the guide's first run, and its noise until a pass uses it
        self._first_noise: Tensor | None = None
        self._mean: Tensor | None = None
        self._gaussian: Tensor | None = None
        self.mean_gradients: dict[str, Tensor] = {}

    # What a law asks for

    def zeros(self) -> Tensor:
        """Return the noise of the guide's mean."""
        if self._mean is None:
            self._mean = self._draw(lambda name, core: zero_noise(core))
        return self._mean

    def gaussian(self) -> Tensor:
        """Draw standard normal noise; where it comes first, in the guide's own order of random numbers."""
        self._gaussian = self._draw(lambda name, core: standard_normal(core))
        return self._gaussian

    def gradient(self, e: Tensor) -> Tensor:
        """Return the data term's gradient at noise ``e``, without a trace; or what is remembered of earlier steps."""
        if self._memory is not None:
            return self._flatten([self._memory.recall(name, site.noise) for name, site in self._sites.items()])
        with torch.enable_grad(), kept_buffers():
            run = self._guide_run(e, tracked=True)
            loss = data_loss(self._model_run(run, inspect=self._is_new))
            noises = {name: site.noise for name, site in run.sites.items()}
            samples = {name: site.sample for name, site in run.sites.items()} if e is self._mean else {}
            gradients = _gradients(loss, [*noises.values(), *samples.values()])
        if samples:
            self.mean_gradients = dict(zip(samples, gradients[len(noises) :], strict=True))
        u = self._flatten(gradients[: len(noises)])
        return mean_over_ranks(u) if self._sync_ascent else u

    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return the means and standard deviations, which only diagonal sites have."""
        locs, scales = [], []
        for name, site in self._sites.items():
            if site.scale is None:
                reason = "is whitened noise" if isinstance(site.core, Normal) else "has a full covariance"
                raise ValueError(
                    f"guide site '{name}' {reason}; geometry='euclidean', 'adaptive' and 'fisher' need diagonal Normal "
                    "sites. Use geometry='posterior', or a mean-field guide."
                )
            locs.append(site.loc.expand(site.noise.shape))
            scales.append(site.scale)
        return self._flatten(locs), self._flatten(scales)

    def groups(self, e: Tensor) -> list[Tensor]:
        """Split noise into the groups that share a norm, each ``(P, number of groups, scalars per group)``."""
        if self._scope == "global":
            return [e.unsqueeze(1)]
        sizes = [site.group_size if self._scope == "event" else part.shape[-1] for site, part in self._parts(e)]
        return [part.unflatten(-1, (-1, size)) for size, (_, part) in zip(sizes, self._parts(e), strict=True)]

    def join(self, groups: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`groups`."""
        return torch.cat([group.flatten(1) for group in groups], -1)

    # What the estimator asks for

    def is_gaussian(self, e: Tensor) -> bool:
        """Return whether ``e`` is the law's own Gaussian draw, as it came."""
        return e is self._gaussian

    def final_run(self, e: Tensor, *, tracked: bool, detach_scale: bool) -> tuple[GuideRun, Trace]:
        """Run guide and model at the chosen noise, for good: buffers keep what the model writes, unless it raises.

        Args:
            e: Chosen noise.
            tracked: Whether the noise is a leaf of the graph, to see what depends on it.
            detach_scale: Whether the model's values have no gradient to the guide's scale.
        """
        run = self._guide_run(e, tracked=tracked, detach_scale=detach_scale)
        if self._memory is not None:
            _refuse_subsampled(run)
            self._memory.watch(run.sites)
        return run, self._model_run(run)

    def trial_run(self, e: Tensor) -> tuple[GuideRun, Trace]:
        """Run guide and model once more with the noise as leaves of the graph, to see what depends on it."""
        with torch.enable_grad(), kept_buffers():
            run = self._guide_run(e, tracked=True)
            return run, self._model_run(run, inspect=False)

    def gaussian_run(self, *, with_model: bool) -> tuple[GuideRun, Trace | None]:
        """Run the guide, and on demand the model, at Gaussian noise: the law's own draw if it made one."""
        e = self.gaussian() if self._gaussian is None else self._gaussian
        with kept_buffers():
            run = self._guide_run(e, tracked=False)
            return run, self._model_run(run) if with_model else None

    def check(self, e: Tensor | None) -> None:
        """Run guide and model under torch's own checks of their distributions, which raise; at noise 0 for None.

        Noise that is not finite comes from bad values as well, so that the run at 0 comes first.
        """
        with kept_buffers():
            mean = self.zeros()  # finds the sites, if no pass has
            noises = [mean] if e is None else [e] if bool(e.isfinite().all()) else [mean, e]
            for noise in noises:
                run = self._rerun(self._per_site(noise))
                for trace in (run.trace, self._model_run(run)):
                    trace.compute_log_prob()

    # Passes

    def _draw(self, noise: Callable[[str, CoreNormal], Tensor]) -> Tensor:
        """Return the noise of all sites, flat; the first draw finds the sites by running the guide."""
        if self._first is None:
            with torch.enable_grad() if self._ascends else nullcontext():
                run = self._run_guide(noise, tracked=self._ascends, detach_scale=False)
            if not run.sites and self._many_passes:
                raise ValueError(_no_gaussian_site(run.unperturbed))
            self._first, self._sites = run, run.sites
            self._first_noise = self._flatten([site.noise for site in run.sites.values()])
            return self._first_noise
        return self._flatten([noise(name, site.core) for name, site in self._sites.items()])

    def _guide_run(self, e: Tensor, *, tracked: bool, detach_scale: bool = False) -> GuideRun:
        first = self._first
        if first is not None and e is self._first_noise and first.tracked == tracked and not detach_scale:
            self._first_noise = None
            return first
        parts = self._per_site(e)
        if first is not None and self._noise_ends_there(first, self._rerun):
            return first.at(parts.__getitem__, tracked=tracked, detach_scale=detach_scale)
        return self._rerun(parts, tracked=tracked, detach_scale=detach_scale)

    def _rerun(self, noise: Mapping[str, Tensor], *, tracked: bool = False, detach_scale: bool = False) -> GuideRun:
        with kept_buffers():
            return self._run_guide(lambda name, core: noise[name], tracked=tracked, detach_scale=detach_scale)

    def _run_guide(self, noise: Callable[[str, CoreNormal], Tensor], *, tracked: bool, detach_scale: bool) -> GuideRun:
        def leaf(name: str, core: CoreNormal) -> Tensor:
            return noise(name, core).detach().requires_grad_(tracked)

        handler = NoiseMessenger(leaf, self._hidden, self._held, self._bookmarks, detach_scale)
        self._guide_start, stream = self._stream(self._guide_start)
        with stream, handler:
            trace = poutine.trace(self._guide).get_trace(*self._args, **self._kwargs)
        return GuideRun(trace, handler.sites, handler.unperturbed, signature(trace), tracked)

    def _model_run(self, run: GuideRun, *, inspect: bool = True) -> Trace:
        self._model_start, stream = self._stream(self._model_start)
        with stream, ReplayMessenger(run.trace.nodes, self._held, self._model_bookmarks):
            trace = self._trace_model(self._model, args=self._args, kwargs=self._kwargs)
        if inspect:
            self._inspect(run, trace)
        return trace

    def _stream(self, start: RandomState | None) -> tuple[RandomState | None, AbstractContextManager[None]]:
        if start is not None:
            return start, rewound(start)
        return (RandomState.capture() if self._many_passes else None), nullcontext()

    # Flat noise

    def _parts(self, e: Tensor) -> list[tuple[NoiseSite, Tensor]]:
        sites = list(self._sites.values())
        sizes = [site.noise.numel() // self.num_particles for site in sites]
        return list(zip(sites, e.split(sizes, -1), strict=True))

    def _per_site(self, e: Tensor) -> dict[str, Tensor]:
        return {
            name: part.reshape(site.noise.shape).to(site.noise.device, site.noise.dtype)
            for name, (site, part) in zip(self._sites, self._parts(e.detach()), strict=True)
        }

    def _flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        if not tensors:
            return torch.zeros(self.num_particles, 0)
        dtype = reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
        device = tensors[0].device
        return torch.cat([tensor.detach().reshape(self.num_particles, -1).to(device, dtype) for tensor in tensors], -1)


def _no_gaussian_site(unperturbed: dict[str, str]) -> str:
    reasons = "; ".join(f"'{name}': {reason}" for name, reason in unperturbed.items()) or "it has no latent site at all"
    return (
        f"the guide has no Gaussian site to perturb ({reasons}). Use MeanFieldNormal or another guide with "
        "reparameterised Normal sites, or perturbation=Gaussian()."
    )


def _refuse_subsampled(run: GuideRun) -> None:
    for name in run.sites:
        for frame in run.trace.nodes[name]["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"ascent='previous' needs the same latents at every step, and site '{name}' is inside the "
                    f"subsampled plate '{frame.name}'; name it in hide=, or use ascent='fresh'."
                )


def _gradients(loss: Tensor | float, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of ``loss``, zero where it does not depend on an input."""
    if not inputs or not isinstance(loss, Tensor) or not loss.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=True)]
