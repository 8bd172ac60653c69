r"""The one noise space and the one loss, above all back ends.

.. math:: \mathrm{loss}(e) = -\log p(x \mid T(e)) + \mathrm{kl\_weight} \cdot KL(q \Vert p)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_sam._base.arguments import Numbers
from pyro_sam._base.ranks import mean_over_ranks
from pyro_sam._step.memory import StepMemory, version
from pyro_sam._step.own_laws import OURS
from pyro_sam._step.passes import Loss, Passes, Ran
from pyro_sam._step.settings import Settings
from pyro_sam.perturbation import NoiseSpace, Perturbation


class Terms(NamedTuple):
    """The two terms of a loss, the KL weighted."""

    data: Loss
    kl: Loss


class Space(NoiseSpace):
    """What a law sees of a step, and the loss at the noise that it chooses.

    A law may write into whatever it was given; nothing else changes.

    Args:
        passes: The back end.
        law: The law that will choose the noise.
        settings: The estimator's settings.
        kl_weight: Weight of the KL, where it is a tensor.
        memory: Where the ascent gradient comes from, if not from a pass of its own.
    """

    def __init__(
        self,
        passes: Passes,
        law: Perturbation,
        settings: Settings,
        kl_weight: Numbers | Tensor,
        memory: StepMemory | None,
    ) -> None:
        super().__init__(passes.num_particles)
        self._passes, self._law, self._settings, self._kl_weight = passes, law, settings, kl_weight
        self._memory = memory if law.uses_gradient else None
        self._at_mean = settings.scale_gradient == "mean" and law.ascends_from_mean
        self._zeros: tuple[Tensor, int] | None = None
        self._draw: tuple[Tensor, int] | None = None
        self._z: Tensor | None = None  # the law's own draw, as it was
        self._mean_gradients: Sequence[Tensor] = ()

    # What a law asks for

    def zeros(self) -> Tensor:
        """Return the noise of the guide's mean."""
        e = self._passes.zeros()
        self._zeros = e, version(e)
        return e

    def gaussian(self) -> Tensor:
        """Draw standard normal noise."""
        e = self._passes.gaussian()
        self._draw = e, version(e)
        self._z = e if type(self._law) in OURS else e.clone()
        return e

    def gradient(self, e: Tensor) -> Tensor:
        """Return the data term's gradient at noise ``e``, without a trace; or what is remembered of earlier steps."""
        e = self._checked(e)
        if self._memory is not None:
            return self._memory.average(self._passes.layout(), e).before.clone()
        with torch.enable_grad():
            u, by_value = self._passes.ascend(e).gradients()
        if self._at_mean and _is_still(e, self._zeros):
            self._mean_gradients = by_value
        return mean_over_ranks(u) if self._settings.sync_ascent else u

    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return the means and standard deviations."""
        return self._passes.loc_and_scale()

    def groups(self, e: Tensor) -> list[Tensor]:
        """Split noise into the groups that share a norm, each ``(P, number of groups, scalars per group)``."""
        if self._settings.scope == "global":
            return [e.unsqueeze(1)]
        sizes = self._passes.layout().sizes
        within = self._passes.group_sizes() if self._settings.scope == "event" else sizes
        return [part.unflatten(-1, (-1, size)) for size, part in zip(within, e.split(sizes, -1), strict=True)]

    def join(self, groups: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`groups`."""
        return groups[0].flatten(1) if len(groups) == 1 else torch.cat([group.flatten(1) for group in groups], -1)

    # What the estimator asks for

    def noise(self) -> Tensor:
        """Have the law choose.

        Raises:
            ValueError: If what it chose is no noise of this space.
        """
        return self._checked(self._law.noise(self))

    def loss(self, e: Tensor) -> Terms:
        """Return the loss at noise ``e``, with its graph."""
        average = None if self._memory is None else self._memory.average(self._passes.layout(), e)
        ran = self._passes.descend(e, detach_scale=self._at_mean, average=average)
        data = ran.data_loss
        if self._at_mean:
            data = data + _scale_gradient(ran, self._mean_gradients, by_row=isinstance(data, Tensor) and data.dim() > 0)
        weight = self._kl_weight
        if not isinstance(weight, Tensor) and weight == 0:
            return Terms(data, 0.0)
        return Terms(data, _weighted(weight, self._kl(ran, e)))

    def _kl(self, ran: Ran, e: Tensor) -> Loss:
        """Return the KL, never at a chosen noise: where it is an estimate, at a Gaussian one."""
        kl = ran.kl()
        if _is_still(e, self._draw):
            return kl
        sees = ran.sees_noise(kl)
        if not sees.kl:
            return kl
        z = self._passes.gaussian() if self._z is None else self._z
        return self._passes.kl_at(z, ran, with_model=sees.prior)

    def _checked(self, e: Any) -> Tensor:
        like = self._draw or self._zeros
        d = self._passes.layout().d
        if not isinstance(e, Tensor) or e.shape != (self.num_particles, d):
            shape = tuple(e.shape) if isinstance(e, Tensor) else type(e).__name__
            raise ValueError(
                f"noise must have shape (P, d) = ({self.num_particles}, {d}), a row for each vectorised particle and a "
                f"column for each perturbed scalar; {type(self._law).__name__} gave {shape}."
            )
        if like is None or (e.dtype, e.device) == (like[0].dtype, like[0].device):
            return e.detach() if e.requires_grad else e
        return e.detach().to(like[0])


def _is_still(e: Tensor, given: tuple[Tensor, int] | None) -> bool:
    """Return whether a law hands back what it was given, as it was."""
    return given is not None and e is given[0] and version(e) == given[1]


def _scale_gradient(ran: Ran, mean_gradients: Sequence[Tensor], *, by_row: bool) -> Loss:
    """Return zero, with the gradient ``g(loc) * e`` to scale; for each replica where ``by_row``."""
    if not mean_gradients:
        return 0.0
    terms = [g * shift for g, shift in zip(mean_gradients, ran.displacements(), strict=True)]
    terms = [term.reshape(len(term), -1).sum(-1) if by_row else term.sum() for term in terms]
    linear: Any = sum(terms)
    return linear - linear.detach()


def _weighted(weight: Any, kl: Loss) -> Loss:
    """Return ``weight * kl``, in the precision of ``kl``."""
    if isinstance(weight, tuple):  # one for each replica
        weight = torch.tensor(weight, dtype=torch.float64, device=kl.device if isinstance(kl, Tensor) else None)
    if isinstance(weight, Tensor):
        return weight.to(kl.dtype) * kl if isinstance(kl, Tensor) else weight * kl
    return kl if weight == 1 else weight * kl
