r"""Adam on the objective of ``map``.

.. math:: N \cdot \mathrm{mean}_{\mathrm{batch}}\left(-\log p(y \mid x, w)\right)
    + \mathrm{kl\_weight} \sum_k \frac{w_k^2}{2 \sigma_k^2}

N is the number of training rows, :math:`\sigma_k` the prior's standard deviation.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from pyro_sam.study.survey.outside.start import Start


class Descent:
    """Trains the network of a start.

    Args:
        start: Network, rows and settings.
        share: Share of the learning rate at a step, in the place of the start's.
    """

    def __init__(self, start: Start, share: Callable[[float], float] | None = None) -> None:
        self._start, self._precisions = start, start.plain.precisions()
        self._optim = torch.optim.Adam(start.plain.parameters(), start.numbers["lr"])
        self._scheduler = LambdaLR(self._optim, share or start.share)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the objective, its data term estimated on a batch."""
        plain = self._start.plain
        penalty = torch.stack([0.5 * tau * each.square().sum() for each, tau in self._precisions.items()]).sum()
        return self._start.num_rows * plain.nll(x, y) + self._start.numbers["kl_weight"] * penalty

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take a step on a batch."""
        self._optim.zero_grad()
        self.objective(x, y).backward()
        self._optim.step()
        self._scheduler.step()
