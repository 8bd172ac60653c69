"""Many weights at once against a loop over plain networks that hold one of them each."""

import copy
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from layers import LAYERS, RECURRENT, make
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_sam.nn import BayesianModule

P, N = 3, 6
PARTICLES = "num_particles_vectorized"


def draw(net: nn.Module, *leading: int) -> dict[str, Tensor]:
    return {name: (0.5 * torch.randn(*leading, *p.shape)).requires_grad_() for name, p in net.named_parameters()}


def one_by_one(net: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Return the outputs of a plain copy of the network for each weight along the first dimension."""
    outputs = []
    for i in range(P):
        twin = copy.deepcopy(net)
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(False)
            if name in weights:
                # in place of the parameter, so that the gradient reaches the weights
                owner, _, last = name.rpartition(".")
                del twin.get_submodule(owner)._parameters[last]
                value = weights[name][i].reshape(parameter.shape)
                setattr(twin.get_submodule(owner), last, value)
        outputs.append(twin(x))
    return torch.stack(outputs)


def in_particles(bnn: BayesianModule, weights: Mapping[str, Tensor], dim: int, *args: Any) -> Any:
    with pyro.plate(PARTICLES, P, dim=dim), poutine.condition(data=dict(weights)):
        return bnn(*args)


# Parametrised and tied parameters, whose parts have other names than the attributes that the loop replaces, come later.
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("layer", [name for name in LAYERS if name not in ("Tied", "ParametrizedLinear")])
def test_particles_are_a_loop_over_networks(layer: str, train: bool) -> None:
    net, x = make(layer, train=train and layer != "BatchNorm")
    weights = draw(net, P, 1)
    output = in_particles(BayesianModule(net), weights, -2, x)
    expected = one_by_one(net, weights, x)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-12)
    gradients = torch.autograd.grad((output**2).sum(), list(weights.values()))
    expected_gradients = torch.autograd.grad((expected**2).sum(), list(weights.values()))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-11)
