r"""bSAM, a baseline of the study: no law of the ELBO, but an optimiser with a posterior of its own.

.. math::
    \theta = w + z / \sqrt{N s}, \quad g = \nabla L(\theta), \quad \epsilon = \rho\, g / s, \quad
    g_\epsilon = \nabla L(w + \epsilon), \\
    m \leftarrow \beta_1 m + (1 - \beta_1)(g_\epsilon + \delta w), \quad w \leftarrow w - \alpha\, m / s, \quad
    s \leftarrow \beta_2 s + (1 - \beta_2)(\sqrt s\, |g| + \gamma + \delta)

L is the loss per training row, N their number, and the posterior is :math:`N(w, 1 / (N s))`. A step costs two
gradients. The weight of the KL and the prior are those of the other methods: with :math:`N = \text{rows} /
\text{kl\_weight}` and :math:`\delta = \text{precision of the prior} / N` the objective is theirs.

References:
    Möllenhoff and Khan (2023), "SAM as an optimal relaxation of Bayes", arXiv:2210.01620, Algorithm 1.
"""

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.func import grad, vmap

Gradient = Callable[[Tensor], Tensor]
_BETA_1, _BETA_2, _DAMPING = 0.9, 0.999, 0.1


class BSAM:
    """Runs of bSAM side by side.

    Args:
        w: Weights at the start, shape ``(R, d)``.
        n: N, a number or of shape ``(R, 1)``.
        rho: Radius of the climb, likewise.
        decay: δ, a number or what broadcasts to ``w``.

    Attributes:
        w: Means, shape ``(R, d)``.
        s: Precisions over N, likewise.
    """

    def __init__(self, w: Tensor, n: Tensor | float, rho: Tensor | float, decay: Tensor | float) -> None:
        self.w, self.s, self._m = w.clone(), torch.ones_like(w), torch.zeros_like(w)
        self._n, self._rho, self._decay = n, rho, decay

    @property
    def scale(self) -> Tensor:
        """Posterior standard deviations."""
        return (self._n * self.s).rsqrt()

    def step(self, gradient: Gradient, lr: Tensor | float) -> None:
        """Take a step.

        Args:
            gradient: Returns the gradient of the loss per row at weights of shape ``(R, d)``.
            lr: Learning rate, a number or of shape ``(R, 1)``.
        """
        g = gradient(self.w + self.scale * torch.randn_like(self.w))
        climbed = gradient(self.w + self._rho * g / self.s)
        self._m = _BETA_1 * self._m + (1 - _BETA_1) * (climbed + self._decay * self.w)
        self.w = self.w - lr * self._m / self.s
        self.s = _BETA_2 * self.s + (1 - _BETA_2) * (self.s.sqrt() * g.abs() + _DAMPING + self._decay)


class Trainer:
    """Takes the place of ``svi.step``: trains by bSAM, and places the posterior in the SVI's guide after each step.

    Args:
        svi: Model and guide of R replicas; where they start, bSAM starts.
        numbers: ``lr``, ``rho`` and ``kl_weight``, R numbers each.
        num_rows: Number of training rows.
        share: Returns the share of the learning rate that is left at a step.
    """

    def __init__(self, svi: Any, numbers: Mapping[str, Tensor], num_rows: int, share: Callable[[int], float]) -> None:
        self._svi, self._numbers, self._num_rows, self._share = svi, numbers, num_rows, share
        self._run: BSAM | None = None
        self._steps = 0

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take a step of all replicas.

        Args:
            x: Inputs, shape ``(R, rows, features)``.
            y: Labels or targets, shape ``(R, rows)``.
        """
        if self._run is None:
            self._run = self._begin(x[0], y[0])
        with pyro.validation_enabled(False):  # its checks read values, which a map over replicas has none of
            gradient = vmap(grad(self._loss), randomness="same")
            rates = self._numbers["lr"][:, None] * self._share(self._steps)
            self._run.step(lambda w: gradient(w, x, y), rates)
        self._steps += 1
        self._place(self._run.w, self._run.scale)

    def _begin(self, x: Tensor, y: Tensor) -> BSAM:
        guide = self._svi.guide
        guide.initialize(x, y)
        locs = {name: attrgetter(name)(guide.locs).detach() for name in guide.replica(0).median()}
        self._shapes = {name: loc.shape[1:] for name, loc in locs.items()}
        prior = poutine.trace(self._svi.model).get_trace(x, y).nodes
        spread = torch.cat([prior[name]["fn"].stddev.expand(shape).flatten() for name, shape in self._shapes.items()])
        n = self._num_rows / self._numbers["kl_weight"][:, None]
        start = torch.cat([loc.reshape(len(loc), -1) for loc in locs.values()], 1)
        return BSAM(start, n, self._numbers["rho"][:, None], spread**-2 / n)

    def _loss(self, w: Tensor, x: Tensor, y: Tensor) -> Any:
        values = self._split(w)
        trace = poutine.trace(poutine.condition(self._svi.model, values)).get_trace(x, y)
        likelihood: Any = trace.nodes["obs"]["fn"]
        return -likelihood.log_prob(y).mean()

    def _split(self, w: Tensor) -> dict[str, Tensor]:
        parts = w.split([shape.numel() for shape in self._shapes.values()], -1)
        return {
            name: part.unflatten(-1, shape) if shape else part.squeeze(-1)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def _place(self, w: Tensor, scale: Tensor) -> None:
        for values, module in ((w, self._svi.guide.locs), (scale, self._svi.guide.scales)):
            for name, value in self._split(values).items():
                path, _, last = name.rpartition(".")
                setattr(attrgetter(path)(module) if path else module, last, value)
