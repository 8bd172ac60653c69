"""The Bayesian network that every method trains."""

import math
from collections.abc import Callable
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_sam as ps
from pyro_sam.study.datasets import Dataset
from pyro_sam.study.settings import Settings

Model = Callable[..., Tensor]
_NOISE = 0.5  # median a priori of the standard deviation of a regression's residuals, in standardised units


def bayesian_mlp(dataset: Dataset, settings: Settings) -> Model:
    r"""Return the model of a data set.

    A ReLU network with the prior :math:`N(0, \mathrm{prior\_std}^2 / \text{fan-in})`. The likelihood is Categorical, or
    Normal with a standard deviation whose logarithm is a latent, a priori Normal around that of half the targets'.

    Args:
        dataset: Training data, on the device that the network is put on.
        settings: Widths of the hidden layers, and the prior's standard deviation.
    Returns:
        The model, called with inputs and (to train) targets of a minibatch.
    """
    widths = (dataset.x_train.shape[1], *settings.hidden, dataset.num_classes or 1)
    layers: list[torch.nn.Module] = []
    for width, following in pairwise(widths):
        layers += [torch.nn.Linear(width, following), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers[:-1]).to(dataset.x_train)  # its device and dtype
    bnn = ps.BayesianModule(net, prior=ps.nn.fan_in_normal(settings.prior_std))
    num_rows = len(dataset.x_train)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        output = bnn(x)
        likelihood = _likelihood(dataset, output)
        with pyro.plate("data", len(x) if y is None else num_rows, subsample_size=len(x)):
            observed: Tensor = pyro.sample("obs", likelihood, obs=y)
        return observed

    return model


def _likelihood(dataset: Dataset, output: Tensor) -> dist.TorchDistribution:
    if dataset.task == "classification":
        return dist.Categorical(logits=output)
    log_noise = pyro.sample("log_noise", dist.Normal(output.new_tensor(math.log(_NOISE)), output.new_ones(())))
    return dist.Normal(output.squeeze(-1), log_noise.exp())
