"""First mistakes with models, guides and settings: a clear error that names what to change, and nothing changed."""

import gc
import math
import weakref
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Quadratic
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormalMessenger
from pyro.optim import Adam

import pyro_sam as ps
from pyro_sam._step.call import Call
from pyro_sam._step.knowledge import Knowledge


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": -0.1}, r"kl_weight must be non-negative, got kl_weight=-0.1"),
        ({"kl_weight": math.nan}, r"kl_weight must be a finite number, got kl_weight=nan"),
        ({"scope": "all"}, r"scope must be one of global, site, event, got scope='all'"),
        ({"scale_gradient": "none"}, r"scale_gradient must be one of perturbed, mean, got scale_gradient='none'"),
        ({"num_particles": 0}, r"num_particles must be a whole number of at least 1, got num_particles=0"),
        ({"num_particles": 1.5}, r"num_particles must be a whole number"),
        ({"perturbation": 0.5}, r"perturbation must be a Perturbation such as Adversarial\(rho=1.0\), got 0.5"),
        ({"perturbation": ps.Adversarial}, r"perturbation must be a Perturbation"),
        ({"hide": 3}, r"hide must be a collection of site names or a predicate on names, got hide=3"),
        ({"hide": [3]}, r"hide must be a collection of site names"),
        (
            {"perturbation": ps.Gaussian(), "scale_gradient": "mean"},
            r"scale_gradient='mean' needs a gradient at the guide's mean, which Gaussian\(\) never takes",
        ),
        (
            {"perturbation": ps.Mixture([ps.MixSAM(), ps.Mean()], [0.5, 0.5]), "scale_gradient": "mean"},
            r"scale_gradient='mean' needs a gradient",
        ),
        ({"perturbation": ps.AscendedSample(), "scale_gradient": "mean"}, r"scale_gradient='mean' needs a gradient"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ps.SAM_ELBO(**settings)


def one_normal() -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("loss", -(w**2).sum(-1))


def refused(model: Any, guide: Any, message: str, law: ps.Perturbation | None = None) -> None:
    elbo = ps.SAM_ELBO(law)
    with pytest.raises(ValueError, match=message):
        SVI(model, guide, Adam({"lr": 0.1}), elbo).step()


def test_guide_without_a_gaussian_site_names_its_sites_and_why() -> None:
    refused(
        one_normal, AutoDelta(one_normal), r"no Gaussian site to perturb \('w': Delta is no reparameterised Gaussian"
    )
    refused(lambda: None, lambda: None, r"no Gaussian site to perturb \(it has no latent site at all\)")

    def all_hidden() -> None:
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"no Gaussian site to perturb \('w': hidden by hide\)"):
        ps.SAM_ELBO(hide="w").loss_and_grads(one_normal, all_hidden)


def test_gaussian_law_needs_no_gaussian_site() -> None:
    guide = AutoDelta(one_normal)
    loss = ps.SAM_ELBO(ps.Gaussian()).loss_and_grads(one_normal, guide)
    w = guide.median()["w"]
    expected = (w**2).sum() - dist.Normal(0.0, 1.0).log_prob(w).sum()
    assert loss == pytest.approx(float(expected))


def test_latent_missing_from_the_guide_is_named() -> None:
    def two() -> None:
        one_normal()
        pyro.sample("v", dist.Normal(0.0, 1.0))

    guide = ps.MeanFieldNormal(one_normal).initialize()
    refused(two, guide, r"latent site 'v' of the model is missing from the guide \(guide sites: w\)")


def test_discrete_latents_are_named() -> None:
    def discrete() -> None:
        one_normal()
        pyro.sample("k", dist.Categorical(torch.ones(3)))

    guide = ps.MeanFieldNormal(one_normal).initialize()
    refused(discrete, guide, r"latent site 'k' of the model is discrete \(Categorical\)")

    def discrete_guide() -> None:
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("k", dist.Categorical(torch.ones(3)))

    with pytest.raises(NotImplementedError, match=r"guide site 'k' is discrete \(Categorical\)"):
        ps.SAM_ELBO().loss_and_grads(discrete, discrete_guide)


