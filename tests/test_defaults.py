"""What the library does untold: the scale that a guide starts at, the prior of a network, the law of the noise."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from torch import nn

import pyro_sam as ps

FAN_IN = {"0.weight": 12, "0.bias": 1, "2.weight": 20, "2.bias": 1}
FAN_IN |= {"3.weight": 1, "3.bias": 1, "4.weight": 4, "4.bias": 1}


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten(), nn.Linear(20, 4), nn.LayerNorm(4), nn.Linear(4, 2))


@pytest.mark.parametrize("prior", [None, dist.Normal(0.0, 3.0)])
def test_weights_start_at_a_hundredth_over_the_root_of_their_fan_in(prior: dist.Normal | None) -> None:
    x = torch.randn(2, 3, 3, 3)
    bnn = ps.BayesianModule(network(), prior)
    guide = ps.MeanFieldNormal(bnn).initialize(x)
    for name, fan_in in FAN_IN.items():
        scale = guide._get_loc_and_scale(name)[1]
        torch.testing.assert_close(scale, torch.full_like(scale, 0.01 / fan_in**0.5))


def test_other_latents_start_at_a_tenth_as_in_auto_normal() -> None:
    def factors() -> None:
        pyro.sample("loadings", dist.Normal(0.0, 1.0).expand([30, 7]).to_event(2))
        pyro.sample("noise", dist.LogNormal(0.0, 1.0))

    ours = ps.MeanFieldNormal(factors).initialize()
    theirs = pyro.infer.autoguide.AutoNormal(factors)
    theirs()
    for name in ("loadings", "noise"):
        torch.testing.assert_close(ours._get_loc_and_scale(name)[1], theirs._get_loc_and_scale(name)[1])


def test_each_replica_starts_as_a_guide_of_its_own() -> None:
    x = torch.randn(2, 3, 3, 3)
    bnn = ps.BayesianModule(network())
    guide = ps.MeanFieldNormal(bnn, num_replicas=3).initialize(x)
    scale = guide.replica(2)._get_loc_and_scale("2.weight")[1]
    torch.testing.assert_close(scale, torch.full((4, 20), 0.01 / 20**0.5))


def test_the_default_prior_is_standard_normal_up_to_a_fan_in_of_16_and_narrower_beyond() -> None:
    bnn = ps.BayesianModule(network())
    trace = pyro.poutine.trace(bnn).get_trace(torch.randn(2, 3, 3, 3))
    for name, fan_in in FAN_IN.items():
        prior = trace.nodes[name]["fn"]
        expected = dist.Normal(0.0, min(1.0, 4 / math.sqrt(fan_in))).expand(prior.event_shape).to_event()
        value = torch.randn(prior.event_shape)
        torch.testing.assert_close(prior.log_prob(value), expected.log_prob(value))


def test_the_default_law_climbs_from_a_sample() -> None:
    assert ps.SAM_ELBO().perturbation == ps.AscendedSample(1.0)


@pytest.mark.parametrize("largest", [0.0, -1.0, math.nan, "wide"])
def test_a_bound_on_the_prior_is_positive(largest: float) -> None:
    with pytest.raises(ValueError, match="largest"):
        ps.nn.fan_in_normal(2.0, largest=largest)


def test_everything_at_its_default_beats_chance_on_digits() -> None:
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    x, y, x_test, y_test = x[:1000] / 16, y[:1000], x[1000:] / 16, y[1000:]
    bnn = ps.BayesianModule(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        logits = bnn(x)
        with pyro.plate("data", 1000 if y is not None else len(x), subsample_size=len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    guide = ps.MeanFieldNormal(model)
    svi = SVI(model, guide, ps.optim.JointOptim(torch.optim.Adam, {"lr": 1e-2}), loss=ps.SAM_ELBO())
    for _ in range(10):
        for rows in torch.randperm(1000).split(100):
            svi.step(x[rows], y[rows])
    prediction = ps.predict(model, guide, x_test, num_samples=8)
    assert -prediction.log_prob(y_test).mean() < 1.0  # chance is log(10) = 2.3
    assert (prediction.probs.argmax(-1) == y_test).double().mean() > 0.75
