"""The CPU's LSTM kernel in a captured graph.

The kernel keeps what its gradient needs only where gradients are on, and a captured graph runs with gradients off. So
it is wrapped in an operator, which torch's compiler does not look into; the size of what is kept is the capture's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

_FORWARD: Any = torch.ops.aten.mkldnn_rnn_layer.default
_BACKWARD: Any = torch.ops.aten.mkldnn_rnn_layer_backward.default
_LIBRARY = torch.library.Library("pyro_sam", "DEF")


def with_recurrent_layers(graph: GraphModule) -> GraphModule:
    """Put the operators in the place of the kernel and of its gradient, in a graph with values in its metadata."""
    operators: Any = torch.ops.pyro_sam
    for node in graph.graph.nodes:
        if node.target is _FORWARD:
            kept = [user.meta["val"].numel() for user in node.users if user.args[1] == 3]
            node.target, node.args = operators.rnn_layer.default, (*node.args, *(kept or [0]))
        elif node.target is _BACKWARD:
            node.target = operators.rnn_layer_backward.default
    graph.recompile()
    return graph


def _forward(*args: Any) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        return tuple(output.detach() for output in _FORWARD(*args[:-1]))


def _forward_shapes(*args: Any) -> tuple[Tensor, ...]:
    *outputs, _ = _FORWARD(*args[:-1])
    return *outputs, args[0].new_empty(args[-1], dtype=torch.uint8)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = _BACKWARD(*args)
    return gradients


def _define(name: str, kernel: Any, more: str = "") -> None:
    _, arguments = str(kernel._schema).split("(", 1)
    _LIBRARY.define(f"{name}({arguments.replace(') ->', f'{more}) ->')}")


_define("rnn_layer", _FORWARD, ", int kept")
_LIBRARY.impl("rnn_layer", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("rnn_layer", _forward_shapes, "Meta")
_define("rnn_layer_backward", _BACKWARD)
_LIBRARY.impl("rnn_layer_backward", _backward, "CompositeExplicitAutograd")
_LIBRARY.impl("rnn_layer_backward", _backward, "Meta")
