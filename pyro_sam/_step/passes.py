"""What a back end answers: which noise there is, a draw of it, and what comes of a run at some noise."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pyro_sam._step.memory import Average, Layout

Loss = Tensor | float


class Dependence(NamedTuple):
    """Whether the KL, and the parameters of the priors, depend on the noise of the guide's sites."""

    kl: bool
    prior: bool


class Ran(ABC):
    """What came of a run of guide and model at some noise.

    Attributes:
        data_loss: Minus the log likelihood, scaled and masked.
    """

    data_loss: Loss

    @abstractmethod
    def gradients(self) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the data loss's gradient in the noise, shape ``(P, d)``, and the ones in the Gaussian values."""

    @abstractmethod
    def displacements(self) -> Sequence[Tensor]:
        """Return the Gaussian values less their loc, with the graph to scale."""

    @abstractmethod
    def kl(self) -> Loss:
        """Return the KL, or its estimate at this run's values."""

    @abstractmethod
    def sees_noise(self, kl: Loss) -> Dependence:
        """Return what depends on the noise, given the KL."""


class Passes(ABC):
    """The passes of one step of one particle, or of several that are vectorised together.

    All passes share the minibatch, the dropout masks and the samples of unperturbed sites.

    Attributes:
        runs_guide: Whether the law's choice may run the guide, whose values then must be checked, too.
    """

    runs_guide: ClassVar[bool] = True

    @property
    @abstractmethod
    def num_particles(self) -> int:
        """Number of vectorised particles."""

    @abstractmethod
    def layout(self) -> Layout:
        """Return the perturbed sites."""

    @abstractmethod
    def group_sizes(self) -> Sequence[int]:
        """Return for each site the number of noise scalars of one batch element."""

    @abstractmethod
    def zeros(self) -> Tensor:
        """Return a new tensor with the noise of the guide's mean, shape ``(P, d)``."""

    @abstractmethod
    def gaussian(self) -> Tensor:
        """Draw standard normal noise, shape ``(P, d)``; where it comes first, in the guide's own order."""

    @abstractmethod
    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return copies of the means and standard deviations, shape ``(P, d)``.

        Raises:
            ValueError: If a perturbed site has a full covariance.
        """

    @abstractmethod
    def ascend(self, e: Tensor) -> Ran:
        """Run guide and model at noise ``e``, with a graph from it to the data loss, and leave no trace."""

    @abstractmethod
    def descend(self, e: Tensor, *, detach_scale: bool, average: Average | None) -> Ran:
        """Run guide and model at noise ``e`` for good: buffers keep what the model writes.

        Args:
            e: Noise, shape ``(P, d)``.
            detach_scale: Whether the Gaussian values have no gradient to the guide's scale.
            average: Gradients of earlier steps, which the backward pass shall add its own gradient to; None for none.
        """

    @abstractmethod
    def kl_at(self, e: Tensor, there: Ran, *, with_model: bool) -> Loss:
        """Return the KL's estimate at other noise, without a trace.

        Args:
            e: The noise.
            there: The run whose priors count, unless ``with_model``.
            with_model: Whether to run the model for the priors, too.
        """

    def finish(self) -> None:  # noqa: B027  # most have nothing to do
        """Complete the gradients after the backward pass."""


def gradients(loss: Loss, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of ``loss``, zero where it does not depend on an input."""
    if not inputs or not isinstance(loss, Tensor) or not loss.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]
