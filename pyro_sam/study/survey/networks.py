"""The networks of the study: plain torch modules, which take flat inputs."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_sam.study.survey.problems import Problem, Source

_WIDTH, _HEADS, _LAYERS = 32, 4, 2  # of the transformer
_STEPS_BEFORE = 300  # of a network that is tuned later
_STAGES, _BLOCKS, _GROUPS = (16, 32, 64), 3, 8  # of the residual network of 20 layers
_WIDE = (64, 128, 256, 512)  # the stages of that of 18


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
    return _mlp((problem.x.shape[1], *source.hidden, source.num_outputs))


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def tuned_mlp(source: Source, problem: Problem) -> nn.Module:
    """Return the network of :func:`mlp` that was trained on the classes left out, with a new last layer at 0.

    Its parameters are the movements of its weights, so that every prior and every decay draws to where it begins.

    Raises:
        ValueError: If the problem has no rows of classes left out.
    """
    if problem.before is None:
        raise ValueError(f"the network tuned_mlp needs a source with classes left out, {source.name} has all.")
    layers = list(_trained(source.hidden, *problem.before))[:-1]
    head = nn.Linear(source.hidden[-1], source.num_outputs).requires_grad_(False)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*(Moved(each) if isinstance(each, nn.Linear) else each for each in [*layers, head]))


def lenet(source: Source, problem: Problem) -> nn.Module:
    """Return LeNet-5 with ReLU and maxima, for images of 28x28."""
    return nn.Sequential(
        ChannelsFirst(_image(source)),
        *(nn.Conv2d(_image(source)[2], 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, source.num_outputs)),
    )


def resnet20(source: Source, problem: Problem) -> nn.Module:
    """Return a residual network of 20 layers with GroupNorm, for colour images (He et al. 2016, section 4.2)."""
    shape, widths = _image(source), [_STAGES[0], *(width for width in _STAGES for _ in range(_BLOCKS))]
    return nn.Sequential(
        ChannelsFirst(shape),
        *(nn.Conv2d(shape[2], _STAGES[0], 3, padding=1, bias=False), GroupNorm(_GROUPS, _STAGES[0])),
        nn.ReLU(),
        *(ResidualBlock(*sizes) for sizes in pairwise(widths)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_STAGES[-1], source.num_outputs)),
    )


def resnet18(source: Source, problem: Problem) -> nn.Module:
    """Return a residual network of 18 layers with GroupNorm, for small colour images (He et al. 2016, Table 1).

    As is usual for them, it begins with a convolution of 3x3 and without the maximum.
    """
    shape, widths = _image(source), [_WIDE[0], *(width for width in _WIDE for _ in range(2))]
    return nn.Sequential(
        ChannelsFirst(shape),
        *(nn.Conv2d(shape[2], _WIDE[0], 3, padding=1, bias=False), GroupNorm(_GROUPS, _WIDE[0]), nn.ReLU()),
        *(ResidualBlock(*sizes) for sizes in pairwise(widths)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_WIDE[-1], source.num_outputs)),
    )


def transformer(source: Source, problem: Problem) -> nn.Module:
    """Return a transformer of two layers, LayerNorm first, which reads an image as the sequence of its rows."""
    height, width, channels = _image(source)
    return nn.Sequential(
        nn.Unflatten(-1, (height, width * channels)),
        *(nn.Linear(width * channels, _WIDTH), Positions(height, _WIDTH)),
        *(TransformerLayer(_WIDTH, _HEADS) for _ in range(_LAYERS)),
        *(nn.LayerNorm(_WIDTH), Mean(), nn.Linear(_WIDTH, source.num_outputs)),
    )


def _image(source: Source) -> tuple[int, int, int]:
    if source.image is None:
        raise ValueError(f"the network {source.network} needs images, and {source.name} has none.")
    return source.image


NETWORKS: dict[str, Callable[[Source, Problem], nn.Module]] = {
    each.__name__: each for each in (mlp, tuned_mlp, lenet, resnet20, resnet18, transformer)
}


@cache
def _trained(hidden: tuple[int, ...], x: Tensor, y: Tensor) -> nn.Sequential:
    """Return an MLP trained on rows, whatever the state of the random stream, which is left as it was."""
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(0)
        net = _mlp((x.shape[1], *hidden, int(y.max()) + 1)).to(x)
        optim = torch.optim.Adam(net.parameters(), 0.003)
        for _ in range(_STEPS_BEFORE):
            optim.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optim.step()
    return net.requires_grad_(False)


class Moved(nn.Linear):
    """A linear layer whose parameters are what its weights have moved from a start: 0 at first, and a priori likely.

    Args:
        start: Layer with the weights of the start.
    """

    start_weight: Tensor
    start_bias: Tensor

    def __init__(self, start: nn.Linear) -> None:
        super().__init__(start.in_features, start.out_features)
        self.register_buffer("start_weight", start.weight.detach().clone())
        self.register_buffer("start_bias", start.bias.detach().clone())

    def reset_parameters(self) -> None:
        """Go back to the start."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs at start plus movement."""
        return nn.functional.linear(x, self.start_weight + self.weight, self.start_bias + self.bias)


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
