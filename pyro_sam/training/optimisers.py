"""What a training loop asks of Pyro's optimisers and of JointOptim alike."""

import math
from typing import Any

from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_sam.optim import JointOptim


def load_optim(optim: PyroOptim, params: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Let an optimiser know its parameters, and load its state; the epoch may close before the next step."""
    for param in params.values():
        param.grad = None  # a step without gradients moves nothing, but makes what holds the states
    if isinstance(optim, JointOptim):
        optim.name_parameters(params.items())
        optim(set(params.values()), lambda: 0.0)
        optim.set_state(state)
        return
    optim(list(params.values()))
    for name, param in params.items():
        own, kept = optim.optim_objs[param], state[name]
        if hasattr(own, "optimizer"):
            own.load_state_dict(kept["scheduler"])
            own, kept = own.optimizer, kept["optimizer"]
        own.load_state_dict(kept)


def learning_rate(optim: Any) -> float:
    """Return the present learning rate of the first group; NaN for an optimiser that has none."""
    first = next(iter(optim.optim_objs.values()))
    return float(getattr(first, "optimizer", first).param_groups[0].get("lr", math.nan))


def close_epoch(optim: Any, loss: float) -> None:
    """Step the scheduler that waits for the end of an epoch, if there is one."""
    joint = isinstance(optim, JointOptim)
    if not (isinstance(optim, PyroLRScheduler) or (joint and optim.scheduler_interval == "epoch")):
        return
    scheduler = optim.scheduler if joint else next(iter(optim.optim_objs.values()))
    optim.step(*[loss] if isinstance(scheduler, ReduceLROnPlateau) else [])
