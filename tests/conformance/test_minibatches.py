"""Minibatches that the model names: guide and model use exactly those, also where Pyro's own estimators do not."""

from collections.abc import Callable
from typing import Any

import pair_guides as guides
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gradients_of
from pair_models import Y
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from torch import Tensor

import pyro_sam as ps

LAWS = [ps.Gaussian(), ps.Adversarial(0.5), ps.AscendedSample(0.5)]
BATCHES = [torch.tensor([1, 8, 3, 11]), torch.tensor([0, 2]), torch.tensor([7, 5, 6, 4, 9])]
seen: list[Tensor] = []


def model(rows: Tensor) -> None:
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 12, subsample=rows) as used:
        seen.append(used)
        z = pyro.sample("z", dist.Normal(top, 1.0))
        pyro.sample("obs", dist.Normal(z, 0.5), obs=Y[rows])


def nested(rows: Tensor) -> None:
    with pyro.plate("columns", 3, dim=-1):
        column = pyro.sample("column", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 12, subsample=rows, dim=-2) as used:
            seen.append(used)
            z = pyro.sample("z", dist.Normal(column, 1.0))
            pyro.sample("obs", dist.Normal(z, 0.5), obs=Y[rows, None].expand(-1, 3))


def parts(model: Any) -> Any:
    guide = AutoGuideList(model)
    guide.append(AutoDiagonalNormal(poutine.block(model, expose=["top"])))
    guide.append(AutoNormal(poutine.block(model, expose=["z"])))
    return guide


def given(model: Any) -> Any:
    def guide(rows: Tensor) -> None:
        guides.normal("top")
        with pyro.plate("data", 12, subsample=rows):
            loc, scale = guides.loc_and_scale("z", 12)
            pyro.sample("z", dist.Normal(loc[rows], scale[rows]))

    return guide


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    seen.clear()


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize(
    ("make", "model"),
    [
        (ps.MeanFieldNormal, model),
        (AutoNormal, model),
        (ps.MeanFieldNormal, nested),
        (parts, model),
        (given, model),
        (lambda model: poutine.scale(AutoNormal(model), scale=0.5), model),
    ],
)
def test_guide_and_model_use_the_models_indices(make: Any, model: Any, vectorize: bool, law: ps.Perturbation) -> None:
    guide = make(model)
    elbo = ps.SAM_ELBO(law, num_particles=2, vectorize_particles=vectorize, max_plate_nesting=2)
    for rows in BATCHES:
        seen.clear()
        _, gradients = gradients_of(elbo, model, guide, rows)
        assert all(torch.equal(used, rows) for used in seen)
        touched = [g for name, g in gradients.items() if "z" in name and g.shape[:1] == (12,)]
        assert touched
        for gradient in touched:
            moved = (gradient.reshape(12, -1) != 0).any(-1).nonzero().squeeze(-1)
            assert moved.tolist() == sorted(rows.tolist())


@pytest.mark.parametrize("make", [ps.MeanFieldNormal, AutoNormal])
def test_gaussian_law_is_pyros_estimator_with_the_plates_given(make: Callable[..., Any]) -> None:
    results = []
    for elbo, create_plates in (
        (ps.SAM_ELBO(ps.Gaussian()), None),
        (
            TraceMeanField_ELBO() if make is ps.MeanFieldNormal else Trace_ELBO(),
            lambda rows: pyro.plate("data", 12, subsample=rows),
        ),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = make(model, create_plates=create_plates)
        guide(BATCHES[0])
        pyro.set_rng_seed(1)
        results.append(gradients_of(elbo, model, guide, BATCHES[2]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], gradient)


def test_pyros_own_estimator_would_use_other_indices() -> None:
    guide = AutoNormal(model)
    Trace_ELBO().loss(model, guide, BATCHES[0])
    assert not torch.equal(seen[-1], BATCHES[0])


def test_guide_is_as_before_also_after_an_error() -> None:
    guide = ps.MeanFieldNormal(model)
    ps.SAM_ELBO().loss_and_grads(model, guide, BATCHES[0])
    assert guide.create_plates is None
    with pytest.raises(IndexError):
        ps.SAM_ELBO().loss_and_grads(model, guide, torch.tensor([1, 99]))
    assert guide.create_plates is None


def test_looking_for_indices_draws_nothing_from_the_random_stream() -> None:
    guide = ps.MeanFieldNormal(model)
    guide(BATCHES[0])
    states = []
    for create_plates in (None, lambda rows: pyro.plate("data", 12, subsample=rows)):
        guide.create_plates = create_plates
        pyro.set_rng_seed(0)
        ps.SAM_ELBO().loss_and_grads(model, guide, BATCHES[0])
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_hand_written_guide_with_other_indices_is_refused() -> None:
    def guide(rows: Tensor) -> None:
        guides.normal("top")
        with pyro.plate("data", 12, subsample_size=len(rows)) as own:
            loc, scale = guides.loc_and_scale("z", 12)
            pyro.sample("z", dist.Normal(loc[own], scale[own]))

    with pytest.raises(ValueError, match=r"plate 'data' has subsample=indices in the model, and other indices in the"):
        ps.SAM_ELBO().loss_and_grads(model, guide, BATCHES[0])


@pytest.mark.parametrize("make", [AutoDiagonalNormal, AutoMultivariateNormal, AutoStructured, AutoGaussian])
def test_guides_with_parameters_per_position_are_refused_under_subsampling(make: Callable[..., Any]) -> None:
    match = rf"guide {make.__name__}\w* cannot hold the local latents of plate 'data', which takes 4 of 12 data points"
    for initialised in (False, True):
        guide = make(model)
        if initialised:
            guide(BATCHES[0])
        with pytest.raises(ValueError, match=match):
            ps.SAM_ELBO().loss_and_grads(model, guide, BATCHES[0])
    pyro.clear_param_store()
    every = torch.arange(12)
    ps.SAM_ELBO().loss_and_grads(model, make(model), every)
