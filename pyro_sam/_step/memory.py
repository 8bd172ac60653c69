r"""The ascent direction from earlier steps: an average of the descent passes' own gradients, at no pass of its own."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_sam._flat.vectors import FlatNormal
from pyro_sam._step.sites import CoreNormal, NoiseSite, pull_back


class PreviousGradients:
    r"""An exponential average of the gradients in noise space, one tensor per guide site.

    .. math:: \bar u \leftarrow \mathrm{decay}\, \bar u + (1 - \mathrm{decay})\, \nabla_e L(T(e))

    It starts at zero. A gradient that is not finite, as a loss scaler for half precision provokes, leaves it as it is.

    Args:
        decay: Weight of the past, in [0, 1).
    References:
        Becker et al. (2024), "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead",
        arXiv:2401.12033.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._averages: dict[str, Tensor] = {}
        self._vector: Tensor | None = None  # all averages are parts of it, in lean steps
        self._pair: Any = None

    def of(self, pair: Any) -> "PreviousGradients":
        """Return the averages for a pair of model and guide; another pair than the last one starts from zero."""
        if self._pair is not None and self._pair is not pair:
            self._averages, self._vector = {}, None
        self._pair = pair
        return self

    def recall(self, name: str, noise: Tensor) -> Tensor:
        """Return the average of a site with this noise, shaped like it."""
        average = self._averages.get(name)
        if average is None or average.shape != noise.shape:
            average = torch.zeros_like(noise)
        average = average.to(noise)
        if average is not self._averages.get(name):
            self._averages[name], self._vector = average, None
        return average

    def recall_flat(self, flat: FlatNormal) -> Tensor:
        """Return the averages of all sites of a guide, one after the other."""
        if self._vector is None:
            parts = flat.split(flat.loc.detach())
            self._vector = torch.cat([self.recall(name, part).flatten() for name, part in parts.items()])
            self._averages = flat.split(self._vector)
        return self._vector

    def watch(self, sites: Mapping[str, NoiseSite]) -> None:
        """Have the backward pass of a run add its gradients to the averages."""
        for name, site in sites.items():
            if site.sample.requires_grad:
                # not the site: a hook that holds its own tensor keeps it, and its graph, for ever
                site.sample.register_hook(partial(self._add, name, site.core, site.noise))

    def watch_flat(self, flat: FlatNormal, w: Tensor) -> None:
        """Have the backward pass of a run at the values ``w`` add its gradient to the averages."""
        if w.requires_grad:
            w.register_hook(partial(self._add_flat, self.recall_flat(flat), flat.scale.detach()))

    @torch.no_grad()
    def _add_flat(self, average: Tensor, scale: Tensor, gradient: Tensor) -> None:
        u = gradient * scale
        least, most = torch.aminmax(u)  # NaN if there is one
        is_finite = torch.maximum(-least, most) < math.inf
        torch.where(is_finite, average.lerp(u, 1 - self.decay), average, out=average)

    @torch.no_grad()
    def _add(self, name: str, core: CoreNormal, noise: Tensor, gradient: Tensor) -> None:
        average = self.recall(name, noise)
        u = pull_back(core, gradient)
        average.copy_(torch.where(u.isfinite().all(), self.decay * average + (1 - self.decay) * u, average))

    def tensors(self) -> list[Tensor]:
        """Return the averages themselves."""
        return list(self._averages.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the averages by site."""
        return {name: average.clone() for name, average in self._averages.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over averages by site; the next model and guide go on with them."""
        self._averages = {name: average.detach().clone() for name, average in state.items()}
        self._vector = None
        self._pair = None
