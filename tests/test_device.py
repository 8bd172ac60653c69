"""No tensor on the wrong device and no wait for the device inside a step: shown on torch's meta device."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import nn

import pyro_sam as ps

LAWS = [
    ps.Mean(),
    ps.Gaussian(),
    ps.Adversarial(),
    ps.Adversarial(ord=float("inf"), steps=2),
    ps.Adversarial(0.1, geometry="euclidean", steps=2),
    ps.Adversarial(0.1, geometry="adaptive"),
    ps.Adversarial(0.1, geometry="fisher"),
    ps.MixSAM(),
    ps.AscendedSample(),
    ps.Mixture([ps.Gaussian(), ps.MixSAM(), ps.Mean()], [0.3, 0.3, 0.4]),
]


def network(device: str, dtype: torch.dtype) -> tuple[Any, torch.Tensor, torch.Tensor]:
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(108, 4)]
    bnn = ps.BayesianModule(nn.Sequential(*layers).to(device, dtype), prior=ps.nn.fan_in_normal())

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        logits = bnn(x)
        with pyro.plate("data", 1000, subsample_size=len(x), device=x.device):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    x = torch.zeros(5, 1, 8, 8, device=device, dtype=dtype)
    return model, x, torch.zeros(5, device=device, dtype=torch.long)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_whole_step_on_the_meta_device(law: ps.Perturbation, dtype: torch.dtype) -> None:
    # torch's own checks of values would have to read them
    with pyro.validation_enabled(False):
        model, x, y = network("meta", dtype)
        guide = ps.MeanFieldNormal(model, init_scale=0.05).initialize(x, y)
        module = ps.SAM_ELBO(law)(model, guide)
        optimizer = torch.optim.Adam(guide.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            loss = module(x, y)
            assert (loss.device.type, loss.dtype) == ("meta", dtype)
            loss.backward()
            optimizer.step()
    for name, parameter in guide.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.device.type, parameter.grad.dtype) == ("meta", dtype)


@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, ps.MeanFieldNormal])
@pytest.mark.parametrize("law", [ps.Mean(), ps.Adversarial(), ps.MixSAM()], ids=repr)
@pytest.mark.parametrize("scope", ["global", "event"])
def test_other_guides_and_scopes_on_the_meta_device(make: Any, law: ps.Perturbation, scope: Any) -> None:
    def model(x: torch.Tensor) -> None:
        zero = x.new_zeros(())
        w = pyro.sample("w", dist.Normal(zero, zero + 1).expand([3]).to_event(1))
        s = pyro.sample("s", dist.LogNormal(zero, zero + 1))
        with pyro.plate("data", len(x), device=x.device):
            pyro.sample("obs", dist.Normal((w * x).sum(-1), s), obs=x[:, 0])

    x = torch.zeros(7, 3, device="meta")
    with pyro.validation_enabled(False):
        guide = make(model, init_loc_fn=lambda site: torch.ones_like(site["fn"].sample()))
        guide(x)
        elbo = ps.SAM_ELBO(law, scope=scope, num_particles=3, vectorize_particles=True, max_plate_nesting=1)
        loss = elbo.differentiable_loss(model, guide, x)
    assert loss.device.type == "meta"
    loss.backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_whole_step_on_cuda(law: ps.Perturbation) -> None:
    model, x, y = network("cuda", torch.float32)
    guide = ps.MeanFieldNormal(model, init_scale=0.05).initialize(x, y)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ps.SAM_ELBO(law))
    losses = [svi.step(x, y) for _ in range(5)]
    assert all(torch.isfinite(torch.tensor(losses)))
