"""A whole step as one graph of tensor operations: captured once, replayed without Pyro's Python.

The graph holds the parameters of model and guide by reference, so what an optimiser does to them in place is seen by
the next replay. The data are its inputs. Passes that share random numbers share them in the graph.
"""

import logging
import math
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_sam._base.buffers import called_modules, kept_buffers
from pyro_sam._base.random_state import RandomState, rewound
from pyro_sam._flat.recorder import Silence
from pyro_sam._graph.recurrent import with_recurrent_layers

log = logging.getLogger(__name__)


class CannotCapture(RuntimeError):
    """A step that is no fixed graph of tensor operations; the message says why."""


class SharedDraws(TorchDispatchMode):
    """Gives a draw from a random state that was met before the tensor that was drawn then.

    A step rewinds the random stream for its second pass. In a graph there is no such rewinding: the second pass must
    use the first one's tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn: dict[Hashable, tuple[list[Tensor], RandomState]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        key = func, RandomState.capture().fingerprint()
        if key not in self._drawn:
            result = func(*args, **kwargs)
            results = list(result) if isinstance(result, tuple) else [result]
            # copies: the step may go on to change what it drew
            self._drawn[key] = [each.clone() for each in results], RandomState.capture()
            return result
        drawn, after = self._drawn[key]
        after.restore()
        if func._schema.is_mutable:
            return args[0].copy_(drawn[0])
        copies = [each.clone() for each in drawn]
        return tuple(copies) if len(copies) > 1 else copies[0]


@dataclass
class CapturedStep:
    """A captured step.

    Args:
        graph: Maps the inputs to the loss, whether the values passed torch's checks, and a gradient per parameter.
        parameters: The parameters that get a gradient, by the name of their ``pyro.param`` statement.
        modes: The modules that ran, with their training mode then.
        state: Other tensors that the step writes to.
    """

    graph: Callable[..., Sequence[Tensor]]
    parameters: dict[str, Tensor]
    modes: list[tuple[nn.Module, bool]]
    state: list[Tensor]

    def __post_init__(self) -> None:
        """Note what the parameters look like, how they show in a ``pyro.param`` statement, and the buffers."""
        self._forms = {name: _form(leaf) for name, leaf in self.parameters.items()}
        self._shown = {name: leaf.detach() for name, leaf in self.parameters.items()}
        for name, leaf in self.parameters.items():
            self._shown[name].unconstrained = weakref.ref(leaf)  # type: ignore[attr-defined]
        buffers = [b for module, _ in self.modes for b in module._buffers.values() if b is not None]
        self._written = [*buffers, *self.state]

    def is_current(self, state: Sequence[Tensor]) -> bool:
        """Return whether parameters, modules and state are those of the capture."""
        if [id(tensor) for tensor in state] != [id(tensor) for tensor in self.state]:
            return False
        store: Any = pyro.get_param_store()
        local = pyro.settings.get("module_local_params")
        return all(module.training == training for module, training in self.modes) and all(
            _form(leaf) == self._forms[name] and (local or store._params.get(name) is leaf)
            for name, leaf in self.parameters.items()
        )

    def run(self, inputs: Sequence[Tensor]) -> "Replayed | None":
        """Replay the step; None if its values are not finite or fail torch's checks, and buffers are then put back."""
        before = [tensor.clone() for tensor in self._written]
        with torch.no_grad():
            loss, holds, *gradients = self.graph(*inputs)
        # the step's one wait for the device
        value, all_hold = torch.stack([loss, holds.to(loss)]).tolist()
        if not (all_hold and math.isfinite(value)):
            for tensor, value_before in zip(self._written, before, strict=True):
                tensor.copy_(value_before)
            return None
        if poutine.runtime.am_i_wrapped():
            # the statements by which SVI knows what to optimise
            for name, shown in self._shown.items():
                effectful(lambda *_, shown=shown, **__: shown, type="param")(name, event_dim=None, name=name)
        return Replayed(loss, value, list(self.parameters.values()), gradients)


@dataclass(frozen=True)
class Replayed:
    """What a replay gave: the loss, and the gradient of each parameter."""

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


