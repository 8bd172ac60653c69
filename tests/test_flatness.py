"""Flatness of quadratic losses in closed form, and of a small net against its explicit Hessian."""

import sys
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Quadratic
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.func import functional_call

import pyro_sam as ps
from pyro_sam import flatness


@pytest.fixture
def problem() -> Quadratic:
    return Quadratic.random(5)


@pytest.fixture
def net_case() -> tuple[Any, Any, Tensor, Tensor, Any]:
    """A net, and its loss as a plain function of all weights, flat."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    bnn = ps.BayesianModule(net)
    x, y = torch.randn(8, 2), torch.randint(2, (8,))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", 40, subsample_size=len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    guide = ps.MeanFieldNormal(model, init_scale=lambda site: 0.1 + torch.rand(site["fn"].event_shape))
    guide.initialize(x, y)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    center = torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    def loss(v: Tensor) -> Tensor:
        parts = (center + v).split([shape.numel() for shape in shapes.values()])
        weights = {n: part.reshape(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}
        return 40 / 8 * nn.functional.cross_entropy(functional_call(net, weights, x), y, reduction="sum")

    return model, guide, x, y, loss


def scales_of(guide: Any) -> Tensor:
    return torch.cat([guide._get_loc_and_scale(name)[1].detach().reshape(-1) for name in guide._event_dims])


def hessian_of(loss: Any, d: int) -> Tensor:
    return torch.autograd.functional.hessian(loss, torch.zeros(d))


def test_eigenvalues_are_those_of_the_explicit_hessian(net_case: Any) -> None:
    model, guide, x, y, loss = net_case
    scale = scales_of(guide)
    hessian = hessian_of(loss, len(scale))
    exact = torch.linalg.eigvalsh(hessian).flip(0)
    found = flatness.hessian_eigenvalues(model, guide, x, y, num_eigenvalues=3, tol=0)
    torch.testing.assert_close(found, exact[:3], rtol=1e-8, atol=0)
    in_noise = torch.linalg.eigvalsh(scale[:, None] * hessian * scale).flip(0)
    found = flatness.hessian_eigenvalues(model, guide, x, y, num_eigenvalues=3, tol=0, space="noise")
    torch.testing.assert_close(found, in_noise[:3], rtol=1e-8, atol=0)
    rough = flatness.hessian_eigenvalues(model, guide, x, y)
    torch.testing.assert_close(rough, exact[:1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("space", ["weight", "noise"])
def test_trace_is_that_of_the_explicit_hessian(net_case: Any, space: Any) -> None:
    model, guide, x, y, loss = net_case
    scale = scales_of(guide) if space == "noise" else torch.ones(17)
    hessian = scale[:, None] * hessian_of(loss, 17) * scale
    found = flatness.hessian_trace(model, guide, x, y, num_probes=400, space=space)
    spread = (2 * (hessian.square().sum() - hessian.diag().square().sum()) / 400).sqrt()
    assert abs(found - hessian.trace()) < 4 * spread


def test_trace_of_a_diagonal_hessian_has_no_error() -> None:
    problem = Quadratic(torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3), torch.zeros(3), torch.ones(3))
    assert flatness.hessian_trace(problem.model(), problem.guide(), num_probes=1) == pytest.approx(7.0)


def worst_rise(H: Tensor, g: Tensor, rho: float) -> float:
    """Return the maximum of g·v + ½ v·Hv on a ball, by the trust region's secular equation, H positive definite."""
    values, vectors = np.linalg.eigh(H.numpy())
    coefficients = vectors.T @ g.numpy()

    def off(shift: float) -> float:
        return float(np.linalg.norm(coefficients / (shift - values)) - rho)

    shift = brentq(off, values[-1] + 1e-9, values[-1] + 1e9, xtol=1e-13)
    v = coefficients / (shift - values)
    return float(coefficients @ v + 0.5 * values @ v**2)


