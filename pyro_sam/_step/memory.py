r"""The ascent direction from earlier steps: an average of the descent passes' own gradients, at no pass of its own."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout:
    """Where the noise of each site lies in a vector per particle.

    Args:
        names: Names of the sites.
        shapes: Shapes of their noise, that of vectorised particles included.
        num_particles: Number of vectorised particles.
    Attributes:
        sizes: Numbers of scalars per particle.
        d: Their sum.
    """

    def __init__(self, names: tuple[str, ...], shapes: tuple[torch.Size, ...], num_particles: int) -> None:
        self.names, self.shapes, self.num_particles = names, shapes, num_particles
        self.sizes = [shape.numel() // num_particles for shape in shapes]
        self.d = sum(self.sizes)

    def of_one(self) -> "Layout":
        """Return the layout of one replica of several."""
        return Layout(self.names, tuple(shape[1:] for shape in self.shapes), 1)

    def is_like(self, other: "Layout | None") -> bool:
        """Return whether another layout is the same."""
        if self is other:
            return True
        if other is None or self.num_particles != other.num_particles:
            return False
        return (self.names, self.shapes) == (other.names, other.shapes)

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return the parts of ``vectors``, shape (P, d), by site."""
        parts = vectors.split(self.sizes, -1)
        return {name: part.reshape(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}


class PreviousGradients:
    r"""An exponential average of the gradients in noise space, shape ``(P, d)``.

    .. math:: \bar u \leftarrow \mathrm{decay}\, \bar u + (1 - \mathrm{decay})\, \nabla_e L(T(e))

    It starts at zero. An entry that is not finite, as a loss scaler for half precision provokes, leaves it as it is.

    References:
        Becker et al. (2024), "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead",
        arXiv:2401.12033.
    """

    def __init__(self, state: Mapping[str, Tensor] | None = None) -> None:
        self._known = {name: average.detach().clone() for name, average in (state or {}).items()}
        self._layout: Layout | None = None
        self._vector: Tensor | None = None
        self._began: Tensor | None = None  # the vector as it was made, if it was not zero

    def recall(self, layout: Layout, like: Tensor) -> Tensor:
        """Return the average itself, shape ``(P, d)``; zero for a site that is new or has another shape.

        Args:
            layout: The sites of this step.
            like: A tensor of the dtype and device that it shall have.
        """
        vector = self._vector
        same = vector is not None and (vector.dtype, vector.device) == (like.dtype, like.device)
        if vector is None or not same or not layout.is_like(self._layout):
            known = self.state_dict()
            parts = [
                known[name] if name in known and known[name].shape == shape else like.new_zeros(shape)
                for name, shape in zip(layout.names, layout.shapes, strict=True)
            ]
            flat = [part.reshape(layout.num_particles, -1).to(like) for part in parts]
            self._known, self._layout, self._vector = {}, layout, torch.cat(flat, -1)
            self._began = self._vector.clone() if known else None
            return self._vector
        return vector

    def tensors(self) -> list[Tensor]:
        """Return what it writes to."""
        return [] if self._vector is None else [self._vector]

    def begin_again(self) -> None:
        """Put back what the average was before the first gradient was added to it."""
        if self._vector is not None:
            self._vector.zero_() if self._began is None else self._vector.copy_(self._began)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the averages by site."""
        if self._vector is None or self._layout is None:
            return {name: average.clone() for name, average in self._known.items()}
        return {name: average.clone() for name, average in self._layout.split(self._vector).items()}


class Average(NamedTuple):
    r"""An average of gradients, all of it or a part, as one step of ``n`` particles reads it and writes to it.

    .. math:: \bar u \leftarrow \bar u + (1 - \mathrm{decay}) (u_i - \bar u_0 / n)

    A particle's gradient :math:`u_i` comes with its share :math:`1 / n`, so that all of them together, in any order,
    add their mean to what is left of the average :math:`\bar u_0` before the step.

    Args:
        vector: The average itself.
        before: What it was before the step; the same tensor where there is one particle.
        share: ``1 / n``.
    """

    vector: Tensor
    before: Tensor
    share: float = 1.0

    def row(self, r: int) -> "Average":
        """Return the part of one replica."""
        return Average(self.vector[r : r + 1], self.before[r : r + 1], self.share)

    def split(self, layout: Layout) -> dict[str, "Average"]:
        """Return the parts by site."""
        before = layout.split(self.before)
        return {name: Average(part, before[name], self.share) for name, part in layout.split(self.vector).items()}

    @torch.no_grad()
    def add(self, decay: float, u: Tensor) -> None:
        """Add a gradient in noise space, in place.

        Args:
            decay: Weight of the past.
            u: The gradient.
        """
        average = self.vector
        less = self.before if self.share == 1 else self.share * self.before
        new = average + (1 - decay) * (u.reshape(average.shape).to(average) - less)
        average.copy_(torch.where(new.isfinite(), new, average))


class StepMemory:
    """Gradients of earlier steps as the particles of one step see them: all climb along what was before it.

    Args:
        memory: The gradients.
        num_particles: Number of particles that take their turns.
    """

    def __init__(self, memory: PreviousGradients, num_particles: int) -> None:
        self._memory, self._number = memory, num_particles
        self._before: Tensor | None = None

    def average(self, layout: Layout, like: Tensor) -> Average:
        """Return the average; see :meth:`PreviousGradients.recall`."""
        vector = self._memory.recall(layout, like)
        if self._number == 1:
            return Average(vector, vector)
        if self._before is None or self._before.shape != vector.shape:
            self._before = vector.clone()
        return Average(vector, self._before, 1 / self._number)


def flat(tensors: Sequence[Tensor], num_particles: int) -> Tensor:
    """Return tensors side by side as one of shape ``(P, d)``, without a graph."""
    if not tensors:
        return torch.zeros(num_particles, 0)
    dtype, device = tensors[0].dtype, tensors[0].device
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.detach().reshape(num_particles, -1).to(device, dtype) for tensor in tensors], -1)


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written to; an inference tensor does not tell."""
    return 0 if tensor.is_inference() else tensor._version
