"""What the defaults are tried on: real networks on real data, each with a budget that one thread spends in a minute."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn import datasets
from torch import Tensor, nn

import pyro_sam as ps
from benchmarks.problems import LastOfLSTM, lenet, mlp

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Inputs and targets, standardised by the training part."""

    train: Pair
    validation: Pair
    test: Pair


@dataclass(frozen=True)
class Problem:
    """A network, its data, and how long it is trained.

    Args:
        net: Makes the network.
        data: Loads the data from the data folder.
        kind: ``"classes"``; ``"noise"``, a regression with a latent noise level; or ``"spread"``, one whose network
            also gives the logarithm of the noise level.
        lr: Learning rate of Adam that suits a plain network of this kind.
        batch: Rows a step.
        epochs: Passes over the data.
        needs: File in the data folder; None if the data comes with a package.
        cost: ``"light"``, ``"medium"``, ``"heavy"`` or ``"heaviest"``: the more it is, the fewer settings are tried.
    """

    net: Callable[[], nn.Module]
    data: Callable[[Path], Data]
    kind: str
    lr: float
    batch: int
    epochs: int
    needs: str | None = None
    cost: str = "light"

    def model(self, bnn: Callable[[Tensor], Tensor], size: int) -> Callable[..., Any]:
        """Return the Pyro model, with ``size`` rows of data in all."""

        def model(x: Tensor, y: Tensor | None = None) -> Any:
            # its logarithm: a real latent, which is trained side by side faster than a positive one
            noise = pyro.sample("log_noise", dist.Normal(-1.0, 1.0)).exp() if self.kind == "noise" else None
            output = bnn(x)
            with pyro.plate("data", size if y is not None else len(x), subsample_size=len(x)):
                return pyro.sample("obs", self._likelihood(output, noise), obs=y)

        return model

    def _likelihood(self, output: Tensor, noise: Tensor | None) -> Any:
        if self.kind == "classes":
            return dist.Categorical(logits=output)
        if noise is not None:
            return dist.Normal(output.squeeze(-1), noise)
        return dist.Normal(output[..., 0], output[..., 1].clamp(-7, 7).exp())

    def chance(self, data: Data) -> float:
        """Return the test NLL of the best constant prediction."""
        y, test = data.train[1], data.test[1]
        if self.kind == "classes":
            return -float((y.bincount() / len(y)).log()[test].mean())
        return -float(dist.Normal(y.mean(), y.std()).log_prob(test).mean())


class RowTransformer(nn.Module):
    """A transformer of one layer that reads an image row by row."""

    def __init__(self, size: int = 8, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(size, width)
        self.place = nn.Parameter(torch.empty(size, width))
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the places of the rows anew."""
        nn.init.normal_(self.place, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images, shape (n, rows, columns), to logits."""
        output: Tensor = self.head(self.layer(self.embed(x) + self.place).mean(1))
        return output


class Residual(nn.Module):
    """Two convolutions with GroupNorm, and a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(4, width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(4, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images to images."""
        output: Tensor = (x + self.body(x)).relu()
        return output


def resnet(width: int = 16, blocks: int = 2) -> nn.Sequential:
    """Return a small ResNet with GroupNorm, for images of 8 x 8."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8)), nn.Conv2d(1, width, 3, padding=1, bias=False), nn.GroupNorm(4, width), nn.ReLU()),
        *(Residual(width) for _ in range(blocks)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


def split(x: Any, y: Any, train: int, validation: int) -> Data:
    """Return the rows, shuffled always alike, in three parts, with inputs (and real targets) standardised."""
    x, y = torch.as_tensor(x).float(), torch.as_tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    first = order[:train]
    x = (x - x[first].mean(0)) / x[first].std(0).clamp_min(1e-6)
    if y.is_floating_point():
        y = ((y - y[first].mean()) / y[first].std()).float()
    parts = [(x[rows], y[rows]) for rows in (first, order[train : train + validation], order[train + validation :])]
    return Data(*parts)


def wave(_: Path) -> Data:
    """Return 200 points of a sine whose noise grows, and 1000 to test."""
    generator = torch.Generator().manual_seed(0)

    def draw(number: int) -> Pair:
        x = 4 * torch.rand(number, 1, generator=generator) - 2
        noise = 0.05 + 0.1 * (x + 2)
        return x, (torch.sin(2 * x) + noise * torch.randn(number, 1, generator=generator)).squeeze(-1)

    return Data(draw(200), draw(200), draw(1000))


def digits(_: Path, *shape: int) -> Data:
    """Return scikit-learn's digits."""
    x, y = datasets.load_digits(return_X_y=True)
    x = torch.as_tensor(x).float() / 8 - 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].view(-1, *shape or (64,)), torch.as_tensor(y)[order]
    return Data((x[:1000], y[:1000]), (x[1000:1300], y[1000:1300]), (x[1300:], y[1300:]))