@pytest.mark.parametrize("rho", [0.1, 1.0, 5.0])
def test_sharpness_of_a_quadratic_is_the_trust_regions_maximum(problem: Quadratic, rho: float) -> None:
    gradient = problem.gradient(problem.loc)
    found = flatness.sharpness(problem.model(), problem.guide(), rho=rho, num_steps=60)
    assert found == pytest.approx(worst_rise(problem.H, gradient, rho), rel=1e-3)
    H, u = problem.scale[:, None] * problem.H * problem.scale, problem.scale * gradient
    found = flatness.sharpness(problem.model(), problem.guide(), rho=rho, num_steps=60, space="noise")
    assert found == pytest.approx(worst_rise(H, u, rho), rel=1e-3)


def test_sharpness_at_a_minimum_is_half_the_top_eigenvalue(problem: Quadratic) -> None:
    at_minimum = Quadratic(problem.H, problem.m, problem.m, problem.scale)
    top = flatness.hessian_eigenvalues(at_minimum.model(), at_minimum.guide(), tol=0)
    found = flatness.sharpness(at_minimum.model(), at_minimum.guide(), rho=0.3, num_steps=100)
    assert found == pytest.approx(0.5 * 0.09 * float(top), rel=1e-3)


def test_sharpness_of_a_concave_loss_stops_at_its_top() -> None:
    hill = Quadratic(-torch.eye(3), torch.full((3,), 0.1), torch.zeros(3), torch.ones(3))
    found = flatness.sharpness(hill.model(), hill.guide(), rho=1.0, num_steps=200)
    assert found == pytest.approx(0.5 * 0.03, rel=1e-3)
    top = Quadratic(-torch.eye(3), torch.zeros(3), torch.zeros(3), torch.ones(3))
    assert flatness.sharpness(top.model(), top.guide(), rho=1.0) == 0.0


def test_average_sharpness_of_a_quadratic_is_its_mean_curvature(problem: Quadratic) -> None:
    rho, n = 0.7, 2000
    found = flatness.average_sharpness(problem.model(), problem.guide(), rho=rho, num_directions=n)
    directions = torch.randn(10_000, 5)
    rises = 0.5 * rho**2 * torch.einsum("ni,ij,nj->n", directions, problem.H, directions) / (directions**2).sum(-1)
    assert abs(found - 0.5 * rho**2 * problem.H.trace() / 5) < 4 * rises.std() / n**0.5


def test_a_linear_loss_is_flat_on_average_and_rises_by_its_slope() -> None:
    slope = torch.tensor([3.0, 4.0])

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("loss", -(slope * w).sum(-1))

    guide = ps.MeanFieldNormal(model).initialize()
    assert flatness.sharpness(model, guide, rho=2.0) == pytest.approx(10.0)
    assert flatness.sharpness(model, guide, rho=0.0) == 0.0
    assert flatness.average_sharpness(model, guide, rho=2.0) == pytest.approx(0.0, abs=1e-12)
    assert flatness.hessian_trace(model, guide) == 0.0
    assert flatness.hessian_eigenvalues(model, guide).tolist() == [0.0]


def test_constrained_latents_are_displaced_where_they_are_unconstrained() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.LogNormal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.factor("loss", -(w.log() ** 2) - 3 * v**2)

    for guide in (ps.MeanFieldNormal(model), AutoNormal(model)):
        guide()
        assert float(flatness.hessian_eigenvalues(model, guide, tol=0)) == pytest.approx(6.0)
        assert flatness.hessian_trace(model, guide, num_probes=1) == pytest.approx(8.0)


def test_discrete_latents_are_summed_out() -> None:
    @pyro.infer.config_enumerate
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("obs", dist.Normal(w[z], 1.0), obs=x)

    x = torch.randn(6)
    guide = ps.MeanFieldNormal(model).initialize(x)
    center = guide.median(x)["w"].detach()

    def loss(v: Tensor) -> Tensor:
        terms = dist.Normal(center + v, 1.0).log_prob(x[:, None]) + torch.tensor([0.3, 0.7]).log()
        return -terms.logsumexp(-1).sum()

    exact = torch.linalg.eigvalsh(hessian_of(loss, 2))[-1:]
    torch.testing.assert_close(flatness.hessian_eigenvalues(model, guide, x, tol=0), exact)


