"""What a training run changes: parameters by name, and buffers of the modules that ran."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_sam.training.checkpoint import CheckpointError


class Trained:
    """Parameters and buffers of a model and a guide, found as they are used.

    It works alike with Pyro's param store and with ``module_local_params``, and with modules anywhere in a function.

    Attributes:
        params: Unconstrained parameters by the name of their ``pyro.param`` statement.
        modules: Modules that ran, in the order of their first call.
    """

    def __init__(self) -> None:
        self.params: dict[str, Tensor] = {}
        self.modules: dict[nn.Module, None] = {}

    @contextmanager
    def found(self, *, modules: bool) -> Iterator[dict[str, Tensor]]:
        """Note what the body uses, and fill the dict with the parameters it uses.

        Args:
            modules: Whether to look at modules too.
        """
        used: dict[str, Tensor] = {}
        hook = register_module_forward_pre_hook(lambda module, _: self.modules.setdefault(module)) if modules else None
        try:
            with poutine.trace(param_only=True) as capture:
                yield used
        finally:  # an error may leave gradients in some of them
            if hook is not None:
                hook.remove()
            sites: Any = capture.trace.nodes.items()
            used.update({name: site["value"].unconstrained() for name, site in sites if site["type"] == "param"})
            self.params.update(used)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the values by name."""
        params = {name: param.detach() for name, param in self.params.items()}
        return {"params": params, "buffers": {name: buffer.detach() for name, buffer in self.buffers().items()}}

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers of the modules that ran."""
        return dict(self._buffers())

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy values into parameters and buffers.

        Raises:
            CheckpointError: If they are others, or of other shapes.
        """
        for kind, own in (("params", self.params), ("buffers", self.buffers())):
            saved = state[kind]
            odd = saved.keys() ^ own.keys() or {name for name in own if saved[name].shape != own[name].shape}
            if odd:
                shapes = [
                    f"{name}: {_shape(saved.get(name))} there, {_shape(own.get(name))} here" for name in sorted(odd)[:5]
                ]
                raise CheckpointError(
                    f"the checkpoint is of another model or guide ({'; '.join(shapes)}). Use another path, or "
                    "resume=False to start anew."
                )
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.data.copy_(saved[name])

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for index, module in enumerate(self.modules):
            for name, buffer in module.named_buffers(recurse=False):
                yield f"{index}.{type(module).__name__}.{name}", buffer


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))
