"""Replicas: which tensors have one row for each, and which arguments each has its own of."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class PerReplica:
    """An argument of ``svi.step`` of which each replica gets its own row, such as its own minibatch.

    Made by :func:`pyro_sam.per_replica`.

    Args:
        values: Tensor of shape ``(R, ...)``; replica ``r`` sees ``values[r]``.
    """

    values: Tensor

    def __len__(self) -> int:
        """Return the number of replicas."""
        return len(self.values)

    def to(self, *args: Any, **kwargs: Any) -> "PerReplica":
        """Return the same elsewhere, as :meth:`torch.Tensor.to`."""
        return PerReplica(self.values.to(*args, **kwargs))


def per_replica(values: Tensor) -> PerReplica:
    """Mark an argument of a model as one of which each replica of the guide gets its own row.

    Folds and bootstraps: ``svi.step(ps.per_replica(xs), ps.per_replica(ys))``.

    Args:
        values: Shape ``(R, ...)``; replica ``r`` sees ``values[r]``.
    Raises:
        ValueError: If it is no tensor with a first dimension.
    """
    if not isinstance(values, Tensor) or not values.dim():
        raise ValueError(f"values must be a tensor whose first dimension runs over the replicas, got {values!r}.")
    return PerReplica(values)


def has_own(arguments: Any) -> bool:
    """Return whether a replica gets something of its own among some arguments."""
    return any(isinstance(leaf, PerReplica) for leaf in tree_leaves(arguments))


def of_replica(arguments: Any, r: int) -> Any:
    """Return the arguments that replica ``r`` gets."""
    return tree_map(lambda leaf: leaf.values[r] if isinstance(leaf, PerReplica) else leaf, arguments)


def check_own(arguments: Any, number: int | None) -> None:
    """Check that arguments of which each replica gets its own row have as many as there are replicas.

    Args:
        arguments: Positional and keyword arguments.
        number: Number of replicas; None for a single guide.
    Raises:
        ValueError: If they do not.
    """
    args, kwargs = arguments
    if not kwargs and all(type(arg) is Tensor for arg in args):
        return
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, PerReplica) and len(leaf) != number:
            what = "has no replicas" if number is None else f"has {number} replicas"
            raise ValueError(f"an argument has rows for {len(leaf)} replicas (per_replica), and the guide {what}.")


def replicas_of(guide: Any) -> int | None:
    """Return how many replicas a guide has; None for a single guide."""
    number: int | None = getattr(poutine.unwrap(guide), "num_replicas", None)
    return number


def speaking(guide: Any, r: int | None) -> AbstractContextManager[None]:
    """Let a guide with replicas be one of them in the body; a single guide is itself."""
    number = replicas_of(guide)
    return nullcontext() if number is None else poutine.unwrap(guide).as_replica(r)  # type: ignore[attr-defined]


def mark(parameter: Tensor, number: int) -> None:
    """Note that the first dimension of a parameter runs over replicas."""
    parameter._num_replicas = number  # type: ignore[attr-defined]


def number_in(parameter: Tensor) -> int | None:
    """Return how many replicas a parameter has a row for; None for a parameter of a single guide."""
    found: int | None = getattr(parameter, "_num_replicas", None)
    return found


def norms(tensors: list[Tensor], number: int) -> Tensor:
    """Return the norm over several tensors of each replica's rows, shape ``(R,)``."""
    rows = [torch.linalg.vector_norm(tensor.reshape(number, -1), dim=-1) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(rows), dim=0)


def check_statistics(modules: Iterable[Any]) -> None:
    """Check that no module keeps statistics of what runs through it.

    Raises:
        ValueError: If one does.
    """
    for module in modules:
        if module.training and getattr(module, "running_mean", None) is not None:
            raise ValueError(
                f"{type(module).__name__} cannot keep running statistics of several replicas. Put it in eval mode, "
                "build it with track_running_stats=False, use GroupNorm, or train without num_replicas."
            )


def check_parameters(names: Sequence[str]) -> None:
    """Check that a model has no parameters of its own.

    Raises:
        ValueError: If it has.
    """
    if names:
        raise ValueError(
            f"the model has parameters of its own ({', '.join(names)}), which all replicas would share; give them a "
            "prior, or train without num_replicas."
        )


def sum_of(loss: Any) -> Any:
    """Return the sum over replicas."""
    return loss.sum() if isinstance(loss, Tensor) and loss.dim() else loss


def sum_of_good(loss: Any) -> Any:
    """Return the sum over the replicas whose loss is finite, if there is one."""
    if not (isinstance(loss, Tensor) and loss.dim()):
        return loss
    good = loss.isfinite()
    return loss.where(good, 0).sum() if bool(good.any()) else loss.sum()
