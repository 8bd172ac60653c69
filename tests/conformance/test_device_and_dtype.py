"""In single and double precision, on the device of ``--device``: the numbers of the CPU in double precision."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gradients_of
from pair_models import X, Y
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal, init_to_mean

import pyro_sam as ps

MAKERS = [ps.MeanFieldNormal, AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def on(device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    x, y = X.to(device, dtype), Y.to(device, dtype)
    zero, one = torch.zeros((), device=device, dtype=dtype), torch.ones((), device=device, dtype=dtype)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(zero, one).expand([3]).to_event(1))
        sigma = pyro.sample("sigma", dist.LogNormal(zero, one))
        with pyro.plate("data", 12, device=device):
            pyro.sample("obs", dist.Normal((x * w).sum(-1), sigma), obs=y)

    return model


def step(elbo: Any, make: Any, device: torch.device, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    model = on(device, dtype)
    guide = make(model, init_loc_fn=init_to_mean)
    guide()
    for parameter in guide.parameters():
        shift = 0.2 * torch.cos(torch.arange(float(parameter.numel()), dtype=dtype))
        parameter.data += shift.reshape(parameter.shape).to(device)
    pyro.set_rng_seed(1)
    return gradients_of(elbo, model, guide)


@dtypes
@pytest.mark.parametrize("make", MAKERS)
def test_adversary_is_that_of_the_cpu_in_double_precision(make: Any, device: torch.device, dtype: torch.dtype) -> None:
    elbo = ps.SAM_ELBO(ps.Adversarial(0.5), kl_weight=0.0)
    loss, gradients = step(elbo, make, device, dtype)
    exact_loss, exact = step(elbo, make, torch.device("cpu"), torch.float64)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert loss == pytest.approx(exact_loss, rel=tolerance)
    for name, gradient in exact.items():
        assert (gradients[name].device.type, gradients[name].dtype) == (device.type, dtype)
        torch.testing.assert_close(gradients[name].cpu().double(), gradient, rtol=10 * tolerance, atol=100 * tolerance)


@dtypes
@pytest.mark.parametrize("make", MAKERS)
def test_gaussian_law_is_pyros_estimator(make: Any, device: torch.device, dtype: torch.dtype) -> None:
    reference = TraceMeanField_ELBO if make is ps.MeanFieldNormal else Trace_ELBO
    loss, gradients = step(ps.SAM_ELBO(ps.Gaussian()), make, device, dtype)
    expected_loss, expected = step(reference(), make, device, dtype)
    assert loss == pytest.approx(expected_loss, rel=1e-5 if dtype == torch.float32 else 1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-4)
