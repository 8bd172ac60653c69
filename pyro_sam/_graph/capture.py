"""A whole step as one graph of tensor operations: captured once, replayed without Pyro's Python.

The graph holds the parameters of model and guide, and all other tensors that the model sees, by reference, so what an
optimiser does to them in place is seen by the next replay. The data are its inputs. Passes that share random numbers
share them in the graph.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_sam._base.buffers import called_modules, kept_buffers
from pyro_sam._base.random_state import RandomState, Streams, rewound
from pyro_sam._flat.recorder import Silence
from pyro_sam._graph import lowering
from pyro_sam._graph.draws import CannotCapture, NoReading, Operations
from pyro_sam._graph.recurrent import with_recurrent_layers
from pyro_sam._step.call import Call
from pyro_sam._step.dependence import graph_of
from pyro_sam._step.memory import PreviousGradients

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """A captured step.

    Args:
        graph: Maps the inputs to the loss, whether the values passed torch's checks (each a row per replica, where
            there are some), and a gradient per target.
        targets: The tensors that get a gradient.
        leaves: All parameters that the step met, frozen ones included.
        statements: Those of ``pyro.param`` statements, by name.
        modules: The modules that ran.
        reads: Tensors that Python read a number from, with the number.
    """

    graph: Callable[..., Sequence[Tensor]]
    targets: list[Tensor]
    leaves: list[Tensor]
    statements: dict[str, Tensor]
    modules: list[nn.Module]
    reads: list[tuple[Tensor, Any]]


def capture(
    call: Call,
    first: Callable[[], None],
    step: Callable[..., tuple[Any, Tensor | None]],
    memory: Callable[[], PreviousGradients | None],
    inputs: Sequence[Tensor],
) -> Captured:
    """Capture a step.

    Args:
        call: Model, guide and arguments.
        first: Takes the step in the ordinary way. What it and the capture write to is put back: buffers, state and
            random streams.
        step: Maps the inputs to the loss with its graph, and whether the values pass torch's checks (None: not asked).
        memory: Tells, after ``first``, which averages a step writes to.
        inputs: Tensors that change from step to step.
    Raises:
        CannotCapture: If the step reads values of tensors, or a module replaces a buffer.
    """
    streams = Streams(own=call.streams.own)
    here, averages = RandomState.capture(streams), _averages(memory())
    with rewound(here, streams):
        with kept_buffers(call.modules), poutine.trace(param_only=True) as seen, called_modules() as modules:
            first()
        _refuse_other_streams(here, streams)
    sites: Any = seen.trace.nodes.items()
    statements = {name: site["value"].unconstrained() for name, site in sites}
    buffers = {module: dict(module._buffers) for module in (*modules, *call.modules)}
    operations, targets = Operations(), list[Tensor]()

    def taken(*tensors: Tensor) -> list[Tensor]:
        loss, holds = step(*tensors)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise CannotCapture("the loss depends on no parameter")
        targets[:] = _leaves(loss)
        gradients = torch.autograd.grad(loss.sum(), targets, allow_unused=True)
        used = [torch.zeros_like(p) if g is None else g for p, g in zip(targets, gradients, strict=True)]
        return [loss.detach(), torch.ones_like(loss, dtype=torch.bool) if holds is None else holds, *used]

    def whole(*tensors: Tensor) -> list[Tensor]:
        with NoReading(), operations:
            return taken(*tensors)

    # a graph writes to buffers behind the backs of their modules
    written = _Kept([b for known in buffers.values() for b in known.values() if b is not None])
    try:
        with rewound(here, streams), kept_buffers(call.modules), torch.enable_grad(), Silence():
            # tensors of their own, so that the model's are not taken for them
            graph = _traced(whole, [tensor.detach() for tensor in inputs])
            _refuse_replaced(buffers)
        with rewound(here, streams), torch.no_grad(), Silence():
            runnable = _that_runs(with_recurrent_layers(_lean(graph)), inputs)
        with rewound(here, streams), kept_buffers(call.modules), Silence():
            _say_if_it_does_not_pay(runnable, taken, inputs)
    finally:
        written.put_back()
        _put_back(memory(), averages)
    leaves = {id(leaf): leaf for leaf in (*targets, *statements.values())}
    for module in modules:
        leaves.update((id(leaf), leaf) for leaf in module.parameters(recurse=False))
    return Captured(runnable, targets, list(leaves.values()), statements, list(modules), operations.reads)


class _Kept:
    """Values of tensors, to put back what a capture writes to them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._before = [(tensor, tensor.clone()) for tensor in tensors]

    def put_back(self) -> None:
        """Put back all values."""
        for tensor, value in self._before:
            tensor.data.copy_(value)


def _averages(memory: PreviousGradients | None) -> list[tuple[Tensor, Tensor]]:
    return [] if memory is None else [(tensor, tensor.clone()) for tensor in memory.tensors()]


def _put_back(memory: PreviousGradients | None, before: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Put averages back; those that were made since are as they were made, of a loaded state, say."""
    if memory is None:
        return
    known = {id(tensor) for tensor, _ in before}
    if not all(id(tensor) in known for tensor in memory.tensors()):
        memory.begin_again()
    for tensor, value in before:
        tensor.copy_(value)


def _leaves(loss: Tensor) -> list[Tensor]:
    """Return the tensors where a loss's graph begins: everything that backward would give a gradient to."""
    ends = [getattr(node, "variable", None) for node in graph_of([loss])]
    return list({id(leaf): leaf for leaf in ends if leaf is not None}.values())


def _refuse_other_streams(before: RandomState, streams: Streams) -> None:
    moved = RandomState.capture(streams).moved(before)
    if moved.numpy or moved.python or moved.own:
        raise CannotCapture("it draws random numbers that are not of torch's default stream")


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


def _that_runs(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Return the graph compiled by torch; as it is where torch cannot compile it, for want of a compiler, say."""
    validate, began = Distribution._validate_args, time.perf_counter()
    try:
        compiled = lowering.compiled(graph, inputs)
        compiled(*inputs)
        log.info("compile=True: compiling a step took %.1f s.", time.perf_counter() - began)
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


def _say_if_it_does_not_pay(
    runnable: Callable[..., Any], usual_way: Callable[..., Any], inputs: Sequence[Tensor]
) -> None:
    with torch.enable_grad():
        usual = min(_seconds(usual_way, inputs) for _ in range(2))
    with torch.no_grad():
        captured = min(_seconds(runnable, inputs) for _ in range(3))
    if captured > _WORTH_IT * usual:
        log.info(
            "compile=True: a captured step takes %.2f of the time of an uncompiled one, so compiling hardly pays for "
            "this network.",
            captured / usual,
        )


_WORTH_IT = 0.9


def _seconds(function: Callable[..., Any], inputs: Sequence[Tensor]) -> float:
    began = time.perf_counter()
    function(*inputs)
    return time.perf_counter() - began
