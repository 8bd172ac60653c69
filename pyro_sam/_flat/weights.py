"""A network's parameters, found once: to walk through a network takes time."""

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pyro_sam._base.buffers import Buffers, called_modules
from pyro_sam._base.vectorised import no_checkpointing


class Weights:
    """The parameters of a network, and their priors.

    Args:
        net: The network.
        priors: Priors by name.
    """

    def __init__(self, net: nn.Module, priors: dict[str, Any]) -> None:
        self.priors = priors
        self._net = net
        self._calls_others: bool | None = None  # such as modules in a list, which are not found in it
        self._modules = list(net.modules())
        self._members = self._present()
        self._parameters = list(net.parameters())
        self._kinds = [(parameter.dtype, parameter.device) for parameter in self._parameters]
        first = {parameter: name for name, parameter in net.named_parameters()}
        # every place, so that tied parameters stay tied
        self._places = [
            (module._parameters, name, first[parameter])
            for module in self._modules
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def are_current(self) -> bool:
        """Return whether modules and parameters are what they were."""
        present = self._present()
        same = len(present) == len(self._members) and all(map(operator.is_, present, self._members))
        return same and [(parameter.dtype, parameter.device) for parameter in self._parameters] == self._kinds

    def run(self, weights: Mapping[str, Tensor], buffers: Buffers, args: Any, kwargs: Any) -> Any:
        """Return the network's output with weights in the place of its parameters, which are not written to.

        Args:
            weights: A weight per name.
            buffers: Watches modules that are called; not these, where there is no buffer.
            args: Positional arguments of the network.
            kwargs: Keyword arguments of the network.
        """
        unwatched = self._calls_others is False and not any(module._buffers for module in self._modules)
        before = [owner[name] for owner, name, _ in self._places]
        if unwatched:
            buffers.look_away()
        try:
            for owner, name, key in self._places:
                owner[name] = weights[key]  # type: ignore[assignment]
            with no_checkpointing():
                return self._net(*args, **kwargs) if unwatched else self._first_call(args, kwargs)
        finally:
            for (owner, name, _), parameter in zip(self._places, before, strict=True):
                owner[name] = parameter
            if unwatched:
                buffers.watch()

    def _first_call(self, args: Any, kwargs: Any) -> Any:
        with called_modules() as called:
            output = self._net(*args, **kwargs)
        self._calls_others = not called.keys() <= set(self._modules)
        return output

    def _present(self) -> list[Any]:
        present: list[Any] = []
        for module in self._modules:
            present += module._modules.values()
            present += module._parameters.values()
        return present
