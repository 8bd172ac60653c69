r"""Conjugate models: every law's expected gradient in closed form, and the Gaussian law's way to the exact posterior.

With Gaussian data of precision ``H`` and mean ``m`` the data term is ``½ H (w - m)²``. At ``w = loc + scale e`` its
gradients are ``H (δ + scale e)`` in loc and ``H (δ + scale e) e`` in scale, ``δ = loc - m``: they need E[e] and E[e²].
"""

from collections.abc import Callable
from itertools import combinations
from math import inf
from statistics import NormalDist
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gradients_of
from pair_models import X, Y
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

import pyro_sam as ps

UNIT = NormalDist()
PRIOR_SCALE, NOISE = 2.0, 1.5
LOC, SCALE = 0.4, 0.6

Moments = Callable[[float], tuple[float, float]]


def adversarial(rho: float, distance: float) -> tuple[float, float]:
    return rho * np.sign(distance), rho**2


def mixed(rho: float, kappa: float, distance: float) -> tuple[float, float]:
    """``e = rho sign(û + kappa z)``."""
    return rho * np.sign(distance) * (2 * UNIT.cdf(1 / kappa) - 1), rho**2


def ascended(alpha: float, distance: float) -> tuple[float, float]:
    """``e = z + alpha sign(δ + scale z)``, for ``distance = δ / scale``."""
    return alpha * (2 * UNIT.cdf(distance) - 1), 1 + alpha**2 + 4 * alpha * UNIT.pdf(distance)


def tossed(prob: float, first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    return prob * first[0] + (1 - prob) * second[0], prob * first[1] + (1 - prob) * second[1]


# law, and E[e] and E[e²] given the guide's distance from the data in its own standard deviations
LAWS: list[tuple[ps.Perturbation, Moments]] = [
    (ps.Mean(), lambda distance: (0.0, 0.0)),
    (ps.Gaussian(), lambda distance: (0.0, 1.0)),
    (ps.Adversarial(0.7), lambda distance: adversarial(0.7, distance)),
    (ps.Adversarial(0.7, ord=inf), lambda distance: adversarial(0.7, distance)),
    (ps.Adversarial(0.3, steps=3), lambda distance: adversarial(0.3, distance)),
    (ps.Adversarial(0.3, geometry="euclidean"), lambda distance: adversarial(0.3 / SCALE, distance)),
    (
        ps.Adversarial(0.3, geometry="adaptive", eta=0.1),
        lambda distance: adversarial(0.3 * (LOC + 0.1) / SCALE, distance),
    ),
    (ps.MixSAM(0.8, kappa=1.5), lambda distance: mixed(0.8, 1.5, distance)),
    (ps.MixSAM(kappa=0.5), lambda distance: mixed(1.0, 0.5, distance)),
    (ps.AscendedSample(0.7), lambda distance: ascended(0.7, distance)),
    (ps.AscendedSample(-0.4), lambda distance: ascended(-0.4, distance)),
]
coin = ps.Mixture([ps.Gaussian(), ps.Adversarial(0.7)], [0.3, 0.7])
LAWS.append((coin, lambda distance: tossed(0.3, (0.0, 1.0), adversarial(0.7, distance))))


def name_of(value: Any) -> str:
    return "moments" if callable(value) else repr(value)  # no address: processes that share the suite must agree


def guide() -> None:
    pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(LOC)), pyro.param("scale", torch.tensor(SCALE))))


def normal_normal(y: Tensor, subsample_size: int | None = None) -> Callable[[], None]:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, PRIOR_SCALE))
        with pyro.plate("data", len(y), subsample_size=subsample_size) as rows:
            pyro.sample("obs", dist.Normal(w, NOISE), obs=y[rows])

    return model


