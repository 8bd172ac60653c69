"""What a run of a method from outside starts with: a network, with the study's likelihood and prior, and settings."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import pyro_sam as ps
from pyro_sam.study.survey.problems import Problem, Source

_PRIOR = ps.nn.fan_in_normal(1.0)
_LOG_NOISE = math.log(0.5)


class Plain(torch.nn.Module):
    r"""A plain network with the likelihood and the prior of the study's model.

    Of a regression whose network does not tell it the noise is a parameter :math:`\log\sigma = \log 0.5 + \delta`,
    :math:`\delta \sim N(0, 1)`; it starts at 1, as in the study's guides.

    Args:
        net: The network.
        source: The data set.
    """

    def __init__(self, net: torch.nn.Module, source: Source) -> None:
        super().__init__()
        self.net, self._source = net, source
        self.delta: torch.nn.Parameter | None = None
        if source.task == "regression" and not source.own_noise:
            self.delta = torch.nn.Parameter(next(net.parameters()).new_tensor(-_LOG_NOISE))

    def forward(self, x: Tensor, *, check: bool = True) -> Any:
        """Return the likelihood of rows.

        Args:
            x: Inputs.
            check: Whether a NaN is an error.
        """
        output, checked = self.net(x), None if check else False
        if self._source.task == "classification":
            return dist.Categorical(logits=output, validate_args=checked)
        log_noise = output[..., 1] if self.delta is None else self.log_noise
        return dist.Normal(output[..., 0], log_noise.exp(), validate_args=checked)

    @property
    def log_noise(self) -> Tensor:
        """Logarithm of the noise, where it is a parameter."""
        if self.delta is None:
            raise ValueError("log_noise must be a parameter: only a regression without a noise of its own has it.")
        return _LOG_NOISE + self.delta

    def nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the negative log-likelihood per row."""
        loss: Tensor = -self(x, check=False).log_prob(y).mean()
        return loss

    def precisions(self) -> dict[torch.nn.Parameter, float]:
        """Return the precision of the prior of each parameter, in their order; all priors have the mean 0."""
        found = {} if self.delta is None else {self.delta: 1.0}
        for name, each in self.net.named_parameters():
            found[each] = float(_PRIOR(name, each).base_dist.stddev.flatten()[0]) ** -2
        return found

    def values(self) -> dict[str, Tensor]:
        """Return the values of the sites of the study's model."""
        values = {name: each.detach().clone() for name, each in self.net.named_parameters()}
        return values if self.delta is None else {**values, "log_noise": self.log_noise.detach().clone()}

    @contextmanager
    def at(self, weights: Tensor) -> Iterator[None]:
        """Place a vector of all parameters, for the body."""
        kept = parameters_to_vector(self.parameters()).detach().clone()
        vector_to_parameters(weights, self.parameters())
        try:
            yield
        finally:
            vector_to_parameters(kept, self.parameters())


@dataclass(frozen=True)
class Start:
    """What a run starts with.

    Args:
        plain: The network.
        problem: Rows to train on.
        numbers: Settings by name.
        steps: Number of steps.
        share: Share of the learning rate that is left at a step.
    """

    plain: Plain
    problem: Problem
    numbers: Mapping[str, float]
    steps: int
    share: Callable[[float], float]

    @property
    def num_rows(self) -> int:
        """Number of training rows."""
        return len(self.problem.x)
