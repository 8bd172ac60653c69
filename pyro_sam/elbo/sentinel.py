"""The sentinel: now and then a fast step is also taken the ordinary way, and the two must give the same."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.precision import autocast
from pyro_sam._base.random_state import RandomState, Streams
from pyro_sam._base.surroundings import Surroundings
from pyro_sam._step.call import Call
from pyro_sam._step.dependence import graph_of
from pyro_sam._step.knowledge import Pair
from pyro_sam._step.own_laws import LawState
from pyro_sam.perturbation import Perturbation

T = TypeVar("T")


def is_due(count: int, *, replicas: bool = False) -> bool:
    """Return whether a pair's fast step of this number, from 1, is looked at: the 2nd, 4th, 8th, ..., each 1000th.

    Of replicas, of which each takes an ordinary step of its own: the 2nd, the 1000th, and each 10 000th.
    """
    if replicas:
        return count in (2, 1000) or (count > 0 and count % 10_000 == 0)
    return count > 1 and (count % 1000 == 0 if count >= 1000 else count & (count - 1) == 0)


@dataclass(frozen=True)
class _Taken(Generic[T]):
    """What a step gave: the loss as the caller wants it, its value, and a gradient per leaf."""

    loss: T
    value: float
    gradients: list[Tensor | None]


Look = Callable[[], tuple[Any, float]]  # takes the ordinary step; returns the loss with its graph, and its value


def watched(
    pair: Pair, call: Call, law: Perturbation, fast: Callable[[], float], look: Look, ordinary: Callable[[], float]
) -> float:
    """Take a fast step, and check it by an ordinary one that leaves no trace.

    Where the two differ by more than rounding, the ordinary numbers are used, and the pair takes no more fast steps.

    Args:
        pair: What is known of model and guide.
        call: The step's model, guide and arguments.
        law: The law of the noise.
        fast: Takes the fast step, adds gradients to ``.grad`` and returns the loss.
        look: Takes the ordinary step, and adds no gradients.
        ordinary: Takes the ordinary step as ``fast`` does.
    """

    def read(leaves: Sequence[Tensor]) -> _Taken[float]:
        before = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        try:
            loss = fast()
            return _Taken(loss, loss, [leaf.grad for leaf in leaves])
        finally:
            for leaf, gradient in zip(leaves, before, strict=True):
                leaf.grad = gradient

    def keep(leaves: Sequence[Tensor], taken: _Taken[float]) -> None:
        for leaf, gradient in zip(leaves, taken.gradients, strict=True):
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)

    return _watched(pair, call, law, fast, read, keep, look, ordinary)


def watched_loss(
    pair: Pair, call: Call, law: Perturbation, fast: Callable[[], Any], look: Look, ordinary: Callable[[], Any]
) -> Any:
    """Do the same for functions that return the loss with its graph."""

    def read(leaves: Sequence[Tensor]) -> _Taken[Any]:
        loss = fast()
        return _Taken(loss, float(loss.detach()), _gradients(loss, leaves))

    return _watched(pair, call, law, fast, read, lambda *_: None, look, ordinary)


class _Start:
    """What a step begins with, to begin again.

    Args:
        pair: What is known of model and guide.
        call: The step's model, guide and arguments.
        law: The law of the noise.
    """

    def __init__(self, pair: Pair, call: Call, law: Perturbation) -> None:
        self._pair, self._call = pair, call
        self._all = Streams(own=call.streams.own)
        self._streams, self._memory = RandomState.capture(self._all), [each.clone() for each in _memory(pair)]
        self._law, self.seen = LawState(law), Surroundings(call.model, call.guide)

    def again(self) -> None:
        """Go back to it."""
        self._streams.restore()
        self._law.restore()
        if self._pair.memory is not None and not self._memory:
            self._pair.memory.begin_again()
        for tensor, value in zip(_memory(self._pair), self._memory, strict=False):
            tensor.copy_(value)

    def look(self, look: Look, leaves: list[Tensor]) -> _Taken[RandomState]:
        """Take the ordinary step without a trace; return it, and where the random streams then were.

        Args:
            look: Takes it.
            leaves: The leaves whose gradients are wanted; filled if it is empty.
        """
        with _silent(), kept_buffers(self._call.modules):
            loss, value = look()
            leaves += [] if leaves else _all_leaves(_leaves(self._pair, self._call), loss)
            gradients = _gradients(loss, leaves)
        end = RandomState.capture(self._all)
        self.again()
        return _Taken(end, value, gradients)


def _watched(
    pair: Pair,
    call: Call,
    law: Perturbation,
    fast: Callable[[], T],
    read: Callable[[Sequence[Tensor]], "_Taken[T]"],
    keep: Callable[[Sequence[Tensor], "_Taken[T]"], None],
    look: Look,
    ordinary: Callable[[], T],
) -> T:
    if any(getattr(leaf, "_post_accumulate_grad_hooks", None) for leaf in _leaves(pair, call)):
        return fast()  # what such a hook makes of a gradient, or does with it, happens once
    leaves: list[Tensor] = []
    start = _Start(pair, call, law)
    right = start.look(look, leaves)
    if not start.seen.is_same():  # say, a model that counts its runs: does its number matter?
        again = start.look(look, leaves)
        start.seen.restore()
        if what := _difference(again, right, leaves):
            _give_up(pair, f"a second run of the same step changes it: {what}")
            return ordinary()
    with kept_buffers(call.modules, on_error_only=True) as buffers:
        taken = read(leaves)
        # a model that has come to draw, mapped over replicas, does it in another order
        what = "" if pair.draws else _difference(taken, right, leaves) or _stream_since(right.loss)
        if not what:
            keep(leaves, taken)
            return taken.loss
        buffers.restore()
    _give_up(pair, what, _CHANGES if math.isfinite(right.value) else _DIVERGES)
    start.again()
    return ordinary()


def _all_leaves(known: Sequence[Tensor], loss: Any) -> list[Tensor]:
    """Return some leaves, and those of the loss's graph, such as a tensor that the model's Python holds."""
    found = graph_of([loss]) if isinstance(loss, Tensor) else ()
    ends = [getattr(node, "variable", None) for node in found]
    return list({id(leaf): leaf for leaf in (*known, *ends) if leaf is not None}.values())


def _gradients(loss: Any, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    if not (isinstance(loss, Tensor) and loss.requires_grad and leaves):
        return [None] * len(leaves)
    # retained: a part of the graph may be the caller's own
    return list(torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True))


def _leaves(pair: Pair, call: Call) -> list[Tensor]:
    """Return every tensor that a step may give a gradient to."""
    found: list[Tensor] = [leaf for _, leaf in pyro.get_param_store().named_parameters()]
    for module in (*pair.surroundings(call).modules, call.model, call.guide):
        if isinstance(module, nn.Module):
            found += module.parameters()
    found += [leaf for leaf in tree_leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Tensor)]
    return list({id(leaf): leaf for leaf in found if leaf.requires_grad and leaf.is_leaf}.values())


def _memory(pair: Pair) -> list[Tensor]:
    return [] if pair.memory is None else pair.memory.tensors()


@contextmanager
def _silent() -> Iterator[None]:
    """Let no handler around the step, such as SVI's trace of parameters, hear of what is done twice."""
    with warnings.catch_warnings(), poutine.block():
        warnings.simplefilter("ignore")
        yield


