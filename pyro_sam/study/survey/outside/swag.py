r"""SWAG: a Gaussian of the weights that Adam passes through at a constant learning rate, behind a training of ``map``.

With the mean :math:`\bar\theta`, the variances :math:`\sigma^2` of all snapshots, and the columns
:math:`\theta_i - \bar\theta_i`, each from the mean at its time, of the last K snapshots in D, a sample is

.. math:: \theta = \bar\theta + \frac{1}{\sqrt 2} \sigma \odot z_1 + \frac{1}{\sqrt{2 (K - 1)}} D z_2.

References:
    Maddox et al. (2019), "A simple baseline for Bayesian uncertainty in deep learning", arXiv:1902.02476,
    Algorithm 1, there with SGD.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from pyro_sam.study.survey.outside.descent import Descent
from pyro_sam.study.survey.outside.start import Start

_RANK, _NUMBER = 20, 100  # of deviations, and about how many snapshots
_COLLECTED = 0.25  # share of the steps that is at the constant learning rate


class Snapshots:
    """Mean, variances and last deviations of vectors.

    Args:
        rank: Largest number K of deviations.

    Attributes:
        number: How many vectors there were.
        mean: Their mean.
        columns: Deviations of the last ones from the mean at their time, shape ``(d, K)``.
    """

    def __init__(self, rank: int = _RANK) -> None:
        self._rank, self.number = rank, 0
        self.mean = self._squares = torch.zeros(())
        self.columns = torch.zeros(())

    def add(self, theta: Tensor) -> None:
        """Take in a vector."""
        self.number += 1
        before = theta - self.mean
        self.mean = self.mean + before / self.number
        after = theta - self.mean
        self._squares = self._squares + before * after  # Welford's: no cancellation
        kept = self.columns if self.columns.dim() else after.new_zeros(len(after), 0)
        self.columns = torch.cat([kept, after[:, None]], 1)[:, -self._rank :]

    @property
    def variance(self) -> Tensor:
        """Variances, of the n vectors by 1 / n."""
        return self._squares / self.number

    def at(self, z_1: Tensor, z_2: Tensor) -> Tensor:
        """Return the sample that belongs to standard normal noises.

        Args:
            z_1: Shape ``(d,)``.
            z_2: Shape ``(K,)``.
        """
        low_rank = self.columns @ z_2 / max(self.columns.shape[1] - 1, 1) ** 0.5
        return self.mean + (self.variance.sqrt() * z_1 + low_rank) / 2**0.5

    def sample(self) -> Tensor:
        """Draw a vector."""
        return self.at(torch.randn_like(self.mean), torch.randn_like(self.columns[0]))


class Swag:
    """A run of SWAG: ``map`` on its cosine for a first part, then the learning rate ``swa_lr`` and snapshots.

    Args:
        start: Network, rows and settings.
        collected: Share of the steps that snapshots are taken in; 0 for a single one at the end of ``map``.

    Attributes:
        snapshots: Of the parameters.
    """

    def __init__(self, start: Start, collected: float = _COLLECTED) -> None:
        self._start, self.snapshots, self._done = start, Snapshots(), 0
        self._begin = start.steps - int(collected * start.steps)
        self._every = max(1, (start.steps - self._begin) // _NUMBER)
        self._descent = Descent(start, self._share)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take a step, and a snapshot where one is due."""
        self._descent.step(x, y)
        self._done += 1
        left = self._start.steps - self._done
        if left == 0 or (self._done > self._begin and left % self._every == 0):
            self.snapshots.add(parameters_to_vector(self._start.plain.parameters()).detach())

    def sampled(self) -> AbstractContextManager[None]:
        """Place a sample; before the first snapshot there is but the network as it is."""
        return self._start.plain.at(self.snapshots.sample()) if self.snapshots.number else nullcontext()

    def centred(self) -> AbstractContextManager[None]:
        """Place the mean of the snapshots."""
        return self._start.plain.at(self.snapshots.mean) if self.snapshots.number else nullcontext()

    def _share(self, step: float) -> float:
        """Return the share of the learning rate: a cosine that is shorter than that of ``map``, then a constant."""
        if step < self._begin:
            return self._start.share(step * self._start.steps / self._begin)
        return self._start.numbers["swa_lr"] / self._start.numbers["lr"]
