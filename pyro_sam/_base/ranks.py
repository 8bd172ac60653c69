"""Several processes under ``torch.distributed``: sums and means over all ranks, and what one rank tells the others."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed


def is_on() -> bool:
    """Return whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    """Return the number of this process, 0 if it is the only one."""
    return distributed.get_rank() if is_on() else 0


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of all ranks' tensors; it may be ``tensor`` itself, overwritten."""
    if not is_on():
        return tensor
    distributed.all_reduce(tensor)  # not AVG, which gloo does not know
    return tensor.div_(distributed.get_world_size())


def average_gradients(params: Sequence[Tensor]) -> None:
    """Replace ``.grad`` of all parameters by its mean over ranks, in one message; all ranks give them in one order."""
    if not (is_on() and params):
        return
    gradients = [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
    flat = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    sizes = [gradient.numel() for gradient in gradients]
    for param, part in zip(params, flat.split(sizes), strict=True):
        param.grad = part.view_as(param).to(param)


def mean_number(value: float) -> float:
    """Return the mean of all ranks' numbers."""
    if not is_on():
        return value
    return float(mean_over_ranks(torch.tensor(value, dtype=torch.float64, device=number_device())))


def number_device() -> torch.device:
    """Return a device from which numbers can be sent; nccl sends from GPUs only."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


def broadcast(tensors: Mapping[str, Tensor]) -> None:
    """Overwrite tensors with the first rank's, in the order of their names."""
    for _, tensor in sorted(tensors.items()):
        distributed.broadcast(tensor.data, 0)


def gathered(value: Any) -> list[Any]:
    """Return every rank's value, in the order of the ranks."""
    if not is_on():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
