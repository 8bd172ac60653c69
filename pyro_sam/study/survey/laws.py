"""Laws that the library does not have, written as a user would write them."""

import dataclasses
from typing import ClassVar

from torch import Tensor

import pyro_sam as ps


@dataclasses.dataclass
class Antithetic(ps.Perturbation):
    """``e = z`` for one particle and ``e = -z`` for the next: a pair with mean zero. Costs a gradient a particle.

    For an even ``num_particles`` without ``vectorize_particles``.
    """

    uses_gradient: ClassVar[bool] = False
    _drawn: Tensor | None = None

    def noise(self, space: ps.NoiseSpace) -> Tensor:
        """Return a draw, or minus the last one."""
        if self._drawn is None:
            self._drawn = space.gaussian()
            return self._drawn
        drawn, self._drawn = self._drawn, None
        return -drawn
