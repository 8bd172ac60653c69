r"""VariationalSAM and mean-field VI as one would write them by hand, for one network: what an estimator cannot beat.

It is the algorithm of :class:`pyro_sam.SAM_ELBO` with :class:`~pyro_sam.MeanFieldNormal` and nothing else: scale is the
softplus of what the optimiser moves, the KL from the Normal(0, 1) prior is in closed form, Adam is fused.

.. math:: \mathrm{loss} = -\log p(x \mid \mathrm{loc} + \mathrm{scale} \odot e) + KL, \qquad
    e = z \text{ or } u / \lVert u \rVert, \; u = \mathrm{scale} \odot \nabla(-\log p(x \mid \mathrm{loc}))
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import softplus

from benchmarks.problems import Problem

INIT_SCALE = 0.02
LEARNING_RATE = 1e-3


class HandWritten:
    """A training loop's body.

    Args:
        problem: What to train.
        law: ``"adversarial"`` with radius 1, or ``"gaussian"``.
        flat: Whether all weights are one vector, or each tensor its own.
    Attributes:
        locs: Means of the posterior.
        rhos: What scale is the softplus of.
    """

    def __init__(self, problem: Problem, law: Literal["adversarial", "gaussian"], *, flat: bool) -> None:
        self.problem, self.law, self.flat = problem, law, flat
        named = dict(problem.net.named_parameters())
        self._names, self._shapes = list(named), [p.shape for p in named.values()]
        self._sizes = [p.numel() for p in named.values()]
        starts = [p.detach().clone() for p in named.values()]
        if flat:
            starts = [torch.cat([start.flatten() for start in starts])]
        rho = math.log(math.expm1(INIT_SCALE))
        self.locs = [start.requires_grad_() for start in starts]
        self.rhos = [torch.full_like(start, rho).requires_grad_() for start in starts]
        self._optimizer = torch.optim.Adam([*self.locs, *self.rhos], lr=LEARNING_RATE, fused=True)

    def loss(self) -> Tensor:
        """Return the loss, with its graph."""
        scales = [softplus(rho) for rho in self.rhos]
        noise = self._ascend(scales) if self.law == "adversarial" else [torch.randn_like(loc) for loc in self.locs]
        weights = [loc + scale * e for loc, scale, e in zip(self.locs, scales, noise, strict=True)]
        kl = [(0.5 * (scale**2 + loc**2 - 1) - scale.log()).sum() for loc, scale in zip(self.locs, scales, strict=True)]
        return self._nll(weights) + sum(kl)

    def step(self) -> float:
        """Take a step and return its loss."""
        loss = self.loss()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def _ascend(self, scales: list[Tensor]) -> list[Tensor]:
        means = [loc.detach().requires_grad_() for loc in self.locs]
        gradients = torch.autograd.grad(self._nll(means), means)
        u = [scale.detach() * gradient for scale, gradient in zip(scales, gradients, strict=True)]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in u]))
        return [each / norm for each in u]

    def _nll(self, weights: list[Tensor]) -> Tensor:
        if self.flat:
            parts = weights[0].split(self._sizes)
            weights = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        output = functional_call(self.problem.net, dict(zip(self._names, weights, strict=True)), (self.problem.x,))
        return self.problem.nll(output, self.problem.y)
