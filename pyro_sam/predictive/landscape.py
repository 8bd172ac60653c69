"""The data loss around the mean of a trained guide, as a function of one flat vector."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_sam._base.arguments import one_of
from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.random_state import RandomState, Streams, rewound
from pyro_sam._base.surroundings import Surroundings
from pyro_sam._step.call import Call
from pyro_sam._step.enumeration import Enumeration
from pyro_sam._step.handlers import NoiseMessenger, ReplayMessenger
from pyro_sam._step.loss import data_loss
from pyro_sam._step.sites import CoreNormal, NoiseSite, zero_noise
from pyro_sam.predictive.streaming import check_pair

Space = Literal["weight", "noise"]
SPACES: tuple[str, ...] = ("weight", "noise")


class Landscape:
    r"""The loss :math:`L(v) = -\log p(x \mid w)` at the guide's mean displaced by ``v``.

    In noise space ``v`` counts posterior standard deviations, :math:`w = T(v)`; in weight space it has the units of
    the latents, :math:`w = \mathrm{loc} + v` (of their unconstrained values, where they are constrained). The loss
    is a sum over data, scaled as the model's plates say, in nats. All evaluations share the minibatch and the
    dropout masks, leave buffers as they are and write to no parameter.

    Args:
        model: Pyro model.
        guide: Its guide, trained.
        args: Arguments of both, with the observations.
        space: ``"weight"`` or ``"noise"``.
    Raises:
        ValueError: If ``space`` is neither, the guide has no Gaussian site or is in half precision, or in weight space
            a site of it has no standard deviations of its own.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], space: Space
    ) -> None:
        one_of("space", space, SPACES)
        check_pair(model, guide)
        self._guide, self._args = guide, args
        seen = Surroundings(model, guide, *args)
        self._call = Call(model, guide, args, {}, Streams(own=tuple(seen.generators)), tuple(seen.modules))
        self._start, self._held = RandomState.capture(self._call.streams), dict[str, Tensor]()
        self._enumeration = Enumeration()
        with torch.no_grad(), rewound(self._start, self._call.streams), kept_buffers(self._call.modules):
            self._sites = self._run_guide(lambda name, core: zero_noise(core))[1]
        if not self._sites:
            raise ValueError(
                "guide must have a Gaussian site to move around in, got none. Use MeanFieldNormal or another guide "
                "with reparameterised Normal sites."
            )
        noises = [site.noise for site in self._sites.values()]
        if any(torch.finfo(noise.dtype).bits == 16 for noise in noises):
            raise ValueError(
                "differences of the loss are lost in half precision, which the guide is in: make guide and network "
                "single, guide.float() and bnn.float()."
            )
        self._scale = self._flat_scale() if space == "weight" else None
        self.zero = torch.cat([torch.zeros_like(noise).reshape(-1) for noise in noises])

    def __call__(self, v: Tensor) -> Tensor:
        """Return the loss at displacement ``v``, shape ``(d,)``, with its graph to ``v``."""
        e = v if self._scale is None else v / self._scale
        sizes = [site.noise.numel() for site in self._sites.values()]
        noise = {
            name: part.reshape(site.noise.shape).to(site.noise)
            for (name, site), part in zip(self._sites.items(), e.split(sizes), strict=True)
        }
        with rewound(self._start, self._call.streams), kept_buffers(self._call.modules):
            trace = self._run_guide(lambda name, core: noise[name])[0]
            with ReplayMessenger(trace.nodes, self._held):
                model = self._enumeration.trace(self._call, self._first_dim)
        loss: Any = data_loss(model)
        return loss if isinstance(loss, Tensor) else v.new_tensor(loss)

    def value(self, v: Tensor) -> float:
        """Return the loss at displacement ``v`` as a number."""
        with torch.no_grad():
            return self(v).item()

    def gradient(self, v: Tensor) -> Tensor:
        """Return the loss's gradient at displacement ``v``, shape ``(d,)``."""
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            return _gradient(self(v), v)

    def hessian_product(self) -> Callable[[Tensor], Tensor]:
        """Return the function that multiplies a vector by the Hessian at the mean."""
        with torch.enable_grad():
            v = self.zero.clone().requires_grad_()
            gradient = _gradient(self(v), v, create_graph=True)

        def product(vector: Tensor) -> Tensor:
            if not gradient.requires_grad:  # a linear loss
                return torch.zeros_like(vector)
            return _gradient(gradient @ vector, v, retain_graph=True)

        return product

    def _run_guide(self, noise: Callable[[str, CoreNormal], Tensor]) -> tuple[Any, dict[str, NoiseSite]]:
        with NoiseMessenger(noise, lambda name: False, self._held, {}, None) as handler:
            trace = poutine.trace(self._guide).get_trace(*self._args)
        return trace, handler.sites

    def _flat_scale(self) -> Tensor:
        scales = []
        for name, site in self._sites.items():
            if site.scale is None:
                raise ValueError(
                    f"space='weight' needs diagonal Normal sites with standard deviations of their own, which guide "
                    f"site '{name}' has not. Use space='noise', or a mean-field guide."
                )
            scales.append(site.scale.detach().reshape(-1))
        return torch.cat(scales)

    def _first_dim(self) -> int:
        elbo: Any = Trace_ELBO()
        elbo._guess_max_plate_nesting(self._call.model, self._guide, self._args, {})
        return -1 - int(elbo.max_plate_nesting)


def _gradient(output: Tensor, v: Tensor, *, retain_graph: bool = False, create_graph: bool = False) -> Tensor:
    if not output.requires_grad:
        return torch.zeros_like(v)
    (gradient,) = torch.autograd.grad(
        output, v, retain_graph=retain_graph or create_graph, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(v) if gradient is None else gradient
