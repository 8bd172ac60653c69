"""A network's parameters, found once: to walk through a network takes time."""

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pyro_sam.particles import no_checkpointing


class Weights:
    """The parameters of a network, and their priors.

    Args:
        net: The network.
        priors: Priors by name.
    """

    def __init__(self, net: nn.Module, priors: dict[str, Any]) -> None:
        self.priors = priors
        self._net = net
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

    def run(self, weights: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        """Return the network's output with weights in the place of its parameters, which are not written to."""
        before = [owner[name] for owner, name, _ in self._places]
        try:
            for owner, name, key in self._places:
                owner[name] = weights[key]  # type: ignore[assignment]
            with no_checkpointing():
                return self._net(*args, **kwargs)
        finally:
            for (owner, name, _), parameter in zip(self._places, before, strict=True):
                owner[name] = parameter

    def _present(self) -> list[Any]:
        present: list[Any] = []
        for module in self._modules:
            present += module._modules.values()
            present += module._parameters.values()
        return present
