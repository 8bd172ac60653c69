"""A captured graph made into machine code by torch's compiler, without the part of it that looks at Python."""

import logging
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

log = logging.getLogger(__name__)
Runnable = Callable[..., Sequence[Tensor]]


def compiled(graph: GraphModule, inputs: Sequence[Tensor]) -> Runnable:
    """Return the graph compiled.

    It is made of torch's own operations already and needs no gradient, so torch's code generator takes it as it is.
    That saves seconds, and at each step the guards that the caller has anyway.

    Args:
        graph: The graph.
        inputs: Inputs as they will be, in shapes and strides.
    """
    # torch's own random numbers, so that a seed means the same as without compilation; convolutions stay in the layout
    # of the network, as another one slows down small ones; the number of threads may change later
    wanted: Any = {"fallback_random": True, "layout_optimization": False, "cpp.dynamic_threads": True}
    lower, known = _code_generator()
    options = {name: value for name, value in wanted.items() if name in known or (lower is None and "." not in name)}
    tries = [options] if lower is not None else []
    if "cpp.vec_isa_ok" in known and all(tensor.device.type == "cpu" for tensor in inputs):
        # first without most of the trial builds that ask what the processor can do
        tries.insert(0, {**options, "cpp.vec_isa_ok": True})
    for chosen in tries:
        try:
            opened, held = _with_held_as_inputs(graph)  # anew: the code generator changes what it gets
            with torch.no_grad():
                lowered: Any = lower(opened, [*inputs, *held], options=chosen)
                lowered(*inputs, *held)
        except Exception as error:
            log.debug("torch's code generator alone failed: %s", error)
        else:
            return lambda *given: lowered(*given, *held)
    whole: Any = torch.compile(graph, fullgraph=True, dynamic=False, options=options)
    return whole


def _code_generator() -> tuple[Any, set[str]]:
    """Return torch's code generator and the names of its options; None where it has other names."""
    try:
        from torch._inductor import compile as lower
        from torch._inductor import list_options

        return lower, set(list_options())
    except Exception:
        return None, set()


def _with_held_as_inputs(graph: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """Make held tensors arguments: the code generator copies small ones into its code, and they may change."""
    new, values, held = Graph(), dict[Any, Any](), dict[int, Any]()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = new.placeholder(node.name)
    for node in graph.graph.nodes:
        tensor = attrgetter(str(node.target))(graph) if node.op == "get_attr" else None
        if isinstance(tensor, Tensor):
            if id(tensor) not in held:
                held[id(tensor)] = tensor, new.placeholder(f"held_{len(held)}")
            values[node] = held[id(tensor)][1]
    for node in graph.graph.nodes:
        if node not in values:
            values[node] = new.node_copy(node, values.__getitem__)
    return GraphModule(graph, new), [tensor for tensor, _ in held.values()]
