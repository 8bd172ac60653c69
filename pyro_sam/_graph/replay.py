"""Captured steps, and what each of them depends on."""

import logging
import math
import operator
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_sam._base.buffers import Buffers
from pyro_sam._base.precision import autocast
from pyro_sam._base.surroundings import PLAIN, Surroundings
from pyro_sam._flat.recorder import listeners
from pyro_sam._flat.vectors import state_parameters
from pyro_sam._graph.capture import Captured, capture
from pyro_sam._graph.draws import CannotCapture
from pyro_sam._step.call import Call
from pyro_sam._step.knowledge import Pair
from pyro_sam._step.own_laws import LawState, own_laws
from pyro_sam._step.settings import Settings

log = logging.getLogger(__name__)
_PAYS = 10  # replays of a capture
_WASTED = 16  # captures in a row that were replayed by the step alone that they were made for
_VARIANTS = 4  # captures of one form of the arguments, as of a network in training and not


@dataclass(frozen=True)
class Replayed:
    """What a replay gave: the loss (of replicas, a row each), its sum, and the gradient of each parameter."""

    loss: Tensor
    value: float
    parameters: list[Tensor]
    gradients: list[Tensor]

    def differentiable(self) -> Tensor:
        """Return the loss as a function of the parameters."""
        loss: Any = _GivenGradients.apply(self.loss, self.gradients, *self.parameters)
        return loss

    def accumulate(self) -> float:
        """Add the gradients to ``.grad`` of the parameters, and return the loss."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return self.value


class Variant:
    """A captured step with all that it depends on besides the form of its arguments.

    Args:
        captured: The step.
        call: The call that it was captured from.
        functions: Settings that are functions, and laws that may hold and read anything.
        state: Other tensors that it writes to.
    """

    def __init__(self, captured: Captured, call: Call, functions: Sequence[Any], state: Sequence[Tensor]) -> None:
        self._captured, self._state, self.uses = captured, list(state), 0
        self._shared: set[int] | None = None
        # of an autoguide the parameters are looked at anyway
        own = set(call.guide.modules()) if isinstance(call.guide, AutoGuide) else set()
        guide = [module for module in own if module._buffers] if own else [call.guide]
        modules = [module for module in captured.modules if module not in own]
        self._seen = Surroundings(call.model, *guide, *modules, *functions)
        self._forms = [_form(leaf) for leaf in captured.leaves]
        self._constraints = _constraints(captured.statements)
        self._shown: dict[str, Tensor] = {}
        for name, leaf in captured.statements.items():
            self._shown[name] = leaf.detach()
            self._shown[name].unconstrained = weakref.ref(leaf)  # type: ignore[attr-defined]
        found = {id(m): m for m in (*captured.modules, *self._seen.modules)}.values()
        self._networks: list[Any] = [module for module in found if hasattr(module, "is_as_met")]
        self._written = [b for module in found for b in module._buffers.values() if b is not None] + self._state

    def is_current(self, state: Sequence[Tensor], seen: Surroundings) -> bool:
        """Return whether all of it is as it was.

        Args:
            state: Other tensors that the step writes to now.
            seen: What model and guide can see now, just looked at.
        """
        if len(state) != len(self._state) or not all(map(operator.is_, state, self._state)):
            return False
        store: Any = pyro.get_param_store()
        if not pyro.settings.get("module_local_params"):
            statements = self._captured.statements
            if not all(store._params.get(name) is leaf for name, leaf in statements.items()):
                return False
            if _constraints(statements) != self._constraints:
                return False
        if [_form(leaf) for leaf in self._captured.leaves] != self._forms:
            return False
        if not all(network.is_as_met() for network in self._networks):
            return False
        return self._seen.is_same(seen) and all(tensor.item() == value for tensor, value in self._captured.reads)

    @property
    def has_large_array(self) -> bool:
        """Whether the step sees an array that is only looked at here and there."""
        return self._seen.has_large_array

    def has_hooks(self) -> bool:
        """Return whether somebody asked autograd to be called at a parameter."""
        leaves: Sequence[Any] = self._captured.targets
        return any(leaf._backward_hooks or leaf._post_accumulate_grad_hooks for leaf in leaves)

    def run(self, inputs: Sequence[Tensor]) -> Replayed | None:
        """Replay the step; None if its values are not finite or fail torch's checks, and buffers are then put back."""
        self.uses += 1
        before = [tensor.clone() for tensor in self._written]
        with torch.no_grad():
            loss, holds, *gradients = self._captured.graph(*inputs)
        # the step's one wait for the device
        value = float(torch.where(holds, loss, math.nan).sum())
        if not math.isfinite(value):
            for tensor, value_before in zip(self._written, before, strict=True):
                tensor.copy_(value_before)
            return None
        if poutine.runtime.am_i_wrapped():
            state_parameters(listeners(), self._shown)  # the statements by which SVI knows what to optimise
        return Replayed(loss, value, self._captured.targets, self._owned(gradients, inputs))

    def _owned(self, gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return gradients in memory that nothing else uses: they become parameters' ``.grad``."""
        if self._shared is None:  # of a graph always the same ones
            self._shared = _shared(gradients, [*inputs, *self._captured.leaves])
        return [g.clone(memory_format=_CONTIGUOUS) if i in self._shared else g for i, g in enumerate(gradients)]


@dataclass
class _Form:
    """What is known of one form of the arguments: its captures, the latest first, or that there can be none."""

    variants: list[Variant] = field(default_factory=list)
    refused: bool = False


def replayed(
    call: Call,
    pair: Pair,
    settings: Settings,
    asked: bool,
    first: Callable[[], None],
    step: Callable[[Tensor, Call], tuple[Any, Tensor | None]],
) -> Replayed | None:
    """Return a step as its capture gives it, captured first where it is a new one; None if it cannot be captured.

    Args:
        call: Model, guide and arguments.
        pair: What is known of them.
        settings: The estimator's settings.
        asked: Whether torch's checks of values are on.
        first: Takes an ordinary step; it raises where the values are wrong.
        step: Maps the KL's weight and a call to the loss, and whether the values pass torch's checks.
    """
    leaves, spec = tree_flatten((call.args, dict(call.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if _has_outer_graph(tensors, pair) or _is_restless(settings, pair):
        return None
    key = settings.graph_key(), asked, _environment(), _hashable(spec), tuple(map(_static, leaves)), _aliases(tensors)
    form = pair.graphs.get(key) or pair.graphs.put(key, _Form())
    if form.refused:
        return None
    variant = next((each for each in form.variants if each.is_current(_state(pair), pair.seen)), None)
    inputs = [torch.tensor(settings.kl_weight, dtype=torch.float64), *tensors]
    if variant is None:

        def fill(weight: Tensor, *given: Tensor) -> tuple[Any, Tensor | None]:
            filled = iter(given)
            args, kwargs = tree_unflatten([next(filled) if isinstance(x, Tensor) else x for x in leaves], spec)
            return step(weight, replace(call, args=args, kwargs=kwargs))

        law = LawState(settings.perturbation)
        try:
            _refuse(form, leaves, pair)
            captured = capture(call, first, fill, lambda: pair.memory, inputs)
            _refuse_restless(law, settings, pair)
            variant = Variant(captured, call, settings.functions(), _state(pair))
            _refuse_large_arrays(variant.has_large_array)
        except CannotCapture as reason:
            law.restore()
            why = str(reason).splitlines()[0]  # Pyro adds the sites to it
            if why != pair.uncaptured:
                log.warning("compile=True: the step is not compiled, because %s.", why)
            form.refused, pair.uncaptured = True, why
            return None
        form.variants = [variant, *form.variants[: _VARIANTS - 1]]
    return None if variant.has_hooks() else variant.run(inputs)


def _has_outer_graph(arguments: Sequence[Tensor], pair: Pair) -> bool:
    """Return whether no graph is wanted, or arguments or what the model sees have a graph of this step alone."""
    if not torch.is_grad_enabled() or any(tensor.requires_grad for tensor in arguments):
        return True
    return any(tensor.grad_fn is not None for tensor in pair.seen.tensors)


def _is_restless(settings: Settings, pair: Pair) -> bool:
    return any(own is known for own in own_laws(settings.perturbation) for known in pair.restless)


def _refuse_restless(law: LawState, settings: Settings, pair: Pair) -> None:
    if law.has_changed():
        pair.restless += own_laws(settings.perturbation)
        raise CannotCapture("its law changes what it holds")


def _state(pair: Pair) -> list[Tensor]:
    return [] if pair.memory is None else pair.memory.tensors()


def _refuse(form: _Form, leaves: Sequence[Any], pair: Pair) -> None:
    """Refuse what cannot be watched.

    Raises:
        CannotCapture: If there is such a thing.
    """
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *PLAIN)):
            raise CannotCapture(f"an argument is of type {type(leaf).__name__}, whose content may change unseen")
        if isinstance(leaf, Tensor) and (type(leaf) not in (Tensor, nn.Parameter) or leaf.layout != torch.strided):
            raise CannotCapture(f"an argument is a {type(leaf).__name__} of layout {leaf.layout}")
    _refuse_large_arrays(pair.seen.has_large_array)
    if len(form.variants) == _VARIANTS and all(variant.uses < _PAYS for variant in form.variants):
        raise CannotCapture("what the model sees besides its arguments, or a setting, changes every few steps")
    lately = pair.graphs.values()[-_WASTED - 1 : -1]
    if len(lately) == _WASTED and not any(variant.uses > 1 for each in lately for variant in each.variants):
        raise CannotCapture("none of its last captures was of use again: shapes or settings differ at every step")


def _refuse_large_arrays(are_seen: bool) -> None:
    if are_seen:
        raise CannotCapture("the step sees a large NumPy array, which may change unseen: make it a tensor")


def _environment() -> Hashable:
    """Return what torch's operations depend on."""
    return (
        autocast(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        _hooks_of_all_modules(),
        bool(pyro.settings.get("module_local_params")),
    )


def _hooks_of_all_modules() -> Hashable:
    hooks = (hook for known in _HOOKS for hook in getattr(nn.modules.module, known, {}).values())
    return tuple(hook for hook in hooks if getattr(hook, "__module__", "") != Buffers.__module__)


_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip


def _hashable(spec: Any) -> Hashable:
    try:
        hash(spec)
    except TypeError:  # of a torch older than 2.13
        return repr(spec)
    return spec


def _static(leaf: Any) -> Hashable:
    # 1, 1.0 and True are equal, and NaN is not
    return _form(leaf) if isinstance(leaf, Tensor) else (type(leaf), repr(leaf))


def _form(tensor: Tensor) -> Hashable:
    strides = tensor.stride() if tensor.layout == torch.strided else None
    return tensor.shape, strides, tensor.dtype, tensor.device, tensor.requires_grad


def _aliases(tensors: Sequence[Tensor]) -> Hashable:
    """Return which tensors are one."""
    return tuple(next(i for i, other in enumerate(tensors) if other is tensor) for tensor in tensors)


def _constraints(statements: Mapping[str, Tensor]) -> list[Any]:
    store: Any = pyro.get_param_store()
    return [store._constraints.get(name) for name in statements]


_CONTIGUOUS = torch.contiguous_format


def _shared(gradients: Sequence[Tensor], others: Sequence[Tensor]) -> set[int]:
    """Return the places of gradients that are not contiguous, or in memory that something else uses."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in others}
    used: dict[int, list[tuple[int, int]]] = {}
    found = set()
    for i, gradient in enumerate(gradients):
        place, start = gradient.untyped_storage().data_ptr(), int(gradient.storage_offset())
        stop, known = start + int(gradient.numel()), used.setdefault(place, [])
        shared = place in taken or any(start < end and begin < stop for begin, end in known)
        if shared or not gradient.is_contiguous():
            found.add(i)
        else:
            known.append((start, stop))
    return found


class _GivenGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "a captured step has no second derivatives; take the loss with compile=False where you need "
                "create_graph=True."
            )
        outer = outer if outer.dim() == 0 else outer[0]  # of replicas, the sum's: all the same
        return (None, None, *(outer * gradient for gradient in ctx.gradients))
