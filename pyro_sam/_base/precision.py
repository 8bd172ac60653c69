"""Torch's automatic mixed precision, as it is set at present."""

from collections.abc import Hashable
from typing import Any

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu")


def autocast() -> tuple[Hashable, ...]:
    """Return the precision in which torch casts operations by itself, device by device; empty where it does not."""
    asked: Any = getattr(torch, "get_autocast_dtype", None)
    if asked is None:  # before torch 2.4
        found = [(torch.is_autocast_cpu_enabled(), torch.get_autocast_cpu_dtype())]
        found.append((torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()))
        return tuple(dtype for on, dtype in found if on)
    return tuple((device, asked(device)) for device in _DEVICES if _is_on(device))


def _is_on(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # a torch that has none for this device
        return False
