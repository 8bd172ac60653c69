"""What must hold for models and laws drawn at random."""

from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import gradients_of
from random_models import World, adversarial, laws, of_fixed_length, scopes, worlds
from torch import Tensor, nn

import pyro_sam as ps
from pyro_sam.perturbation import NoiseSpace

few = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Recorded(ps.Perturbation):
    """A law that remembers the noise that it chose."""

    def __init__(self, law: ps.Perturbation) -> None:
        self.law = law

    def noise(self, space: NoiseSpace) -> Tensor:
        self.chosen = self.law.noise(space)
        self.groups = [group.clone() for group in space.groups(self.chosen)]
        return self.chosen


def step(world: World, law: ps.Perturbation, **options: Any) -> tuple[float, dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return gradients_of(ps.SAM_ELBO(law, **options), world.model, world.guide)


def chosen(world: World, law: ps.Perturbation, **options: Any) -> Recorded:
    recorded = Recorded(law)
    step(world, recorded, **options)
    return recorded


def assert_equal(first: tuple[float, dict[str, Tensor]], second: tuple[float, dict[str, Tensor]]) -> None:
    assert first[0] == second[0]
    for name, gradient in second[1].items():
        assert torch.equal(first[1][name], gradient), name


@few
@given(worlds(), st.floats(0.0, 100.0), scopes)
def test_radius_zero_is_exactly_the_law_it_starts_from(world: World, kappa: float, scope: Any) -> None:
    mean, gaussian = step(world, ps.Mean(), scope=scope), step(world, ps.Gaussian(), scope=scope)
    for law in (ps.Adversarial(0.0), ps.MixSAM(0.0, kappa), ps.Mixture([ps.Mean(), ps.Gaussian()], [1.0, 0.0])):
        assert_equal(step(world, law, scope=scope), mean)
    for law in (ps.AscendedSample(0.0), ps.Mixture([ps.Gaussian(), ps.Mean()], [1.0, 0.0])):
        assert_equal(step(world, law, scope=scope), gaussian)


@few
@given(worlds(), of_fixed_length, scopes, st.integers(-30, 30))
def test_noise_has_its_radius_at_any_scale_of_the_loss(world: World, law: Any, scope: Any, power: int) -> None:
    for group in chosen(replace(world, scale=10.0**power), law, scope=scope, kl_weight=0.0).groups:
        torch.testing.assert_close(group.norm(dim=-1), torch.full(group.shape[:-1], law.rho), rtol=1e-12, atol=0)


@few
@given(worlds(), laws, scopes)
def test_zero_ascent_gradient_has_no_direction(world: World, law: Any, scope: Any) -> None:
    flat = replace(world, sites=tuple(replace(site, mask="none") for site in world.sites), coupling=0.0)
    recorded = chosen(flat, law, scope=scope)
    assert recorded.chosen.isfinite().all()
    if isinstance(law, ps.Adversarial):
        assert not recorded.chosen.any()
    if isinstance(law, ps.AscendedSample):
        assert torch.equal(recorded.chosen, chosen(flat, ps.Gaussian(), scope=scope).chosen)


@few
@given(worlds(), laws, scopes, st.floats(0.01, 100.0))
def test_noise_ignores_the_scale_of_the_likelihood(world: World, law: Any, scope: Any, scale: float) -> None:
    scaled = chosen(replace(world, scale=scale), law, scope=scope)
    torch.testing.assert_close(scaled.chosen, chosen(world, law, scope=scope).chosen, rtol=1e-7, atol=1e-9)


@few
@given(worlds(), adversarial, scopes)
def test_order_of_the_sites_does_not_matter(world: World, law: Any, scope: Any) -> None:
    whole = replace(world, subsample=world.size)  # no draws, so none in another order
    loss, gradients = step(whole, law, scope=scope)
    turned_loss, turned = step(replace(whole, sites=whole.sites[::-1]), law, scope=scope)
    assert turned_loss == pytest.approx(loss, rel=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(turned[name], gradient, rtol=1e-9, atol=1e-10)


@few
@given(worlds(), laws, scopes)
def test_ascent_leaves_no_trace(world: World, law: Any, scope: Any) -> None:
    net, outputs, batches = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)), [], []

    def model() -> None:
        outputs.append(net(torch.arange(8.0).reshape(4, 2)).detach())
        with pyro.plate("rows", 9, subsample_size=4) as rows:
            batches.append(rows)
        world.model()

    pyro.clear_param_store()
    world.guide()
    before = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    ps.SAM_ELBO(law, scope=scope).differentiable_loss(model, world.guide)
    assert int(net[1].num_batches_tracked) == 1
    for runs in (outputs, batches):
        assert all(torch.equal(run, runs[0]) for run in runs)
    for name, parameter in pyro.get_param_store().named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert all(parameter.grad is None for parameter in net.parameters())
