"""The laws against their closed forms, on a quadratic loss without Pyro."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Quadratic, QuadraticSpace

import pyro_sam as ps
from pyro_sam.perturbation import unit


def ascent_direction(problem: Quadratic) -> torch.Tensor:
    u = problem.scale * (problem.H @ (problem.loc - problem.m))
    return u / (u @ u).sqrt()


def test_mean_is_zero_and_costs_no_gradient() -> None:
    space = QuadraticSpace(Quadratic.random())
    assert torch.equal(ps.Mean().noise(space), torch.zeros(1, 5))
    assert space.calls == 0


def test_gaussian_is_the_draw() -> None:
    z = torch.randn(5)
    space = QuadraticSpace(Quadratic.random(), z)
    assert torch.equal(ps.Gaussian().noise(space)[0], z)
    assert space.calls == 0


@pytest.mark.parametrize("rho", [0.05, 1.0, 7.0])
def test_adversarial_is_rho_times_the_ascent_direction(rho: float) -> None:
    problem = Quadratic.random()
    space = QuadraticSpace(problem)
    torch.testing.assert_close(ps.Adversarial(rho).noise(space)[0], rho * ascent_direction(problem))
    assert space.calls == 1


def test_rho_none_is_the_length_of_gaussian_noise() -> None:
    problem = Quadratic.random(d=9)
    e = ps.Adversarial(rho=None).noise(QuadraticSpace(problem))
    torch.testing.assert_close(e[0], 3.0 * ascent_direction(problem))


def test_infinite_order_moves_every_coordinate_by_rho() -> None:
    problem = Quadratic.random()
    e = ps.Adversarial(0.7, ord=math.inf).noise(QuadraticSpace(problem))[0]
    assert torch.equal(e, 0.7 * ascent_direction(problem).sign())


def displacement(problem: Quadratic, geometry: Any, rho: float = 0.3, eta: float = 0.2) -> torch.Tensor:
    e = ps.Adversarial(rho, geometry=geometry, eta=eta).noise(QuadraticSpace(problem))[0]
    return problem.scale * e


def test_euclidean_geometry_is_sam() -> None:
    problem = Quadratic.random()
    g = problem.gradient(problem.loc)
    torch.testing.assert_close(displacement(problem, "euclidean"), 0.3 * g / g.norm())


def test_adaptive_geometry_is_asam() -> None:
    problem = Quadratic.random()
    g, T = problem.gradient(problem.loc), problem.loc.abs() + 0.2
    torch.testing.assert_close(displacement(problem, "adaptive"), 0.3 * T**2 * g / (T * g).norm())


def test_fisher_geometry_is_fisher_sam() -> None:
    problem = Quadratic.random()
    g = problem.gradient(problem.loc)
    f = 1 + 0.2 * g**2
    torch.testing.assert_close(displacement(problem, "fisher"), 0.3 * (g / f) / (g**2 / f).sum().sqrt())


@pytest.mark.parametrize("geometry", ["posterior", "euclidean", "adaptive", "fisher"])
def test_the_maximiser_beats_every_other_point_of_its_ball(geometry: Any) -> None:
    problem = Quadratic.random()
    g = problem.gradient(problem.loc)
    A = {
        "posterior": torch.ones(5),
        "euclidean": problem.scale,
        "adaptive": problem.scale / (problem.loc.abs() + 0.01),
        "fisher": problem.scale * (1 + 0.01 * g**2).sqrt(),
    }[geometry]
    e = ps.Adversarial(0.8, geometry=geometry).noise(QuadraticSpace(problem))[0]
    u = problem.u(torch.zeros(5))
    torch.testing.assert_close((A * e).norm(), torch.tensor(0.8))
    others = torch.randn(2000, 5)
    others = 0.8 * others / (A * others).norm(dim=-1, keepdim=True)
    assert (others @ u).max() <= u @ e


@pytest.mark.parametrize("geometry", ["posterior", "euclidean"])
def test_steps_are_projected_ascent(geometry: Any) -> None:
    problem = Quadratic.random()
    A = torch.ones(5) if geometry == "posterior" else problem.scale
    e = torch.zeros(5)
    for _ in range(4):
        v = problem.u(e) / A
        e = e + (2.0 / 4) * (v / v.norm()) / A
        e = e * min(1.0, 2.0 / float((A * e).norm()))
    space = QuadraticSpace(problem)
    torch.testing.assert_close(ps.Adversarial(2.0, steps=4, geometry=geometry).noise(space)[0], e)
    assert space.calls == 4


def test_steps_of_infinite_order_stay_in_the_cube() -> None:
    problem = Quadratic.random()
    e = torch.zeros(5)
    for _ in range(5):
        e = (e + 0.2 * problem.u(e).sign()).clamp(-1.0, 1.0)
    torch.testing.assert_close(ps.Adversarial(1.0, steps=5, ord=math.inf).noise(QuadraticSpace(problem))[0], e)


@pytest.mark.parametrize("kappa", [0.3, 1.0, 20.0])
def test_mixsam_is_the_papers_mixture(kappa: float) -> None:
    problem, z = Quadratic.random(), torch.randn(5)
    v = math.sqrt(5) * ascent_direction(problem) + kappa * z
    for rho, length in ((None, math.sqrt(5)), (0.4, 0.4)):
        space = QuadraticSpace(problem, z)
        torch.testing.assert_close(ps.MixSAM(rho, kappa).noise(space)[0], length * v / v.norm())
        assert space.calls == 1


def test_mixsam_without_kappa_is_adversarial_and_draws_nothing() -> None:
    problem = Quadratic.random()
    expected = ps.Adversarial(1.3).noise(QuadraticSpace(problem))
    assert torch.equal(ps.MixSAM(1.3, kappa=0.0).noise(QuadraticSpace(problem, z=None)), expected)


@pytest.mark.parametrize("length", [1.0, 10.0, 1e9])
def test_a_zero_vector_has_no_direction_in_single_precision(length: float) -> None:
    assert torch.equal(unit(torch.zeros(2, 7, dtype=torch.float32), length), torch.zeros(2, 7, dtype=torch.float32))


@pytest.mark.parametrize("law", [ps.Adversarial(0.5), ps.MixSAM(0.5), ps.MixSAM(kappa=0.3)], ids=repr)
def test_an_empty_site_has_empty_noise(law: ps.Perturbation) -> None:
    problem = Quadratic.random()
    space = QuadraticSpace(problem, torch.randn(5), sizes=[5, 0])
    assert law.noise(space).shape == (1, 5)


def test_mixsam_with_a_huge_kappa_is_a_random_direction() -> None:
    z = torch.randn(5)
    e = ps.MixSAM(2.0, kappa=1e300).noise(QuadraticSpace(Quadratic.random(), z))[0]
    torch.testing.assert_close(e, 2.0 * z / z.norm())


@pytest.mark.parametrize("kappa", [0.5, 1.0, 3.0])
def test_mixsam_is_at_the_stated_angle_to_the_ascent(kappa: float) -> None:
    d = 4000
    problem = Quadratic(torch.eye(d), torch.zeros(d), torch.randn(d), torch.ones(d))
    cosines = []
    for _ in range(200):
        e = ps.MixSAM(1.0, kappa).noise(QuadraticSpace(problem, torch.randn(d)))[0]
        cosines.append(e @ ascent_direction(problem))
    cosine = torch.stack(cosines)
    # the stated value holds up to O(1/d)
    assert abs(cosine.mean() - 1 / math.sqrt(1 + kappa**2)) < 4 * cosine.std() / 200**0.5 + 2 / d


@pytest.mark.parametrize("alpha", [0.5, -2.0])
def test_ascended_sample_climbs_from_the_sample(alpha: float) -> None:
    problem, z = Quadratic.random(), torch.randn(5)
    u = problem.u(z)
    space = QuadraticSpace(problem, z)
    torch.testing.assert_close(ps.AscendedSample(alpha).noise(space)[0], z + alpha * u / u.norm())
    assert space.calls == 1


def test_zero_radius_is_the_mean_and_zero_alpha_the_sample() -> None:
    problem, z = Quadratic.random(), torch.randn(5)
    for law in (ps.Adversarial(0.0), ps.Adversarial(0.0, geometry="fisher"), ps.MixSAM(0.0)):
        space = QuadraticSpace(problem)
        assert torch.equal(law.noise(space), torch.zeros(1, 5))
        assert space.calls == 0
    space = QuadraticSpace(problem, z)
    assert torch.equal(ps.AscendedSample(0.0).noise(space)[0], z)
    assert space.calls == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_norm_is_rho_at_any_scale_of_the_loss(size: float, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    d = 1000
    problem = Quadratic(size * torch.eye(d), torch.zeros(d), torch.randn(d), torch.full((d,), 0.1))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for law in (ps.Adversarial(0.5), ps.MixSAM(0.5, kappa=0.2), ps.MixSAM(0.5, kappa=1e20)):
        e = law.noise(QuadraticSpace(problem, torch.randn(d)))
        assert e.dtype == dtype
        assert abs(e.double().norm().item() / 0.5 - 1) < tolerance
    for geometry in ("euclidean", "adaptive"):
        space = QuadraticSpace(problem)
        e = ps.Adversarial(0.5, geometry=geometry).noise(space)
        A = problem.scale if geometry == "euclidean" else problem.scale / (problem.loc.abs() + 0.01)
        assert abs((A * e).double().norm().item() / 0.5 - 1) < tolerance


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_unit_has_norm_one_or_is_zero(entries: list[float]) -> None:
    v = unit(torch.tensor(entries, dtype=torch.float64))
    assert v.isfinite().all()
    norm = math.hypot(*v.tolist())
    assert norm == 0.0 if not any(entries) else abs(norm - 1) < 1e-12


def test_zero_gradient_gives_no_direction_and_no_nan() -> None:
    problem = Quadratic(torch.zeros(5, 5), torch.zeros(5), torch.randn(5), torch.ones(5))
    z = torch.randn(5)
    for geometry in ("posterior", "euclidean", "adaptive", "fisher"):
        law = ps.Adversarial(1.0, geometry=geometry, steps=2)
        assert torch.equal(law.noise(QuadraticSpace(problem)), torch.zeros(1, 5))
    assert torch.equal(ps.Adversarial(1.0, ord=math.inf).noise(QuadraticSpace(problem)), torch.zeros(1, 5))
    assert torch.equal(ps.AscendedSample(1.0).noise(QuadraticSpace(problem, z))[0], z)
    torch.testing.assert_close(ps.MixSAM(2.0, 0.5).noise(QuadraticSpace(problem, z))[0], 2.0 * z / z.norm())


def test_nan_in_the_gradient_is_not_hidden() -> None:
    assert unit(torch.tensor([1.0, math.nan])).isnan().any()
    assert unit(torch.tensor([1.0, math.inf])).isnan().any()


def test_each_group_has_its_own_radius_and_dimension() -> None:
    problem, z = Quadratic.random(), torch.randn(5)
    u = problem.u(torch.zeros(5))
    e = ps.Adversarial(rho=None).noise(QuadraticSpace(problem, sizes=[2, 3]))[0]
    torch.testing.assert_close(e[:2], math.sqrt(2) * u[:2] / u[:2].norm())
    torch.testing.assert_close(e[2:], math.sqrt(3) * u[2:] / u[2:].norm())
    e = ps.MixSAM(kappa=0.7).noise(QuadraticSpace(problem, z, sizes=[2, 3]))[0]
    v = math.sqrt(2) * u[:2] / u[:2].norm() + 0.7 * z[:2]
    torch.testing.assert_close(e[:2], math.sqrt(2) * v / v.norm())


def test_mixture_with_a_certain_law_is_that_law_without_a_coin() -> None:
    problem = Quadratic.random()
    before = torch.get_rng_state()
    mixture = ps.Mixture([ps.Adversarial(0.3), ps.Gaussian()], [1.0, 0.0])
    assert torch.equal(mixture.noise(QuadraticSpace(problem)), ps.Adversarial(0.3).noise(QuadraticSpace(problem)))
    assert torch.equal(torch.get_rng_state(), before)
    assert mixture.ascends_from_mean
    assert mixture.uses_gradient


def test_mixture_draws_laws_with_their_probabilities_and_pays_for_the_drawn_one_only() -> None:
    problem, z = Quadratic.random(), torch.randn(5)
    mixture = ps.Mixture([ps.Adversarial(0.3), ps.Gaussian()], [0.3, 0.7])
    adversarial, calls, trials = 0, 0, 4000
    for _ in range(trials):
        space = QuadraticSpace(problem, z)
        adversarial += not torch.equal(mixture.noise(space)[0], z)
        calls += space.calls
    assert calls == adversarial
    assert abs(adversarial / trials - 0.3) < 4 * math.sqrt(0.3 * 0.7 / trials)
    assert not mixture.ascends_from_mean


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ps.Adversarial(-1.0), r"rho must be non-negative, got rho=-1.0"),
        (lambda: ps.Adversarial(math.nan), r"rho must be a finite number, got rho=nan"),
        (lambda: ps.Adversarial(math.inf), r"rho must be a finite number"),
        (lambda: ps.Adversarial("1"), r"rho must be a finite number, got rho='1'"),
        (lambda: ps.Adversarial(True), r"rho must be a finite number, got rho=True"),
        (lambda: ps.Adversarial(steps=0), r"steps must be a whole number of at least 1, got steps=0"),
        (lambda: ps.Adversarial(steps=1.5), r"steps must be a whole number"),
        (lambda: ps.Adversarial(ord=1), r"ord must be 2 or inf, got ord=1"),
        (lambda: ps.Adversarial(geometry="round"), r"geometry must be one of posterior, .*got geometry='round'"),
        (lambda: ps.Adversarial(eta=0.0), r"eta must be positive, got eta=0.0"),
        (lambda: ps.Adversarial(eta=math.nan), r"eta must be a finite number"),
        (lambda: ps.Adversarial(ord=math.inf, geometry="fisher"), r"ord=inf is defined for geometry='posterior' only"),
        (lambda: ps.Adversarial(None, geometry="euclidean"), r"rho=None counts posterior standard deviations"),
        (lambda: ps.MixSAM(-0.1), r"rho must be non-negative"),
        (lambda: ps.MixSAM(kappa=-1), r"kappa must be non-negative, got kappa=-1"),
        (lambda: ps.MixSAM(kappa=math.nan), r"kappa must be a finite number"),
        (lambda: ps.AscendedSample(math.inf), r"alpha must be a finite number, got alpha=inf"),
        (lambda: ps.Mixture([ps.Mean()], [0.5]), r"probs must sum to one, got probs=\(0.5,\)"),
        (
            lambda: ps.Mixture([ps.Mean(), ps.Mean()], [1.0]),
            r"one probability per law of perturbations, got 1 for 2 laws",
        ),
        (lambda: ps.Mixture([], []), r"one probability per law of perturbations, got 0 for 0"),
        (lambda: ps.Mixture([ps.Mean(), ps.Gaussian()], [1.5, -0.5]), r"probs must be non-negative"),
        (lambda: ps.Mixture(["mean"], [1.0]), r"must be instances of Perturbation such as Gaussian\(\), got 'mean'"),
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_laws_are_frozen_and_compare_by_value() -> None:
    assert ps.Adversarial(0.5) == ps.Adversarial(0.5)
    assert hash(ps.Mixture([ps.Mean()], [1.0])) == hash(ps.Mixture((ps.Mean(),), (1,)))
    with pytest.raises(AttributeError, match="cannot assign to field 'rho'"):
        ps.Adversarial(0.5).rho = 1.0  # type: ignore[misc]


def test_steps_that_a_changing_ball_leaves_outside_are_projected_back() -> None:
    problem = Quadratic.random(d=2)
    small, large = torch.tensor([1e-3, 0.0]), torch.tensor([100.0, 1.0])
    gradients = iter([small, large])

    class Scripted(QuadraticSpace):
        def gradient(self, e: torch.Tensor) -> torch.Tensor:
            return (problem.scale * next(gradients)).unsqueeze(0)

    e = ps.Adversarial(0.3, steps=2, geometry="fisher", eta=1.0).noise(Scripted(problem))[0]
    # the first step of length rho / 2 along the first axis is 100 times too long for the second gradient's ball
    displacement, f = problem.scale * e, 1 + large**2
    assert 0.15 * f[0].sqrt() > 0.3
    torch.testing.assert_close((f * displacement**2).sum().sqrt(), torch.tensor(0.3))
