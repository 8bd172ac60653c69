"""MC dropout: inputs of layers are dropped at random, in training as in prediction, where each draw is a sample.

The objective is that of ``map``; its rate of dropping is tuned.

References:
    Gal and Ghahramani (2016), "Dropout as a Bayesian approximation", arXiv:1506.02142.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyro_sam.study.survey.outside.descent import Descent
from pyro_sam.study.survey.outside.start import Start


class Dropout:
    """A run of MC dropout, at the rate ``rate``.

    Args:
        start: Network, rows and settings.
    """

    def __init__(self, start: Start) -> None:
        self._rate, self._drops, self._descent = start.numbers["rate"], False, Descent(start)
        layers = [each for each in start.plain.modules() if isinstance(each, torch.nn.Linear | torch.nn.Conv2d)]
        for layer in layers[1:]:  # of the network's own inputs none is dropped
            layer.register_forward_pre_hook(self._drop)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take a step with fresh masks."""
        with self.sampled():
            self._descent.step(x, y)

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Drop in the body."""
        self._drops = True
        try:
            yield
        finally:
            self._drops = False

    def centred(self) -> AbstractContextManager[None]:
        """Drop nothing: the weights are scaled for that already, since what is kept is scaled up when others drop."""
        return nullcontext()

    def _drop(self, _: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.nn.functional.dropout(inputs[0], self._rate, self._drops), *inputs[1:])