def test_a_full_covariance_works_in_noise_space() -> None:
    problem = Quadratic.random(3)
    guide = AutoMultivariateNormal(problem.model(), init_scale=0.5)
    guide()
    hessian = guide.get_posterior().scale_tril.detach()
    exact = (hessian.T @ problem.H @ hessian).trace()
    found = flatness.hessian_trace(problem.model(), guide, num_probes=2000, space="noise")
    assert found == pytest.approx(float(exact), rel=0.1)


def test_nothing_is_changed() -> None:
    net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    bnn = ps.BayesianModule(net)

    def model(x: Tensor, y: Tensor) -> None:
        mean = bnn(x[:, None]).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    x = torch.randn(6)
    guide = ps.MeanFieldNormal(model).initialize(x, x)
    before = {name: t.clone() for name, t in [*net.named_buffers(), *guide.named_parameters()]}
    # one mask of the dropout for all passes: the same number twice
    first = flatness.sharpness(model, guide, x, x, rho=0.0)
    assert first == 0.0
    flatness.hessian_trace(model, guide, x, x, num_probes=2)
    flatness.average_sharpness(model, guide, x, x, num_directions=2)
    for name, t in [*net.named_buffers(), *guide.named_parameters()]:
        assert torch.equal(t, before[name])
        assert t.grad is None


@pytest.mark.parametrize("name", ["sharpness", "average_sharpness", "hessian_eigenvalues", "hessian_trace"])
def test_bad_arguments_are_refused(problem: Quadratic, name: str) -> None:
    function, model = getattr(flatness, name), problem.model()
    with pytest.raises(ValueError, match=r"space must be one of weight, noise, got space='weights'"):
        function(model, problem.guide(), space="weights")
    delta = AutoDelta(model)
    delta()
    with pytest.raises(ValueError, match="guide must have a Gaussian site to move around in, got none"):
        function(model, delta)
    with pytest.raises(ValueError, match="guide MeanFieldNormal has no parameters yet"):
        function(model, ps.MeanFieldNormal(model))
    full = AutoMultivariateNormal(model)
    full()
    with pytest.raises(ValueError, match=r"space='weight' needs diagonal Normal sites .* Use space='noise'"):
        function(model, full)


def test_half_precision_and_missing_rows_are_refused() -> None:
    bnn = ps.BayesianModule(nn.Linear(2, 2).to(torch.bfloat16))
    weight: Any = bnn.net.weight

    def model(x: Tensor, y: Tensor) -> None:
        logits = bnn(x.to(weight.dtype))
        with pyro.plate("data", 40, subsample_size=len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    x, y = torch.randn(8, 2), torch.randint(2, (8,))
    guide = ps.MeanFieldNormal(model).initialize(x, y)
    with pytest.raises(ValueError, match=r"lost in half precision.* guide.float\(\) and bnn.float\(\)"):
        flatness.sharpness(model, guide, x, y)
    bnn.float()
    guide.float()
    assert flatness.sharpness(model, guide, x, y) > 0
    with pytest.raises(ValueError, match="The batch is empty"):
        flatness.sharpness(model, guide, x[:0], y[:0])


def test_bad_numbers_are_refused(problem: Quadratic) -> None:
    pair = problem.model(), problem.guide()
    with pytest.raises(ValueError, match="rho must be non-negative, got rho=-1"):
        flatness.sharpness(*pair, rho=-1)
    with pytest.raises(ValueError, match="num_steps must be a whole number of at least 1"):
        flatness.sharpness(*pair, num_steps=0)
    with pytest.raises(ValueError, match="num_directions must be a whole number of at least 1"):
        flatness.average_sharpness(*pair, num_directions=0)
    with pytest.raises(ValueError, match="num_probes must be a whole number of at least 1"):
        flatness.hessian_trace(*pair, num_probes=0)
    with pytest.raises(ValueError, match="num_eigenvalues must be less than the number of latent scalars, 5, got 5"):
        flatness.hessian_eigenvalues(*pair, num_eigenvalues=5)
    with pytest.raises(ValueError, match="tol must be non-negative"):
        flatness.hessian_eigenvalues(*pair, tol=-1.0)


def test_without_scipy_the_eigenvalues_say_what_to_install(problem: Quadratic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r'pip install "pyro-sam\[flatness\]"'):
        flatness.hessian_eigenvalues(problem.model(), problem.guide())
