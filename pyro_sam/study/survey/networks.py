"""The networks of the study: plain torch modules, which take flat inputs."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_sam.study.survey.problems import Problem, Source

_WIDTH, _HEADS, _LAYERS = 32, 4, 2  # of the transformer
_STAGES, _BLOCKS, _GROUPS = (16, 32, 64), 3, 8  # of the residual network


def plain_network(source: Source, problem: Problem) -> nn.Module:
    """Return the network of a data set, without priors.

    Args:
        source: Names the network, and tells the shapes of its inputs and outputs.
        problem: Tells dtype, device and number of inputs.
    Returns:
        A module from inputs ``(n, d)`` to outputs ``(n, source.num_outputs)``.
    """
    return NETWORKS[source.network](source, problem).to(problem.x)


def mlp(source: Source, problem: Problem) -> nn.Module:
    """Return a ReLU network with the hidden layers of ``source.hidden``."""
    widths = (problem.x.shape[1], *source.hidden, source.num_outputs)
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def lenet(source: Source, problem: Problem) -> nn.Module:
    """Return LeNet-5 with ReLU and maxima, for images of 28x28."""
    return nn.Sequential(
        nn.Unflatten(-1, (1, *source.image[:2])),
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, source.num_outputs)),
    )


def resnet20(source: Source, problem: Problem) -> nn.Module:
    """Return a residual network of 20 layers with GroupNorm, for colour images (He et al. 2016, section 4.2)."""
    widths = [_STAGES[0], *(width for width in _STAGES for _ in range(_BLOCKS))]
    return nn.Sequential(
        ChannelsFirst(source.image),
        *(nn.Conv2d(source.image[2], _STAGES[0], 3, padding=1, bias=False), GroupNorm(_GROUPS, _STAGES[0])),
        nn.ReLU(),
        *(ResidualBlock(*sizes) for sizes in pairwise(widths)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_STAGES[-1], source.num_outputs)),
    )


def transformer(source: Source, problem: Problem) -> nn.Module:
    """Return a transformer of two layers, LayerNorm first, which reads an image as the sequence of its rows."""
    height, width, channels = source.image
    return nn.Sequential(
        nn.Unflatten(-1, (height, width * channels)),
        *(nn.Linear(width * channels, _WIDTH), Positions(height, _WIDTH)),
        *(TransformerLayer(_WIDTH, _HEADS) for _ in range(_LAYERS)),
        *(nn.LayerNorm(_WIDTH), Mean(), nn.Linear(_WIDTH, source.num_outputs)),
    )


NETWORKS: dict[str, Callable[[Source, Problem], nn.Module]] = {
    each.__name__: each for each in (mlp, lenet, resnet20, transformer)
}


class ChannelsFirst(nn.Module):
    """Flat images, channels last, as images with channels first.

    Args:
        shape: Height, width and channels.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Return images ``(n, channels, height, width)``."""
        return x.unflatten(-1, self.shape).movedim(-1, -3)


class ResidualBlock(nn.Module):
    """Two convolutions with GroupNorm, around them the identity, which fills new channels up with zeros.

    Args:
        width: Number of channels before.
        following: Number of channels after; where it is another, height and width are halved.
    """

    def __init__(self, width: int, following: int) -> None:
        super().__init__()
        self.stride, self.more = (1 if width == following else 2), following - width
        self.body = nn.Sequential(
            nn.Conv2d(width, following, 3, self.stride, padding=1, bias=False),
            GroupNorm(_GROUPS, following),
            nn.ReLU(),
            nn.Conv2d(following, following, 3, padding=1, bias=False),
            GroupNorm(_GROUPS, following),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return images of the following width."""
        same = nn.functional.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return torch.relu(same + self.body(x))


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm as a LayerNorm of each group, which ``torch.func.vmap`` maps without gradients too."""

    def forward(self, x: Tensor) -> Tensor:
        """Return images of the same shape, each group with mean 0 and variance 1 before the affine map."""
        groups = x.unflatten(-3, (self.num_groups, -1))
        normal = nn.functional.layer_norm(groups, groups.shape[-3:], eps=self.eps).flatten(-4, -3)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


class Positions(nn.Module):
    """Add a learnt vector to each place of a sequence.

    Args:
        length: Number of places.
        width: Length of a vector.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors, of length 1 on average."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sequences with their places."""
        return x + self.weight


class Attention(nn.Module):
    """Self-attention with several heads.

    Args:
        width: Length of a token.
        heads: Number of heads, which divides it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.all, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return sequences of the same shape."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).movedim(-2, -3) for part in self.all(x).chunk(3, dim=-1)
        )
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return self.out((weights @ value).movedim(-3, -2).flatten(-2))


class TransformerLayer(nn.Module):
    """Attention and a small ReLU network, each behind a LayerNorm and around it the identity.

    Args:
        width: Length of a token.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.network = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return sequences of the same shape."""
        x = x + self.attention(x)
        return x + self.network(x)


class Mean(nn.Module):
    """The mean over the places of a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """Return vectors."""
        return x.mean(-2)
