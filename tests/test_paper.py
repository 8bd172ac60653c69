"""The paper's algorithms, written out as formulas: constant scale r / sqrt(d), one step of SGD under Pyro's SVI."""

import math
from typing import Any

import pyro
import pytest
import torch
from oracles import Quadratic
from pyro.infer import SVI
from pyro.optim import SGD

import pyro_sam as ps

LR, RADIUS = 0.05, 0.3


def problem_of_constant_scale(d: int = 6) -> Quadratic:
    problem = Quadratic.random(d)
    problem.scale = torch.full((d,), RADIUS / math.sqrt(d))
    return problem


def mean_after_one_step(problem: Quadratic, law: ps.Perturbation, **settings: Any) -> torch.Tensor:
    pyro.clear_param_store()
    guide = ps.MeanFieldNormal(
        problem.model(),
        init_loc_fn=lambda site: problem.loc.clone(),
        init_scale=lambda site: problem.scale,
        learn_scale=False,
    ).initialize()
    svi = SVI(problem.model(), guide, SGD({"lr": LR}), ps.SAM_ELBO(law, kl_weight=0.0, **settings))
    pyro.set_rng_seed(11)
    svi.step()
    return guide.median()["w"]


def noise_of_the_step(d: int = 6) -> torch.Tensor:
    pyro.set_rng_seed(11)
    return torch.randn(d)


def test_sam() -> None:
    problem = problem_of_constant_scale()
    g = problem.gradient(problem.loc)
    expected = problem.loc - LR * problem.gradient(problem.loc + RADIUS * g / g.norm())
    # its literal drop-in form, and as the euclidean ball of the same radius
    for law in (ps.Adversarial(rho=None), ps.Adversarial(RADIUS, geometry="euclidean"), ps.MixSAM(kappa=0.0)):
        torch.testing.assert_close(mean_after_one_step(problem, law), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rho", [0.1, 2.0])
def test_constant_scale_is_sam_with_radius_rho_times_scale(rho: float) -> None:
    problem = Quadratic.random()
    problem.scale = torch.full((5,), 0.2)
    g = problem.gradient(problem.loc)
    expected = problem.loc - LR * problem.gradient(problem.loc + rho * 0.2 * g / g.norm())
    torch.testing.assert_close(mean_after_one_step(problem, ps.Adversarial(rho)), expected, rtol=1e-13, atol=1e-13)


def test_random_sam() -> None:
    problem = problem_of_constant_scale()
    z = noise_of_the_step()
    expected = problem.loc - LR * problem.gradient(problem.loc + RADIUS / math.sqrt(6) * z)
    torch.testing.assert_close(mean_after_one_step(problem, ps.Gaussian()), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kappa", [0.2, 1.0, 5.0])
def test_mix_sam(kappa: float) -> None:
    problem = problem_of_constant_scale()
    z, g = noise_of_the_step(), problem.gradient(problem.loc)
    v = math.sqrt(6) * g / g.norm() + kappa * z
    expected = problem.loc - LR * problem.gradient(problem.loc + RADIUS * v / v.norm())
    torch.testing.assert_close(mean_after_one_step(problem, ps.MixSAM(kappa=kappa)), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale_gradient", ["perturbed", "mean"])
@pytest.mark.parametrize("rho", [1.0, None])
def test_variational_sam(scale_gradient: Any, rho: float | None) -> None:
    problem = Quadratic.random(6)
    radius = math.sqrt(6) if rho is None else rho
    g, s = problem.gradient(problem.loc), problem.scale
    e = radius * s * g / (s * g).norm()
    g_there = problem.gradient(problem.loc + radius * s**2 * g / (s * g).norm())
    scale_slope = (g_there if scale_gradient == "perturbed" else g) * e
    kl_loc, kl_scale = problem.loc, s - 1 / s

    guide = ps.MeanFieldNormal(
        problem.model(), init_loc_fn=lambda site: problem.loc.clone(), init_scale=lambda site: s
    ).initialize()
    unconstrained = {name: p.detach().clone() for name, p in guide.named_parameters()}["scales.w_unconstrained"]
    elbo = ps.SAM_ELBO(ps.Adversarial(rho), kl_weight=0.5, scale_gradient=scale_gradient)
    SVI(problem.model(), guide, SGD({"lr": LR}), elbo).step()

    torch.testing.assert_close(guide.median()["w"], problem.loc - LR * (g_there + 0.5 * kl_loc), rtol=1e-12, atol=1e-12)
    moved = dict(guide.named_parameters())["scales.w_unconstrained"].detach()
    # the gradient through softplus, which makes the scale positive
    expected = unconstrained - LR * (scale_slope + 0.5 * kl_scale) * unconstrained.sigmoid()
    torch.testing.assert_close(moved, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_many_steps_follow_a_hand_written_sam_loop(momentum: float) -> None:
    problem = problem_of_constant_scale()
    guide = ps.MeanFieldNormal(
        problem.model(),
        init_loc_fn=lambda site: problem.loc.clone(),
        init_scale=lambda site: problem.scale,
        learn_scale=False,
    ).initialize()
    optimizer = SGD({"lr": LR, "momentum": momentum})
    svi = SVI(problem.model(), guide, optimizer, ps.SAM_ELBO(ps.Adversarial(None), kl_weight=0.0))
    w = problem.loc.clone().requires_grad_()
    by_hand = torch.optim.SGD([w], lr=LR, momentum=momentum)
    for _ in range(30):
        svi.step()
        g = problem.gradient(w.detach())
        w.grad = problem.gradient(w.detach() + RADIUS * g / g.norm())
        by_hand.step()
    torch.testing.assert_close(guide.median()["w"], w.detach(), rtol=1e-9, atol=1e-9)
