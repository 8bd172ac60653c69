"""Closed forms: a quadratic loss under a mean-field Normal guide, as plain tensors and as a Pyro model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_sam.perturbation import NoiseSpace


@dataclass
class Quadratic:
    """The data term ``½ (w - m)ᵀ H (w - m)`` with loc and scale of the guide; all shapes ``(d,)`` and ``(d, d)``."""

    H: Tensor
    m: Tensor
    loc: Tensor
    scale: Tensor

    @classmethod
    def random(cls, d: int = 5, wide: float = 1.0) -> "Quadratic":
        root = torch.randn(d, d)
        return cls(root @ root.T + torch.eye(d), torch.randn(d), torch.randn(d), wide * (0.1 + torch.rand(d)))

    def loss(self, w: Tensor) -> Tensor:
        return 0.5 * (w - self.m) @ self.H @ (w - self.m)

    def gradient(self, w: Tensor) -> Tensor:
        return self.H @ (w - self.m)

    def u(self, e: Tensor) -> Tensor:
        """Gradient in noise space."""
        return self.scale * self.gradient(self.loc + self.scale * e)

    def kl(self) -> Tensor:
        """KL of N(loc, scale²) from N(0, 1)."""
        return (0.5 * (self.scale**2 + self.loc**2 - 1) - self.scale.log()).sum()

    def kl_gradients(self) -> tuple[Tensor, Tensor]:
        return self.loc, self.scale - 1 / self.scale

    def model(self, scaling: float = 1.0) -> Callable[[], None]:
        def model() -> None:
            w = pyro.sample("w", dist.Normal(torch.zeros_like(self.m), 1.0).to_event(1))
            off = w - self.m
            pyro.factor("loss", -0.5 * scaling * ((off @ self.H) * off).sum(-1))

        return model

    def guide(self) -> Callable[[], None]:
        def guide() -> None:
            loc = pyro.param("loc", self.loc.clone())
            scale = pyro.param("scale", self.scale.clone(), constraint=dist.constraints.positive)
            pyro.sample("w", dist.Normal(loc, scale).to_event(1))

        return guide


class QuadraticSpace(NoiseSpace):
    """A law's view of a :class:`Quadratic`, with the given Gaussian draw; ``calls`` counts gradients."""

    def __init__(self, problem: Quadratic, z: Tensor | None = None, sizes: Sequence[int] | None = None) -> None:
        super().__init__(1)
        self.problem, self.z, self.calls = problem, z, 0
        self.sizes = list(sizes or [len(problem.m)])

    def zeros(self) -> Tensor:
        return torch.zeros_like(self.problem.loc)[None]

    def gaussian(self) -> Tensor:
        assert self.z is not None, "the law drew noise that it does not use"
        return self.z[None]

    def gradient(self, e: Tensor) -> Tensor:
        self.calls += 1
        return self.problem.u(e[0])[None]

    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        return self.problem.loc[None], self.problem.scale[None]

    def groups(self, e: Tensor) -> list[Tensor]:
        return [part[:, None] for part in e.split(self.sizes, -1)]

    def join(self, groups: Sequence[Tensor]) -> Tensor:
        return torch.cat([group.flatten(1) for group in groups], -1)


def scale_gradient(log_scale_gradient: Tensor, scale: Tensor) -> Tensor:
    """Turn the gradient in Pyro's unconstrained (log) scale into the one in scale."""
    return log_scale_gradient / scale


def gradients_of(elbo: Any, model: Any, guide: Any, *args: Any) -> tuple[float, dict[str, Tensor]]:
    """Return an estimator's loss and its gradients in the store's unconstrained parameters, zeroed afterwards."""
    store = pyro.get_param_store()
    for _, parameter in store.named_parameters():
        parameter.grad = None
    loss = elbo.loss_and_grads(model, guide, *args)
    gradients = {}
    for name, parameter in store.named_parameters():
        gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        parameter.grad = None
    return loss, gradients
