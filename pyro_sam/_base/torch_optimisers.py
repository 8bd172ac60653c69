"""Torch's optimisers and schedulers: made from what users give, with errors that say what is wrong; kept on errors."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer


def construct(constructor: Callable[..., Optimizer], params: Sequence[Tensor], args: dict[str, Any]) -> Optimizer:
    """Return an optimiser of ``params``.

    Raises:
        ValueError: If it does not take ``args``.
    """
    try:
        return constructor(params, **args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optim_args={args!r} do not fit {title(constructor)}: {error}") from error


def needs_closure(constructor: Callable[..., Optimizer]) -> bool:
    """Return whether a step of the optimiser evaluates the loss by itself, as LBFGS does."""
    step = getattr(getattr(constructor, "func", constructor), "step", None)
    closure = inspect.signature(step).parameters.get("closure") if step is not None else None
    return closure is not None and closure.default is inspect.Parameter.empty


def can_fuse(constructor: Callable[..., Optimizer], args: dict[str, Any], param: Tensor) -> bool:
    """Return whether the optimiser has a fused kernel for such a parameter."""
    if "fused" not in inspect.signature(constructor).parameters:
        return False
    trial = torch.zeros(1, dtype=param.dtype, device=param.device, requires_grad=True)
    trial.grad = torch.zeros_like(trial)
    try:
        constructor([trial], **args, fused=True).step()
    except RuntimeError:  # no such kernel for this device or dtype; some versions of torch say so at a step only
        return False
    return True


# their steps are no product of the learning rate and something that does not know it
_NOT_PROPORTIONAL = (torch.optim.Rprop, torch.optim.ASGD, torch.optim.LBFGS)


def check_proportional(constructor: Any) -> None:
    """Raise ValueError if an optimiser's steps are not in proportion to its learning rate."""
    if isinstance(constructor, type) and issubclass(constructor, _NOT_PROPORTIONAL):
        raise ValueError(
            f"lr has one learning rate for each replica, and the steps of {title(constructor)} are not in "
            "proportion to it; give one number, or take an optimiser such as Adam or SGD."
        )


def check_replicas(constructor: Any, number: int | None, rates: Sequence[float] | None, *, needs_closure: bool) -> None:
    """Raise ValueError if an optimiser cannot move a parameter with rows for so many replicas, each by itself."""
    name = title(constructor)
    if number is not None and (needs_closure or name in ("Adafactor", "Muon", "Shampoo", "LBFGS")):
        raise ValueError(
            f"{name} does not work element by element, so that replicas would touch each other; use an optimiser such "
            "as Adam or SGD, or train without num_replicas."
        )
    if rates is not None and number != len(rates):
        what = "a guide without replicas" if number is None else f"a guide with {number} replicas"
        raise ValueError(f"lr has {len(rates)} learning rates, one for each replica, got {what}.")


@contextmanager
def unchanged_on_error(optimizer: Any) -> Iterator[None]:
    """Put a torch optimiser's parameters and state back to what they were, without gradients, if the body raises."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    values = [param.detach().clone() for param in params]
    states = {param: copy.deepcopy(state) for param, state in optimizer.state.items()}
    try:
        yield
    except BaseException:
        for param, value in zip(params, values, strict=True):
            param.data.copy_(value)
            param.grad = None
        optimizer.state.clear()
        optimizer.state.update(states)
        raise


def title(constructor: Any) -> str:
    """Return the name of a class or function for an error."""
    return getattr(constructor, "__name__", repr(constructor))


def check_constructor(constructor: Any) -> None:
    """Raise ValueError unless it can make torch optimisers."""
    is_class = isinstance(constructor, type) and issubclass(constructor, Optimizer)
    of_pyro = isinstance(constructor, PyroOptim) or getattr(constructor, "__module__", "").startswith("pyro.optim")
    if not is_class and (of_pyro or isinstance(constructor, Optimizer) or not callable(constructor)):
        raise ValueError(
            "optim_constructor must be a class of torch optimisers such as torch.optim.Adam, got "
            f"{'one of Pyro, which holds an optimiser per parameter: ' if of_pyro else ''}{constructor!r}."
        )


def check_scheduler(scheduler: Any, interval: str) -> None:
    """Raise ValueError unless it can make schedulers, and the interval is known."""
    if interval not in ("epoch", "step"):
        raise ValueError(f"scheduler_interval must be 'epoch' or 'step', got scheduler_interval={interval!r}.")
    if scheduler is not None and (not callable(scheduler) or hasattr(scheduler, "optimizer")):
        raise ValueError(
            "scheduler must be a callable from the torch optimiser to a scheduler, such as lambda optimizer: "
            f"torch.optim.lr_scheduler.StepLR(optimizer, step_size=10), got scheduler={scheduler!r}."
        )


def make_scheduler(constructor: Callable[..., Any], optimizer: Any) -> Any:
    """Return a scheduler of the optimiser.

    Raises:
        ValueError: If more is needed to make one.
    """
    try:
        return constructor(optimizer)
    except TypeError as error:
        raise ValueError(
            f"scheduler={title(constructor)} cannot be made from the optimiser alone: {error}. Wrap it, as in "
            "lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)."
        ) from error
