"""The values of all sites at a noise, from two vectors, in one operation."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_sam._step.memory import Average, Layout


class Where(NamedTuple):
    """How values lie in a vector.

    Args:
        layout: Where each site lies.
        detach_scale: Whether there is no gradient to scale.
        average: Gradients in the noise, which the backward pass adds its own to, in place; None for none.
        decay: Weight of the past in it.
    """

    layout: Layout
    detach_scale: bool = False
    average: Average | None = None
    decay: float = 0.0


class Place(torch.autograd.Function):
    r"""Values of :math:`\mathrm{loc} + \mathrm{scale} \odot e`, site by site.

    They are tensors of their own, no views: whoever gets one may write into it.
    """

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, e: Tensor, where: Where) -> tuple[Tensor, ...]:
        """Return a tensor per site; ``loc`` and ``scale`` of shape (d,) or (P, d), ``e`` of shape (P, d)."""
        ctx.save_for_backward(scale, e)
        ctx.where, ctx.dims = where, (loc.dim(), scale.dim())
        w = torch.addcmul(loc, scale, e)
        if torch._C._len_torch_dispatch_stack():  # a capture sees operations, not storages
            return tuple(part.clone() for part in where.layout.split(w).values())
        return tuple(_parts(w, where.layout))

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of loc and scale."""
        scale, e = ctx.saved_tensors
        where, p = ctx.where, len(e)
        parts = [
            e.new_zeros(p, size) if g is None else g.reshape(p, size)
            for g, size in zip(outer, where.layout.sizes, strict=True)
        ]
        g = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if where.average is not None:
            where.average.add(where.decay, (g * scale).detach())
        to_loc = g if ctx.dims[0] == 2 else g.sum(0) if p > 1 else g[0]
        to_scale = None
        if ctx.needs_input_grad[1] and not where.detach_scale:
            to_scale = g * e
            to_scale = to_scale if ctx.dims[1] == 2 else to_scale.sum(0) if p > 1 else to_scale[0]
        return to_loc, to_scale, None, None


def _parts(w: Tensor, layout: Layout) -> list[Tensor]:
    """Return the parts of a new tensor as tensors that share its memory, but nothing that autograd knows of."""
    storage, stride, start, found = w.untyped_storage(), w.shape[-1], 0, []
    for shape, size in zip(layout.shapes, layout.sizes, strict=True):
        steps = _steps(shape, size, stride)
        found.append(w.new_empty(0).set_(storage, start, shape, steps))
        start += size
    return found


def _steps(shape: torch.Size, size: int, stride: int) -> tuple[int, ...]:
    """Return strides: within a particle as of a contiguous tensor, from one particle to the next a whole vector."""
    steps, n = [], 1
    for length in reversed(shape):
        steps.append(stride if n == size and length > 1 and shape.numel() > size else n)
        n *= length
    return tuple(reversed(steps))