def mnist(folder: Path, *shape: int) -> Data:
    """Return 5000 images of MNIST, 1000 to choose by, and 1500 of its test set."""
    with np.load(folder / "mnist.npz") as arrays:
        pixels = [torch.as_tensor(arrays["x_train"][:6000]), torch.as_tensor(arrays["x_test"][:1500])]
        y, y_test = (torch.as_tensor(arrays[name]).long() for name in ("y_train", "y_test"))
    x, x_test = (((part.float() / 255 - 0.1307) / 0.3081).view(-1, *shape or (784,)) for part in pixels)
    return Data((x[:5000], y[:5000]), (x[5000:], y[5000:6000]), (x_test, y_test[:1500]))


def uci(folder: Path, name: str, train: int, validation: int) -> Data:
    """Return a data set of ``uci_regression.npz``."""
    with np.load(folder / "uci_regression.npz") as arrays:
        return split(arrays[f"{name}_X"], arrays[f"{name}_y"], train, validation)


PROBLEMS = {
    "wave 1-50-50-2 tanh": Problem(
        lambda: mlp(1, 50, 50, 2, activation=nn.Tanh), wave, "spread", 1e-2, 50, 600, cost="medium"
    ),
    "diabetes 10-50-1": Problem(
        lambda: mlp(10, 50, 1),
        lambda _: split(*datasets.load_diabetes(return_X_y=True), 260, 90),
        "noise",
        1e-2,
        50,
        300,
    ),
    "concrete 8-50-1": Problem(
        lambda: mlp(8, 50, 1),
        lambda f: uci(f, "concrete", 650, 180),
        "noise",
        1e-2,
        50,
        200,
        "uci_regression.npz",
        cost="medium",
    ),
    "breast cancer, logistic": Problem(
        lambda: nn.Linear(30, 2),
        lambda _: split(*datasets.load_breast_cancer(return_X_y=True), 340, 114),
        "classes",
        1e-2,
        50,
        200,
    ),
    "digits 64-50-50-10": Problem(lambda: mlp(64, 50, 50, 10), digits, "classes", 1e-2, 50, 100),
    "digits LSTM": Problem(
        lambda: LastOfLSTM(8, 32, 10), lambda f: digits(f, 8, 8), "classes", 1e-2, 50, 40, cost="medium"
    ),
    "digits transformer": Problem(RowTransformer, lambda f: digits(f, 8, 8), "classes", 3e-3, 50, 40, cost="heavy"),
    "digits ResNet, GroupNorm": Problem(resnet, lambda f: digits(f, 8, 8), "classes", 3e-3, 50, 20, cost="heavy"),
    "MNIST-5000 784-100-100-10": Problem(
        lambda: mlp(784, 100, 100, 10), mnist, "classes", 1e-3, 100, 20, "mnist.npz", cost="heavy"
    ),
    "MNIST-5000 LeNet": Problem(
        lenet, lambda f: mnist(f, 1, 28, 28), "classes", 1e-3, 100, 15, "mnist.npz", cost="heaviest"
    ),
}


def nll(problem: Problem, model: Any, guide: Any, pair: Pair) -> tuple[float, float]:
    """Return NLL and accuracy (or root mean squared error) of the posterior predictive."""
    x, y = pair
    prediction = ps.predict(model, guide, x, num_samples=32, samples_at_once=1)
    score = -float(prediction.log_prob(y).mean())
    if problem.kind == "classes":
        return score, float((prediction.probs.argmax(-1) == y).float().mean())
    return score, math.sqrt(float((prediction.mean - y).square().mean()))