def expected(moments: Moments, y: Tensor, kl_weight: float) -> np.ndarray:
    precision, difference = len(y) / NOISE**2, LOC - float(y.mean())
    first, second = moments(difference / SCALE)
    in_loc = precision * (difference + SCALE * first)
    in_scale = precision * (difference * first + SCALE * second)
    kl_in_loc, kl_in_scale = LOC / PRIOR_SCALE**2, SCALE / PRIOR_SCALE**2 - 1 / SCALE
    return np.array([in_loc + kl_weight * kl_in_loc, in_scale + kl_weight * kl_in_scale])


def assert_mean(samples: list[Any], exact: Any) -> None:
    means = torch.as_tensor(np.array(samples))
    error = means.std(0) / len(samples) ** 0.5
    assert ((means.mean(0) - torch.as_tensor(exact)).abs() <= 4 * error + 1e-9).all()


def gradients(elbo: Any, model: Any, guide: Any, *names: str) -> Any:
    found = gradients_of(elbo, model, guide)[1]
    return torch.stack([found[name] for name in names]).numpy()


@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize(("law", "moments"), LAWS, ids=name_of)
def test_expected_gradient_of_normal_normal(law: ps.Perturbation, moments: Moments, count: int) -> None:
    model = normal_normal(Y[:count] + 0.1)
    elbo = ps.SAM_ELBO(law, kl_weight=0.7, num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
    samples = [gradients(elbo, model, guide, "loc", "scale") for _ in range(50)]
    assert_mean(samples, expected(moments, Y[:count] + 0.1, 0.7))


@pytest.mark.parametrize(("law", "moments"), [LAWS[1], LAWS[2], LAWS[7], LAWS[9], LAWS[-1]], ids=name_of)
def test_expected_gradient_under_subsampling(law: ps.Perturbation, moments: Moments) -> None:
    y = Y[:6]
    # a batch of 3, weighted by 2, is as good as 6 data points at the batch's mean
    batches = [y[list(rows)].mean().expand(6) for rows in combinations(range(6), 3)]
    exact = np.mean([expected(moments, batch, 1.0) for batch in batches], 0)
    elbo = ps.SAM_ELBO(law, num_particles=25, vectorize_particles=True, max_plate_nesting=1)
    samples = [gradients(elbo, normal_normal(y, 3), guide, "loc", "scale") for _ in range(2000)]
    assert_mean(samples, exact)


# Bayesian linear regression

PRECISION = X.T @ X / NOISE**2
DATA_MEAN = torch.linalg.solve(PRECISION, X.T @ Y / NOISE**2)
POSTERIOR_PRECISION = PRECISION + torch.eye(3) / PRIOR_SCALE**2
POSTERIOR_MEAN = torch.linalg.solve(POSTERIOR_PRECISION, X.T @ Y / NOISE**2)


def regression(subsample_size: int | None = None) -> Callable[[], None]:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, PRIOR_SCALE).expand([3]).to_event(1))
        with pyro.plate("data", 12, subsample_size=subsample_size) as rows:
            pyro.sample("obs", dist.Normal((X[rows] * w).sum(-1), NOISE), obs=Y[rows])

    return model


def vector_guide(loc: Tensor, scale: Tensor) -> Callable[[], None]:
    def guide() -> None:
        normal = dist.Normal(pyro.param("loc", loc.clone()), pyro.param("scale", scale.clone()))
        pyro.sample("w", normal.to_event(1))

    return guide


def unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    ("law", "noise"),
    [
        (ps.Gaussian(), lambda z, u: z),
        (ps.Adversarial(0.8), lambda z, u: 0.8 * unit(u(0 * z))),
        (ps.MixSAM(0.9, kappa=1.2), lambda z, u: 0.9 * unit(3**0.5 * unit(u(0 * z)) + 1.2 * z)),
        (ps.AscendedSample(0.6), lambda z, u: z + 0.6 * unit(u(z))),
    ],
    ids=name_of,
)
def test_expected_gradient_of_linear_regression(law: ps.Perturbation, noise: Any) -> None:
    loc, scale = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.4, 0.2, 0.6])
    nodes, weights = map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(40))
    z = torch.cartesian_prod(nodes, nodes, nodes)
    p = torch.cartesian_prod(weights, weights, weights).prod(-1) / (2 * torch.pi) ** 1.5

    def slope(e: Tensor) -> Tensor:
        return (loc + scale * e - DATA_MEAN) @ PRECISION

    e = noise(z, lambda e: scale * slope(e))
    in_loc = (p[:, None] * slope(e)).sum(0) + loc / PRIOR_SCALE**2
    in_scale = (p[:, None] * slope(e) * e).sum(0) + scale / PRIOR_SCALE**2 - 1 / scale
    elbo = ps.SAM_ELBO(law, num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
    samples = [gradients(elbo, regression(), vector_guide(loc, scale), "loc", "scale") for _ in range(50)]
    assert_mean(samples, torch.stack([in_loc, in_scale]).numpy())


@pytest.mark.parametrize("subsample_size", [None, 4])
def test_mean_field_optimum_has_no_expected_gradient(subsample_size: int | None) -> None:
    guide = vector_guide(POSTERIOR_MEAN, POSTERIOR_PRECISION.diagonal().rsqrt())
    elbo = ps.SAM_ELBO(ps.Gaussian(), num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    samples = [gradients(elbo, regression(subsample_size), guide, "loc", "scale") for _ in range(300)]
    assert_mean(samples, np.zeros((2, 3)))


def test_local_posteriors_have_no_expected_gradient_under_subsampling() -> None:
    precision = 1 + 1 / NOISE**2

    def model() -> None:
        with pyro.plate("data", 12, subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, NOISE), obs=Y[rows])

    def guide() -> None:
        loc = pyro.param("loc", Y / NOISE**2 / precision)
        scale = pyro.param("scale", torch.full((12,), precision**-0.5))
        with pyro.plate("data", 12, subsample_size=4) as rows:
            pyro.sample("z", dist.Normal(loc[rows], scale[rows]))

    elbo = ps.SAM_ELBO(ps.Gaussian(), num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    assert_mean([gradients(elbo, model, guide, "loc", "scale") for _ in range(300)], np.zeros((2, 12)))


def test_full_covariance_guide_converges_to_the_exact_posterior() -> None:
    guide = AutoMultivariateNormal(regression(), init_scale=0.3)
    elbo = ps.SAM_ELBO(ps.Gaussian(), num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    found = []
    for lr, steps in ((0.05, 200), (0.005, 200)):
        svi = SVI(regression(), guide, pyro.optim.Adam({"lr": lr}), elbo)
        for _ in range(steps):
            svi.step()
            tril = guide.scale[..., None].detach() * guide.scale_tril.detach()
            found.append((guide.loc.detach().clone(), tril @ tril.T))
    mean, covariance = (torch.stack(values[-100:]).mean(0) for values in zip(*found, strict=True))
    exact = torch.linalg.inv(POSTERIOR_PRECISION)
    spread = exact.diagonal().sqrt()
    torch.testing.assert_close((mean - POSTERIOR_MEAN) / spread, torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(
        covariance / spread / spread[:, None], exact / spread / spread[:, None], atol=0.03, rtol=0
    )


# Particles


@pytest.mark.parametrize("law", [ps.Gaussian(), ps.MixSAM(0.8), ps.AscendedSample(0.7), coin], ids=repr)
def test_particles_have_the_same_mean_one_by_one_and_vectorised(law: ps.Perturbation) -> None:
    loc, scale = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.4, 0.2, 0.6])
    means = []
    for settings, runs in (
        ({"num_particles": 4}, 250),
        ({"num_particles": 200, "vectorize_particles": True, "max_plate_nesting": 1}, 50),
    ):
        elbo = ps.SAM_ELBO(law, **settings)  # type: ignore[arg-type]
        samples = np.array(
            [gradients(elbo, regression(), vector_guide(loc, scale), "loc", "scale") for _ in range(runs)]
        )
        means.append((samples.mean(0), samples.std(0, ddof=1) / runs**0.5))
    (first, error), (second, other_error) = means
    assert (np.abs(first - second) <= 4 * np.hypot(error, other_error)).all()