def test_site_without_a_reparameterised_sampler_is_named() -> None:
    def von_mises() -> None:
        one_normal()
        pyro.sample("angle", dist.VonMises(0.0, 1.0))

    def guide() -> None:
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("angle", dist.VonMises(0.0, 1.0))

    with pytest.raises(NotImplementedError, match=r"guide site 'angle' has no reparameterised sampler \(VonMises\)"):
        ps.SAM_ELBO().loss_and_grads(von_mises, guide)


@pytest.mark.parametrize("geometry", ["euclidean", "adaptive", "fisher"])
def test_diagonal_geometry_refuses_a_full_covariance(geometry: Any) -> None:
    guide = AutoMultivariateNormal(one_normal)
    law = ps.Adversarial(0.1, geometry=geometry)
    refused(one_normal, guide, r"guide site '_AutoMultivariateNormal_latent' has a full covariance; geometry=", law)
    low_rank = dist.LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2))
    refused(one_normal, lambda: pyro.sample("w", low_rank), r"guide site 'w' has a full covariance", law)


def test_unknown_hidden_site_lists_the_sites_there_are() -> None:
    guide = ps.MeanFieldNormal(one_normal).initialize()
    with pytest.raises(ValueError, match=r"hide must name sites of the guide, got q, x; its Gaussian sites are w"):
        ps.SAM_ELBO(hide=("x", "q")).loss_and_grads(one_normal, guide)


def test_guide_that_handles_effects_is_refused_by_name() -> None:
    refused(one_normal, AutoNormalMessenger(one_normal), r"guide AutoNormalMessenger is an effect handler")


def test_shapes_that_disagree_are_refused_by_pyros_own_check() -> None:
    def guide() -> None:
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    refused(one_normal, guide, r"Model and guide shapes disagree at site 'w'")


def test_missing_plate_is_refused_as_by_pyro() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(w, 1.0), obs=torch.zeros(5))

    refused(model, ps.MeanFieldNormal(model).initialize(), r"at site \"obs\", invalid log_prob shape")


def test_misfit_after_a_change_of_structure_is_refused_too() -> None:
    broken = False

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            fn = dist.Normal(w, 1.0)
            pyro.sample("obs", fn.expand([2, 5]) if broken else fn, obs=torch.zeros(5))

    guide = ps.MeanFieldNormal(model).initialize()
    svi = SVI(model, guide, Adam({"lr": 0.1}), ps.SAM_ELBO())
    svi.step()
    broken = True
    with pytest.raises(ValueError, match=r"at site \"obs\", invalid log_prob shape"):
        svi.step()


def test_a_refusal_changes_nothing_and_the_next_step_works() -> None:
    problem = Quadratic.random(2)
    guide = problem.guide()
    guide()
    before = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}

    def two() -> None:
        problem.model()()
        pyro.sample("v", dist.Normal(0.0, 1.0))

    elbo = ps.SAM_ELBO()
    with pytest.raises(ValueError, match="'v' of the model is missing"):
        SVI(two, guide, Adam({"lr": 0.1}), elbo).step()
    for name, parameter in pyro.get_param_store().named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert math.isfinite(SVI(problem.model(), guide, Adam({"lr": 0.1}), elbo).step())


def test_nan_losses_warn() -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("loss", -(w * math.nan).sum(-1))

    guide = ps.MeanFieldNormal(one_normal).initialize()
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="Encountered NaN"):
        assert math.isnan(ps.SAM_ELBO().loss_and_grads(model, guide))


def test_a_known_model_is_kept_alive_so_that_no_other_takes_its_id() -> None:
    knowledge = Knowledge()

    def model() -> None:
        pass

    alive = weakref.ref(model)
    knowledge.of(Call(model, model, (), {}))
    del model
    gc.collect()
    assert alive() is not None
