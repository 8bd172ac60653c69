"""What Pyro refuses is refused, by name and with a cure; what cannot be perturbed as asked is refused too."""

from collections.abc import Callable
from typing import Any

import pair_guides as guides
import pair_models as models
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiscreteParallel,
    AutoHierarchicalNormalMessenger,
    AutoLaplaceApproximation,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)

import pyro_sam as ps

Guide = Callable[..., Any]


def with_b(fn: Any) -> Callable[[Guide], Guide]:
    def make(model: Guide) -> Guide:
        def guide() -> None:
            guides.normal("w", 3)
            pyro.sample("b", fn)

        return guide

    return make


def without_plate(model: Guide) -> Guide:
    return lambda: pyro.sample("w", dist.Normal(*guides.loc_and_scale("w", 3)))


def twice(model: Guide) -> Guide:
    return lambda: (guides.normal("w", 3), guides.normal("w", 3))


def in_plate() -> None:
    with pyro.plate("columns", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(w, 1.0), obs=torch.zeros(3))


REFUSED_BY_BOTH = [
    ("missing", models.regression, guides.of_w, TraceMeanField_ELBO, r"'b' of the model is missing from the guide"),
    (
        "blocked",
        models.regression,
        guides.handled(lambda guide: poutine.block(guide, hide=["b"]), guides.of_w_and_b),
        TraceMeanField_ELBO,
        r"'b' of the model is missing from the guide \(guide sites: w\)",
    ),
    (
        "conditioned",
        models.regression,
        guides.handled(lambda guide: poutine.condition(guide, data={"b": torch.tensor(0.1)}), guides.of_w_and_b),
        TraceMeanField_ELBO,
        r"'b' of the model is observed in the guide .* Condition the model on the value instead",
    ),
    ("discrete", models.regression, with_b(dist.Poisson(2.0)), TraceMeanField_ELBO, r"guide site 'b' is discrete"),
    (
        "no-rsample",
        models.regression,
        with_b(dist.VonMises(torch.tensor(0.0), 2.0)),
        TraceMeanField_ELBO,
        r"guide site 'b' has no reparameterised sampler \(VonMises\)",
    ),
    (
        "no-rsample-wanted",
        models.regression,
        with_b(dist.Normal(0.0, 1.0).has_rsample_(False)),
        TraceMeanField_ELBO,
        r"guide site 'b' has no reparameterised sampler \(Normal\)",
    ),
    ("sequential", models.sequential_plates, AutoNormal, Trace_ELBO, "AutoGuide does not support sequential"),
    ("sequential-mean-field", models.sequential_plates, ps.MeanFieldNormal, Trace_ELBO, "not support sequential"),
    ("event-dim", models.deterministic, without_plate, Trace_ELBO, r"event_dims disagree at site 'w': 1 vs 0"),
    ("no-plate", in_plate, without_plate, Trace_ELBO, r"at site \"w\", invalid log_prob shape"),
    ("twice", models.deterministic, twice, Trace_ELBO, r"Multiple sample sites named 'w'"),
    ("messenger", models.regression, AutoNormalMessenger, TraceEnum_ELBO, r"guide AutoNormalMessenger is an effect"),
]


@pytest.mark.parametrize(
    ("name", "model", "make", "reference", "match"), REFUSED_BY_BOTH, ids=[row[0] for row in REFUSED_BY_BOTH]
)
def test_what_pyro_refuses_is_refused(name: str, model: Any, make: Any, reference: Any, match: str) -> None:
    with pytest.raises((AssertionError, KeyError, NotImplementedError, RuntimeError, UserWarning, ValueError)):
        reference(max_plate_nesting=2).loss_and_grads(model, make(model))
    pyro.clear_param_store()
    with pytest.raises((NotImplementedError, RuntimeError, ValueError), match=match):
        ps.SAM_ELBO(max_plate_nesting=2).loss_and_grads(model, make(model))


@pytest.mark.parametrize("make", [AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoRegressiveMessenger])
def test_guides_that_are_effect_handlers_are_refused_by_name(make: Any) -> None:
    with pytest.raises(ValueError, match=rf"guide {make.__name__} is an effect handler.*MeanFieldNormal"):
        ps.SAM_ELBO(ps.Gaussian()).loss_and_grads(models.regression, make(models.regression))


@pytest.mark.parametrize("make", [AutoDelta, AutoLaplaceApproximation])
def test_point_guides_are_pyros_under_the_gaussian_law_and_refused_under_others(make: Any) -> None:
    guide = make(models.regression)
    expected = Trace_ELBO().loss(models.regression, guide)
    assert ps.SAM_ELBO(ps.Gaussian()).loss_and_grads(models.regression, guide) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match=r"no Gaussian site to perturb .*'w': Delta is no reparameterised Gaussian"):
        ps.SAM_ELBO().loss_and_grads(models.regression, guide)


def test_discrete_autoguide_is_refused() -> None:
    def model() -> None:
        pyro.sample("k", dist.Categorical(torch.ones(3)))

    with pytest.raises(NotImplementedError, match=r"guide site .* is discrete \(Categorical\)"):
        ps.SAM_ELBO().loss_and_grads(model, AutoDiscreteParallel(model))


@pytest.mark.parametrize("geometry", ["euclidean", "adaptive", "fisher"])
def test_geometries_of_weight_space_refuse_whitened_noise(geometry: Any) -> None:
    guide = AutoStructured(models.regression)
    elbo = ps.SAM_ELBO(ps.Adversarial(0.1, geometry=geometry))
    with pytest.raises(ValueError, match=r"guide site '.*_aux' is whitened noise; geometry="):
        elbo.loss_and_grads(models.regression, guide)
    # a standard Normal that the guide trains is not whitened
    elbo.loss_and_grads(models.regression, AutoNormal(models.regression, init_scale=1.0))
