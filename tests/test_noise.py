"""Which sites are Gaussian, and that placed noise is torch's own sample for the same random numbers."""

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.transforms import AbsTransform, ExpTransform, StickBreakingTransform

from pyro_sam._step.sites import is_discrete, noise_shape, place, standard_normal, why_not_gaussian

LOC, SCALE = torch.tensor([[0.1, -2.0, 3.0]]).double(), torch.tensor([[0.5], [2.0]]).double()
TRIL = torch.tensor([[1.0, 0.0], [-0.7, 0.3]]).double()

GAUSSIANS = {
    "Normal": lambda: dist.Normal(LOC, SCALE),
    "torch's Normal": lambda: torch.distributions.Normal(LOC, SCALE),
    "Independent": lambda: dist.Normal(LOC, SCALE).to_event(1),
    "MultivariateNormal": lambda: dist.MultivariateNormal(LOC[:, :2], scale_tril=TRIL).expand([4, 1]),
    "by covariance": lambda: dist.MultivariateNormal(LOC[0, :2], covariance_matrix=TRIL @ TRIL.T),
    "LowRank": lambda: dist.LowRankMultivariateNormal(LOC, torch.ones(3, 2), SCALE[0].expand(3)).expand([5]),
    "Masked": lambda: MaskedDistribution(dist.Normal(LOC, SCALE), torch.tensor([True, False, True])),
    "Expanded": lambda: ExpandedDistribution(dist.Normal(LOC, SCALE), torch.Size([4, 2, 3])),
    "LogNormal": lambda: dist.LogNormal(LOC, SCALE),
    "simplex": lambda: dist.TransformedDistribution(dist.Normal(LOC, SCALE).to_event(1), [StickBreakingTransform()]),
    "all at once": lambda: MaskedDistribution(
        dist.TransformedDistribution(dist.Normal(LOC, SCALE).to_event(1).expand([4, 2]), [ExpTransform()]), True
    ),
}


@pytest.mark.parametrize("name", GAUSSIANS)
def test_placed_noise_is_the_sample_of_the_same_random_numbers(name: str) -> None:
    fn = GAUSSIANS[name]()
    assert why_not_gaussian(fn) is None
    torch.manual_seed(3)
    expected = fn.rsample()
    torch.manual_seed(3)
    value, site = place(fn, standard_normal)
    assert value.shape == fn.batch_shape + fn.event_shape
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-14)
    assert site.noise.shape == noise_shape(site.core)
    torch.testing.assert_close(site.sample, site.loc + site.displacement)
    if site.scale is not None:
        torch.testing.assert_close(site.displacement, site.scale * site.noise)


@pytest.mark.parametrize("name", GAUSSIANS)
def test_noise_groups_are_the_batch_elements(name: str) -> None:
    fn = GAUSSIANS[name]()
    _, site = place(fn, standard_normal)
    assert site.group_size * math.prod(fn.batch_shape) == site.noise.numel()


def test_covariance_of_the_placed_noise() -> None:
    W, D = torch.tensor([[1.0], [2.0]]), torch.tensor([0.3, 0.5])
    for fn in (
        dist.MultivariateNormal(torch.zeros(2), scale_tril=TRIL),
        dist.LowRankMultivariateNormal(torch.zeros(2), W, D),
    ):
        size = noise_shape(fn)[-1]
        # the linear map, column by column
        columns = [place(fn, lambda core, e=e: e)[1].displacement for e in torch.eye(size)]
        A = torch.stack(columns, -1)
        torch.testing.assert_close(A @ A.T, fn.covariance_matrix)


@pytest.mark.parametrize("name", ["Normal", "MultivariateNormal", "LowRank", "LogNormal"])
def test_detached_scale_keeps_the_gradient_to_loc_alone(name: str) -> None:
    loc = torch.zeros(3, requires_grad=True)
    scale = torch.ones(3, requires_grad=True)
    fn: Any = {
        "Normal": lambda: dist.Normal(loc, scale),
        "MultivariateNormal": lambda: dist.MultivariateNormal(loc, scale_tril=torch.diag(scale), validate_args=False),
        "LowRank": lambda: dist.LowRankMultivariateNormal(loc, scale[:, None], scale),
        "LogNormal": lambda: dist.LogNormal(loc, scale),
    }[name]()
    value, site = place(fn, standard_normal, detach_scale=True)
    in_loc, in_scale = torch.autograd.grad(value.sum(), [loc, scale], allow_unused=True, retain_graph=True)
    assert in_loc.abs().sum() > 0
    assert in_scale is None
    (in_scale,) = torch.autograd.grad(site.displacement.sum(), [scale])
    assert in_scale.abs().sum() > 0
    torch.testing.assert_close(value, place(fn, lambda core: site.noise)[0])


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (dist.Delta(torch.tensor(0.0)), "Delta is no reparameterised Gaussian"),
        (dist.Delta(torch.zeros(3)).to_event(1), "Delta is no reparameterised Gaussian"),
        (dist.Gamma(1.0, 1.0), "Gamma is no reparameterised Gaussian"),
        (NonreparameterizedNormal(0.0, 1.0), "NonreparameterizedNormal is no reparameterised Gaussian"),
        (dist.OMTMultivariateNormal(torch.zeros(2), torch.eye(2)), "OMTMultivariateNormal is no reparameterised"),
        (dist.TransformedDistribution(dist.Gamma(1.0, 1.0), [ExpTransform()]), "Gamma is no reparameterised"),
        (dist.HalfNormal(torch.tensor(1.0)), "HalfNormal folds the real line"),
        (dist.TransformedDistribution(dist.Normal(0.0, 1.0), [AbsTransform()]), "folds the real line"),
    ],
)
def test_other_sites_do_not_qualify_and_say_why(fn: Any, reason: str) -> None:
    assert reason in str(why_not_gaussian(fn))


def test_discrete_supports() -> None:
    assert is_discrete(dist.Categorical(torch.ones(3)))
    assert is_discrete(dist.Poisson(torch.ones(3)).to_event(1))
    assert not is_discrete(dist.Normal(0.0, 1.0))
    assert not is_discrete(dist.Dirichlet(torch.ones(3)))
