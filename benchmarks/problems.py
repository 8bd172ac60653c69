"""What the benchmark trains: a network, one minibatch, its likelihood, and the Pyro model of the three."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pyro_sam as ps

NOISE = 0.5  # standard deviation of the regression's observations


@dataclass
class Problem:
    """A network with a Normal(0, 1) prior on its weights, and one minibatch of a larger data set.

    Args:
        net: Network; its weights are where every contender starts.
        x: Inputs of the minibatch.
        y: Targets of the minibatch: class numbers, or real numbers for a regression.
        size: Number of data points of the whole data set.
    """

    net: nn.Module
    x: Tensor
    y: Tensor
    size: int = 60_000

    def __post_init__(self) -> None:
        """Wrap the network; the data plate is given its indices, so that no contender pays for drawing them."""
        self.bnn = ps.BayesianModule(self.net, prior=dist.Normal(0.0, 1.0))
        self._indices = torch.arange(len(self.x), device=self.x.device)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.net.parameters())

    @property
    def sites(self) -> int:
        """Number of tensors that the weights come in."""
        return len(list(self.net.parameters()))

    def model(self, x: Tensor, y: Tensor) -> Any:
        """Run the Pyro model."""
        output = self.bnn(x)
        with pyro.plate("data", self.size, subsample=self._indices):
            return pyro.sample("obs", self._likelihood(output), obs=y)

    def nll(self, output: Tensor, y: Tensor) -> Tensor:
        """Return minus the log-likelihood of the whole data set, estimated from a minibatch, in plain torch."""
        if y.is_floating_point():
            total = (0.5 * ((y - output) / NOISE) ** 2 + math.log(NOISE * math.sqrt(2 * math.pi))).sum()
        else:
            total = cross_entropy(output, y, reduction="sum")
        return total * (self.size / len(y))

    def _likelihood(self, output: Tensor) -> Any:
        return dist.Normal(output, NOISE) if self.y.is_floating_point() else dist.Categorical(logits=output)


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a fully connected network with these layer widths, inputs first."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def lenet() -> nn.Sequential:
    """Return LeNet-5 for images of 28 x 28 pixels, with ReLU and max-pooling."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *mlp(400, 120, 84, 10),
    )


class LastOfLSTM(nn.Module):
    """An LSTM, and a linear layer on its last output."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences, batch first, to logits."""
        output: Tensor = self.head(self.lstm(x)[0][:, -1])
        return output


def classification(net: nn.Module, batch: int, *shape: int, device: torch.device, classes: int = 10) -> Problem:
    """Return a problem of random inputs of this shape, and random classes."""
    x, y = torch.randn(batch, *shape), torch.randint(classes, (batch,))
    return Problem(net.to(device), x.to(device), y.to(device))


def regression(device: torch.device) -> Problem:
    """Return Bayesian linear regression with 10 weights."""
    net = nn.Sequential(nn.Linear(10, 1, bias=False), nn.Flatten(0))
    x, y = torch.randn(100, 10), torch.randn(100)
    return Problem(net.to(device), x.to(device), y.to(device), size=1000)


CASES: dict[str, Callable[[torch.device], Problem]] = {
    "2x64": lambda device: classification(mlp(784, 64, 64, 10), 128, 784, device=device),
    "784-400-400-10": lambda device: classification(mlp(784, 400, 400, 10), 128, 784, device=device),
    "LeNet-5": lambda device: classification(lenet(), 64, 1, 28, 28, device=device),
    "8x64": lambda device: classification(mlp(784, *[64] * 8, 10), 128, 784, device=device),
    "regression": regression,
    "LSTM": lambda device: classification(LastOfLSTM(16, 64, 10), 32, 20, 16, device=device),
}
