"""Well-known Pyro examples, trained by one script in which only ``loss=`` changes."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_sam as ps

Example = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]


def eight_schools() -> Example:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(scale=25.0))
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)

    return model, AutoNormal(model), ()


def logistic_regression() -> Example:
    x = torch.randn(100, 3)
    y = (x @ torch.tensor([1.0, -2.0, 0.5]) > 0).double()

    def model(x: Tensor, y: Tensor) -> None:
        coefficients = pyro.sample("coefficients", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=(coefficients * x).sum(-1)), obs=y)

    return model, AutoMultivariateNormal(model), (x, y)


def gaussian_mixture() -> Example:
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])

    @config_enumerate
    def model(data: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(torch.tensor([1.0, 9.0]), 10.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    return model, AutoNormal(pyro.poutine.block(model, hide=["assignment"])), (data,)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.Softplus(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.Softplus(), nn.Linear(32, 64))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


def vae_on_digits() -> Example:
    digits, vae = torch.as_tensor(load_digits().data[:200] > 7.0).double(), VAE()
    return vae.model, vae.guide, (digits,)


def time_series() -> Example:
    y = torch.sin(torch.arange(20) / 3.0) + 0.1 * torch.randn(20)

    def model(y: Tensor) -> None:
        drift = pyro.sample("drift", dist.LogNormal(-1.0, 1.0))
        state: Any = torch.tensor(0.0)
        for t in pyro.markov(range(len(y))):
            state = pyro.sample(f"state_{t}", dist.Normal(state, drift))
            pyro.sample(f"obs_{t}", dist.Normal(state, 0.1), obs=y[t])

    return model, AutoNormal(model), (y,)


def matrix_factorisation() -> Example:
    ratings = torch.randn(10, 2) @ torch.randn(2, 8)
    seen = torch.rand(10, 8) < 0.7

    def model(ratings: Tensor) -> None:
        with pyro.plate("users", 10, dim=-2):
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("items", 8, dim=-1):
            v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("pairs", 10, dim=-2), pyro.poutine.mask(mask=seen):
                pyro.sample("obs", dist.Normal((u * v).sum(-1), 0.3), obs=ratings)

    return model, ps.MeanFieldNormal(model), (ratings,)


def bayesian_lstm() -> Example:
    waves = torch.sin(torch.arange(7) / 2.0 + torch.rand(30, 1) * 6.0)
    net = ps.BayesianModule(Forecast(), prior=dist.Normal(0.0, 0.5))

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.2), obs=y)

    return model, ps.MeanFieldNormal(model, init_scale=0.02), (waves[:, :6, None], waves[:, 6])


class Forecast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1]).squeeze(-1)


EXAMPLES = [
    (eight_schools, Trace_ELBO),
    (logistic_regression, Trace_ELBO),
    (gaussian_mixture, TraceEnum_ELBO),
    (vae_on_digits, TraceMeanField_ELBO),
    (time_series, Trace_ELBO),
    (matrix_factorisation, TraceMeanField_ELBO),
    (bayesian_lstm, TraceMeanField_ELBO),
]


def train(example: Callable[[], Example], loss: Any, steps: int = 40) -> list[float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = example()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss=loss)
    return [svi.step(*args) for _ in range(steps)]


@pytest.mark.parametrize(("example", "pyros"), EXAMPLES)
def test_gaussian_law_trains_exactly_as_pyros_estimator(example: Callable[[], Example], pyros: type[Any]) -> None:
    nesting = {"max_plate_nesting": 2}
    expected = train(example, pyros(**nesting))
    assert expected[-1] < expected[0]
    assert train(example, ps.SAM_ELBO(ps.Gaussian(), **nesting)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("law", [ps.Mean(), ps.Adversarial(0.5), ps.MixSAM(1.0), ps.AscendedSample(0.5)], ids=repr)
@pytest.mark.parametrize("example", [example for example, _ in EXAMPLES])
def test_every_law_trains_by_the_same_script(example: Callable[[], Example], law: ps.Perturbation) -> None:
    losses = train(example, ps.SAM_ELBO(law))
    assert sum(losses[-5:]) < sum(losses[:5])