def _difference(taken: _Taken[Any], right: _Taken[Any], leaves: Sequence[Tensor]) -> str:
    """Return what differs by more than rounding, in words; empty if nothing does."""
    tol = _tolerance(leaves)
    if not math.isclose(taken.value, right.value, rel_tol=tol, abs_tol=tol):
        both_wrong = not (math.isfinite(taken.value) or math.isfinite(right.value))
        return "" if both_wrong else f"the loss is {taken.value:.8g}, and {right.value:.8g} the ordinary way"
    whole = math.hypot(*[_norm(g) for g in right.gradients])
    names = {id(leaf): name for name, leaf in pyro.get_param_store().named_parameters()}
    for leaf, a, b in zip(leaves, taken.gradients, right.gradients, strict=True):
        off = _norm(b) if a is None else _norm(a) if b is None else _norm(a - b)
        if math.isfinite(whole) and off > 10 * tol * _norm(b) + tol * whole:
            name = names.get(id(leaf), "a module's parameter or an argument")
            return f"the gradient of '{name}' differs by {off:.3g}, its norm being {_norm(b):.3g}"
    return ""


def _stream_since(end: RandomState) -> str:
    """Return in words whether torch's random stream is elsewhere than at ``end``."""
    here = RandomState.capture().fingerprint()
    return "" if end.fingerprint() == here else "torch's random stream ends elsewhere"


def _tolerance(leaves: Sequence[Tensor]) -> float:
    if autocast():
        return 1e-1
    widths = {leaf.dtype: torch.finfo(leaf.dtype).eps for leaf in leaves if leaf.is_floating_point()}
    return float(max(widths.values(), default=1e-16)) ** 0.5  # 1e-8 in double, 3e-4 in single precision


def _norm(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.detach().double().norm())


_CHANGES = (
    "The model most likely reads something that changes between its runs, such as a counter, a file or a random stream "
    "of its own: give such values as arguments. SAM_ELBO(fast=False) takes ordinary steps from the start."
)
_DIVERGES = (
    "The training most likely diverges, with scales or weights too small or large for their precision: lower the "
    "learning rate, and start anew."
)


def _give_up(pair: Pair, what: str, cause: str = _CHANGES) -> None:
    pair.slow = what
    warnings.warn(
        f"A shortened step gave other numbers than the ordinary one ({what}), so only ordinary steps are taken from "
        f"now on for this model and guide, and their numbers are used. {cause}",
        UserWarning,
        stacklevel=4,
    )