class Replays:
    """The captured steps of one estimator, one for each model, guide, setting and shape of the data."""

    LIMIT = 64

    def __init__(self) -> None:
        self._steps: dict[Hashable, tuple[Any, CapturedStep | None]] = {}

    def run(
        self,
        settings: Hashable,
        pair: tuple[Any, Any],
        first: Callable[..., None],
        step: Callable[..., tuple[Any, Tensor | None]],
        state: Callable[[], list[Tensor]],
        weight: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Replayed | None:
        """Replay a step, captured first where it is a new one.

        Args:
            settings: What else the graph depends on.
            pair: Model and guide.
            first: Takes an ordinary step with the data; it raises where the values are wrong.
            step: Maps ``weight`` and the data to the loss, and whether the values pass torch's checks.
            state: Tells which tensors a step writes to, besides buffers.
            weight: An input of the graph.
            args: Data.
            kwargs: Data.
        """
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = settings, id(pair[0]), id(pair[1]), spec, tuple(map(_static, leaves))
        _, known = self._steps.get(key, (None, None))
        if key not in self._steps or (known is not None and not known.is_current(state())):

            def fill(*inputs: Tensor) -> tuple[Any, Tensor | None]:
                given = iter(inputs[1:])
                filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                args, kwargs = tree_unflatten(filled, spec)
                return step(inputs[0], *args, **kwargs)

            try:
                known = capture(lambda: first(*args, **kwargs), fill, state, [weight, *tensors])
            except CannotCapture as reason:
                log.warning("compile=True: the step is not compiled, because %s.", reason)
                known = None
            if len(self._steps) >= self.LIMIT:
                del self._steps[next(iter(self._steps))]
            self._steps[key] = pair, known  # keeps the pair alive, so that its ids stay its own
        return None if known is None else known.run([weight, *tensors])


def _static(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return _form(leaf)
    return leaf if isinstance(leaf, Hashable) else id(leaf)


def _form(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.device


def capture(
    first: Callable[[], None],
    step: Callable[..., tuple[Any, Tensor | None]],
    state: Callable[[], list[Tensor]],
    inputs: Sequence[Tensor],
) -> CapturedStep:
    """Capture a step.

    Args:
        first: Takes the step in the ordinary way. What it and the capture write to is put back: buffers, state and
            random streams.
        step: Maps the inputs to the loss with its graph, and whether the values pass torch's checks (None: not asked).
        state: Tells, after ``first``, which tensors a step writes to besides buffers.
        inputs: Tensors that change from step to step.
    Raises:
        CannotCapture: If the step reads values of tensors, or a module replaces a buffer.
    """
    here = RandomState.capture()
    with rewound(here), kept_buffers(), poutine.trace(param_only=True) as statements, called_modules() as modules:
        first()
    leaves: dict[str, Any] = {n: site["value"].unconstrained() for n, site in statements.trace.nodes.items()}  # type: ignore[union-attr]
    parameters = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    buffers = {module: dict(module._buffers) for module in modules}
    if any(tensor.requires_grad for tensor in inputs):
        raise CannotCapture("a tensor among its arguments requires grad")

    def whole(*tensors: Tensor) -> list[Tensor]:
        with SharedDraws():
            loss, holds = step(*tensors)
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise CannotCapture("the loss depends on no parameter")
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        used = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), gradients, strict=True)]
        return [loss.detach(), torch.ones_like(loss, dtype=torch.bool) if holds is None else holds, *used]

    # a graph writes to buffers behind the backs of their modules
    written = [*state(), *(b for known in buffers.values() for b in known.values() if b is not None)]
    before = [tensor.clone() for tensor in written]
    try:
        with rewound(here), kept_buffers(), torch.enable_grad(), Silence():
            graph = _traced(whole, inputs)
            _refuse_replaced(buffers)
        with rewound(here), torch.no_grad(), Silence():
            runnable = _that_runs(with_recurrent_layers(_lean(graph)), inputs)
    finally:
        for tensor, value in zip(written, before, strict=True):
            tensor.data.copy_(value)
    return CapturedStep(runnable, parameters, [(m, m.training) for m in modules], state())


def _refuse_replaced(buffers: Mapping[nn.Module, Mapping[str, Tensor | None]]) -> None:
    for module, known in buffers.items():
        for name, buffer in known.items():
            if module._buffers[name] is not buffer:
                raise CannotCapture(f"{type(module).__name__} replaces its buffer '{name}' at every run")


def _traced(whole: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> GraphModule:
    try:
        return make_fx(whole)(*inputs)
    except RuntimeError as error:
        if isinstance(error, CannotCapture) or "tracing tensor" not in str(error):
            raise
        raise CannotCapture("its structure depends on the values of tensors") from error


def _lean(graph: GraphModule) -> GraphModule:
    """Drop what a replay without autograd does not need."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _compiled(graph: GraphModule) -> Callable[..., Sequence[Tensor]]:
    # torch's own random numbers, so that a seed means the same as without compilation; where there are several threads
    # and draws of several kinds (dropout), its compiler may take them in another order all the same. Convolutions stay
    # in the layout of the network: another one slows down small ones.
    options: Any = {"fallback_random": True, "layout_optimization": False}
    compiled: Any = torch.compile(graph, fullgraph=True, dynamic=False, options=options)
    return compiled


def _that_runs(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Return the graph compiled by torch; as it is where torch cannot compile it, for want of a compiler, say."""
    validate = Distribution._validate_args
    try:
        compiled = _compiled(graph)
        compiled(*inputs)
        return compiled
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        log.warning("torch.compile failed (%s); the captured step is replayed operation by operation.", reason)
    finally:
        Distribution.set_default_validate_args(validate)  # torch.compile switches it off, for everybody
    try:
        graph(*inputs)
    except Exception as error:
        raise CannotCapture("an operation in it cannot be replayed") from error
    return graph


class _GivenGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(outer * gradient for gradient in ctx.gradients))
