r"""The step of a mean-field guide whose structure is known: the same numbers by a short way.

The guide is not run: its parameters are two vectors, the noise is a third one. The model runs under one handler that
hands out the vector's parts. Nothing is traced, and what an ordinary step has checked is not checked again. A run that
differs from what is known ends in :class:`Surprise`, and the step is taken in the ordinary way.
"""

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from pyro_sam._base.buffers import Buffers
from pyro_sam._base.random_state import RandomState, rewound
from pyro_sam._flat.known import Known
from pyro_sam._flat.priors import NormalPriors
from pyro_sam._flat.recorder import Recorder
from pyro_sam._flat.vectors import FlatNormal
from pyro_sam._step.knowledge import signature_of_sites
from pyro_sam._step.loss import data_loss_of, kl_of_site, weighted
from pyro_sam._step.memory import PreviousGradients
from pyro_sam.perturbation import NoiseSpace, Perturbation


class LeanStep(NoiseSpace):
    """One step of one particle.

    Args:
        flat: The guide's sites.
        known: What is known of the model.
        model: Called with ``args`` and ``kwargs``.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        lead: Dimensions that vectorised particles put at the left of a value, the number of particles first.
        law: The law that will choose the noise.
        scope: What one norm runs over.
        memory: Where the ascent gradient comes from, if not from a pass of its own.
        finish: What is to be called after the backward pass.
    Attributes:
        buffers: Watches the modules that are called, and puts back what a pass has done to their buffers.
    """

    def __init__(
        self,
        flat: FlatNormal,
        known: Known,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        lead: Sequence[int],
        law: Perturbation,
        scope: str,
        memory: PreviousGradients | None,
        finish: Callable[[], None],
    ) -> None:
        super().__init__(lead[0] if lead else 1)
        self._lead = lead
        self._flat, self._known = flat, known
        self._model, self._args, self._kwargs = model, args, kwargs
        self._scope, self.finish = scope, finish
        self._memory = memory if law.uses_gradient else None
        self._many_passes = law.uses_gradient and memory is None
        self._held: dict[str, Tensor] = {}
        self._bookmarks: dict[str, RandomState] | None = {} if self._many_passes else None
        self._model_start: RandomState | None = None
        self.buffers = Buffers()
        self._looked_at: set[Any] = set()
        self._mean: Tensor | None = None
        self._mean_gradient: Tensor | None = None

    def zeros(self) -> Tensor:
        """Return the noise of the guide's mean."""
        if self._mean is None:
            self._mean = self._flat.loc.new_zeros(self.num_particles, len(self._flat.loc))
        return self._mean

    def gaussian(self) -> Tensor:
        """Draw standard normal noise, site by site as the guide would."""
        e = torch.empty_like(self._flat.loc)
        if self._lead:
            like = {name: part.expand(*self._lead, *part.shape) for name, part in self._flat.split(e).items()}
            return torch.cat([torch.randn_like(part).view(self.num_particles, -1) for part in like.values()], -1)
        for part in self._flat.split(e).values():
            part.normal_()
        return e.unsqueeze(0)

    def gradient(self, e: Tensor) -> Tensor:
        """Return the data term's gradient at noise ``e``; or what is remembered of earlier steps."""
        flat = self._flat
        if self._memory is not None:
            return self._memory.recall_flat(flat).unsqueeze(0)
        with torch.enable_grad():
            mean = flat.loc.expand_as(e) if self._lead else flat.loc
            w = (mean if e is self._mean else flat.at(self._noise(e))).detach().requires_grad_()
            loss = data_loss_of(self._run(w).nodes.values())
            if isinstance(loss, Tensor) and loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss, [w], allow_unused=True)
            else:
                gradient = None
        self.buffers.restore()
        gradient = torch.zeros_like(w) if gradient is None else gradient
        if e is self._mean:
            self._mean_gradient = gradient
        return (gradient * flat.scale.detach()).view_as(e)

    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return the means and standard deviations."""
        shape = self.num_particles, len(self._flat.loc)
        return self._flat.loc.detach().expand(shape), self._flat.scale.detach().expand(shape)

    def groups(self, e: Tensor) -> list[Tensor]:
        """Split noise into the groups that share a norm, each ``(P, 1, scalars per group)``."""
        if self._scope == "global":
            return [e.unsqueeze(1)]
        return [part.unsqueeze(1) for part in e.split(self._flat.sizes, -1)]

    def join(self, groups: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`groups`."""
        return groups[0].flatten(1) if len(groups) == 1 else torch.cat([group.flatten(1) for group in groups], -1)

    def loss(self, e: Tensor, kl_weight: float | Tensor, *, scale_at_mean: bool) -> tuple[Any, Recorder]:
        """Return the loss at noise ``e`` with its graph, and the run it comes from.

        Args:
            e: Chosen noise.
            kl_weight: Weight of the KL.
            scale_at_mean: Whether the gradient of scale is the one at the mean.
        """
        flat, e = self._flat, self._noise(e)
        w = flat.at(e, detach_scale=scale_at_mean)
        if self._memory is not None:
            self._memory.watch_flat(flat, w)
        run = self._run(w)
        priors = self._known.look_up(run, flat, signature_of_sites(run.nodes))
        loss = data_loss_of(run.nodes.values())
        if scale_at_mean and self._mean_gradient is not None:
            linear = (self._mean_gradient * e * flat.scale).sum()
            loss = loss + (linear - linear.detach())
        if isinstance(kl_weight, Tensor) or kl_weight != 0:
            loss = loss + weighted(kl_weight, self._kl(priors, run))
        return loss, run

    def _noise(self, e: Tensor) -> Tensor:
        return e.detach() if self._lead else e[0].detach()

    def _kl(self, priors: NormalPriors, run: Recorder) -> Any:
        terms = priors.kl(flat=self._flat)
        if self._lead:
            terms = [self.num_particles * term for term in terms]
        terms += [self._kl_of(name, run.values[name], prior) for name, prior in priors.others.items()]
        terms += [self._kl_of(name, run.values[name], prior) for name, prior in run.latents().items()]
        return reduce(operator.add, terms)

    def _kl_of(self, name: str, value: Tensor, prior: Any) -> Any:
        plain: Any = {"args": (), "kwargs": {}, "scale": 1.0, "mask": None, "value": value}
        return kl_of_site({**plain, "fn": self._flat.site(name)}, {**plain, "fn": prior})

    def _run(self, w: Tensor) -> Recorder:
        stream: AbstractContextManager[None] = nullcontext()
        if self._model_start is not None:
            stream = rewound(self._model_start)
        elif self._many_passes:
            self._model_start = RandomState.capture()
        values = self._flat.split(w, self._lead)
        with stream, Recorder(values, self._held, self._bookmarks, self._looked_at, self.buffers, self._lead) as run:
            self._model(*self._args, **self._kwargs)
        return run
