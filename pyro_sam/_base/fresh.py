"""Fresh weights for a network: those that its layers would be built with."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

_NETS: ContextVar[dict[nn.Module, Mapping[str, Tensor]] | None] = ContextVar("fresh weights", default=None)


@contextmanager
def fresh_weights() -> Iterator[None]:
    """Let each network start at fresh weights in the body, the same ones at each look."""
    token = _NETS.set({})
    try:
        yield
    finally:
        _NETS.reset(token)


def starting_weights(net: nn.Module) -> Mapping[str, Tensor]:
    """Return the weights that a network starts at, by name: its own, or fresh ones inside of :func:`fresh_weights`.

    Raises:
        ValueError: If a layer does not know how to make fresh ones.
    """
    nets = _NETS.get()
    if nets is None:
        return dict(net.named_parameters())
    if net not in nets:
        nets[net] = dict(_reset(net).named_parameters())
    return nets[net]


def _reset(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    for name, module in reversed(list(net.named_modules())):  # as they are built: the inner ones first
        if not module._parameters:
            continue
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is None:
            raise ValueError(
                f"{type(module).__name__} '{name}' has no method reset_parameters, which replicas get their own fresh "
                "weights from; give it one, or let all replicas start at the network's weights by "
                "init_loc_fn=pyro_sam.nn.init_to_module(bnn)."
            )
        reset()
    return net
