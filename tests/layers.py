"""Networks with one layer of each kind, and an input for each."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class First(nn.Module):
    """The first output of a layer that returns several."""

    def __init__(self, layer: nn.Module, repeat: int = 1) -> None:
        super().__init__()
        self.layer = layer
        self.repeat = repeat

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.repeat)[0]


class Tied(nn.Module):
    """An embedding that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.decode = nn.Linear(4, 5)
        self.decode.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.embed(x)))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)


SEQUENCE, TOKENS = (6, 5, 4), (6,)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (6, 4)),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 3), (6, 2, 7)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3), (6, 2, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 3), (6, 2, 4, 4, 4)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 3), (6, 2, 4, 4)),
    "BatchNorm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), (6, 4)),
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (6, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (6, 4, 3)),
    "PReLU": (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU()), (6, 4)),
    "Embedding": (lambda: nn.Embedding(5, 4), TOKENS),
    "Tied": (Tied, TOKENS),
    "RNN": (lambda: First(nn.RNN(4, 3, batch_first=True)), SEQUENCE),
    "LSTM": (lambda: First(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True)), SEQUENCE),
    "GRU": (lambda: First(nn.GRU(4, 3, batch_first=True)), SEQUENCE),
    "LSTMCell": (lambda: First(nn.LSTMCell(4, 3)), (6, 4)),
    "MultiheadAttention": (lambda: First(nn.MultiheadAttention(4, 2, batch_first=True), repeat=3), SEQUENCE),
    "TransformerEncoder": (lambda: nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False), SEQUENCE),
    "ParametrizedLinear": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (6, 4)),
}
RECURRENT = ("RNN", "LSTM", "GRU", "LSTMCell")


def make(name: str, *, train: bool = True) -> tuple[nn.Module, Tensor]:
    """Return the network and an input."""
    build, shape = LAYERS[name]
    x = torch.randint(0, 5, shape) if shape == TOKENS else torch.randn(shape)
    return build().train(train), x
