"""The models of the conformance table: functions without arguments, over data fixed here."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(12, generator=GENERATOR, dtype=torch.float64)
MASK = torch.arange(12) % 3 > 0


def normal_mean() -> None:
    w = pyro.sample("w", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 12):
        pyro.sample("obs", dist.Normal(w, 0.5), obs=Y)


def regression() -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 12):
        pyro.sample("obs", dist.Normal((X * w).sum(-1) + b, 0.7), obs=Y)


def nested_plates() -> None:
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 3, dim=-1):
        column = pyro.sample("column", dist.Normal(top, 1.0))
        with pyro.plate("rows", 12, dim=-2):
            cell = pyro.sample("cell", dist.Normal(column, 0.5))
            pyro.sample("obs", dist.Normal(cell, 0.5), obs=X)


def subsampled_data() -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", 12, subsample_size=5) as rows:
        pyro.sample("obs", dist.Normal((X[rows] * w).sum(-1), 0.7), obs=Y[rows])


def subsampled_locals() -> None:
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 12, subsample_size=5) as rows:
        z = pyro.sample("z", dist.Normal(top, 1.0))
        pyro.sample("obs", dist.Normal(z, 0.5), obs=Y[rows])


def full_locals() -> None:
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 12) as rows:  # takes the minibatch of a guide that subsamples
        z = pyro.sample("z", dist.Normal(top, 1.0))
        pyro.sample("obs", dist.Normal(z, 0.5), obs=Y[rows])


def sequential_plates() -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    for i in pyro.plate("items", 3):
        z = pyro.sample(f"z_{i}", dist.Normal(w, 1.0))
        with pyro.plate(f"data_{i}", 12, subsample_size=4) as rows:
            pyro.sample(f"obs_{i}", dist.Normal(z, 0.5), obs=X[rows, i])


def factor() -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.factor("energy", -0.3 * (w - 1.0).pow(4).sum(-1))


def deterministic() -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    mean = pyro.deterministic("mean", (X * w).sum(-1))
    with pyro.plate("data", 12):
        pyro.sample("obs", dist.Normal(mean, 0.7), obs=Y)


def masked_handler() -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", 12), poutine.mask(mask=MASK):
        pyro.sample("obs", dist.Normal((X * w).sum(-1), 0.7), obs=Y)


def masked_imputation() -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", 12):
        pyro.sample("obs", dist.Normal((X * w).sum(-1), 0.7), obs=Y, obs_mask=MASK)


def scaled() -> None:
    with poutine.scale(scale=0.25):
        regression()


def constrained() -> None:
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    parts = pyro.sample("parts", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    within = pyro.sample("within", dist.Uniform(-1.0, 2.0))
    with pyro.plate("data", 12):
        pyro.sample("obs", dist.Normal((X * parts).sum(-1) * rate + share + within, sigma), obs=Y)


def correlated() -> None:
    tril = pyro.sample("tril", dist.LKJCholesky(3, 1.5))
    with pyro.plate("columns", 3):
        theta = pyro.sample("theta", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", 12):
        scale_tril = theta.unsqueeze(-1) * tril
        pyro.sample("obs", dist.MultivariateNormal(X.new_zeros(3), scale_tril=scale_tril), obs=X)


def hierarchical() -> None:
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, tau.unsqueeze(-1).expand(*tau.shape, 3)).to_event(1))
    with pyro.plate("data", 12):
        pyro.sample("obs", dist.Normal((X * w).sum(-1), 0.7), obs=Y)


def learnable_prior() -> None:
    loc = pyro.param("prior_loc", torch.tensor(0.3))
    scale = pyro.param("prior_scale", torch.tensor(1.3), constraint=dist.constraints.positive)
    w = pyro.sample("w", dist.Normal(loc, scale).expand([3]).to_event(1))
    sigma = pyro.param("sigma", torch.tensor(0.7), constraint=dist.constraints.positive)
    with pyro.plate("data", 12):
        pyro.sample("obs", dist.Normal((X * w).sum(-1), sigma), obs=Y)


def correlated_prior() -> None:
    covariance = torch.eye(3) + 0.4
    w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(3), covariance))
    with pyro.plate("data", 12):
        pyro.sample("obs", dist.Normal((X * w).sum(-1), 0.7), obs=Y)


def markov_chain() -> None:
    drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
    z: Tensor = torch.tensor(0.0)
    for t in pyro.markov(range(5)):
        z = pyro.sample(f"z_{t}", dist.Normal(0.8 * z + drift, 0.5))
        pyro.sample(f"obs_{t}", dist.Normal(z, 0.3), obs=Y[t])


def by_data(rows: int) -> Callable[[], None]:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        # a site that only large data have
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0)) if rows > 6 else torch.tensor(1.0)
        with pyro.plate("data", rows):
            pyro.sample("obs", dist.Normal(w, sigma), obs=Y[:rows])

    return model


def network(*layers: nn.Module) -> Callable[[], None]:
    """A network of maximum likelihood, such as one with dropout or BatchNorm, under a Bayesian last layer."""
    net = nn.Sequential(nn.Linear(3, 4), *layers).double()

    def model() -> None:
        pyro.module("net", net)
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        with pyro.plate("data", 12, subsample_size=8) as rows:
            pyro.sample("obs", dist.Normal((net(X[rows]) * w).sum(-1), 0.7), obs=Y[rows])

    return model
