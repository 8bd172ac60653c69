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
from pyro_sam._graph.draws import CannotCapture, NoReading, Operations
from pyro_sam._graph.recurrent import with_recurrent_layers
from pyro_sam._step.call import Call

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """A captured step.

    Args:
        graph: Maps the inputs to the loss, whether the values passed torch's checks, and a gradient per target.
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
    state: Callable[[], list[Tensor]],
    inputs: Sequence[Tensor],
) -> Captured:
    """Capture a step.

    Args:
        call: Model, guide and arguments.
        first: Takes the step in the ordinary way. What it and the capture write to is put back: buffers, state and
            random streams.
        step: Maps the inputs to the loss with its graph, and whether the values pass torch's checks (None: not asked).
        state: Tells, after ``first``, which tensors a step writes to besides buffers.
        inputs: Tensors that change from step to step.
    Raises:
        CannotCapture: If the step reads values of tensors, or a module replaces a buffer.
    """
    streams = Streams(own=call.streams.own)
    here = RandomState.capture(streams)
    memory = [(tensor, tensor.clone()) for tensor in state()]
    with rewound(here, streams):
        with kept_buffers(call.modules), poutine.trace(param_only=True) as seen, called_modules() as modules:
            first()
        _refuse_other_streams(here, streams)
    sites: Any = seen.trace.nodes.items()
    statements = {name: site["value"].unconstrained() for name, site in sites}
    buffers = {module: dict(module._buffers) for module in (*modules, *call.modules)}
    operations, targets = Operations(), list[Tensor]()

    def whole(*tensors: Tensor) -> list[Tensor]:
        with NoReading(), operations:
            loss, holds = step(*tensors)
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise CannotCapture("the loss depends on no parameter")
            targets[:] = _leaves(loss)
            gradients = torch.autograd.grad(loss, targets, allow_unused=True)
        used = [torch.zeros_like(p) if g is None else g for p, g in zip(targets, gradients, strict=True)]
        return [loss.detach(), torch.ones_like(loss, dtype=torch.bool) if holds is None else holds, *used]

    # a graph writes to buffers behind the backs of their modules
    written = [*state(), *(b for known in buffers.values() for b in known.values() if b is not None)]
    before = [tensor.clone() for tensor in written]
    try:
        with rewound(here, streams), kept_buffers(call.modules), torch.enable_grad(), Silence():
            # tensors of their own, so that the model's are not taken for them
            graph = _traced(whole, [tensor.detach() for tensor in inputs])
            _refuse_replaced(buffers)
        with rewound(here, streams), torch.no_grad(), Silence():
            runnable = _that_runs(with_recurrent_layers(_lean(graph)), inputs)
    finally:
        for tensor, value in zip(written, before, strict=True):
            tensor.data.copy_(value)
        for tensor, value in memory:
            tensor.data.copy_(value)
        if not memory:
            for tensor in state():
                tensor.data.zero_()
    leaves = {id(leaf): leaf for leaf in (*targets, *statements.values())}
    for module in modules:
        leaves.update((id(leaf), leaf) for leaf in module.parameters(recurse=False))
    return Captured(runnable, targets, list(leaves.values()), statements, list(modules), operations.reads)


def _leaves(loss: Tensor) -> list[Tensor]:
    """Return the tensors where a loss's graph begins: everything that backward would give a gradient to."""
    found: dict[int, Tensor] = {}
    todo: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        todo += [following for following, _ in node.next_functions]
    return list(found.values())


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


def _compiled(graph: GraphModule) -> Callable[..., Sequence[Tensor]]:
    # torch's own random numbers, so that a seed means the same as without compilation; where there are several threads
    # and draws of several kinds (dropout), its compiler may take them in another order all the same. Convolutions stay
    # in the layout of the network: another one slows down small ones.
    options: Any = {"fallback_random": True, "layout_optimization": False}
    compiled: Any = torch.compile(graph, fullgraph=True, dynamic=False, options=options)
    return compiled


def _that_runs(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Return the graph compiled by torch; as it is where torch cannot compile it, for want of a compiler, say."""
    validate, began = Distribution._validate_args, time.perf_counter()
    try:
        compiled = _compiled(graph)
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
