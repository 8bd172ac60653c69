"""Discrete sites of the model are summed out: against TraceEnum_ELBO, and against the same model summed by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pair_guides as guides
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gradients_of
from pair_models import X, Y
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_mean
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

import pyro_sam as ps

LAWS = [ps.Mean(), ps.Gaussian(), ps.Adversarial(0.7), ps.MixSAM(1.0), ps.AscendedSample(0.5)]
CONTINUOUS = ["weights", "locs", "scale", "w", "b", "transition", "rate"]


@config_enumerate
def mixture() -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", 12):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(Vindex(locs.unsqueeze(-2))[..., k], scale), obs=Y)


def mixture_by_hand() -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", 12):
        parts = dist.Normal(locs, scale)
        pyro.sample("obs", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=Y)


@config_enumerate
def subsampled() -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", 12, subsample_size=5) as rows:
        k = pyro.sample("k", dist.Bernoulli(0.3))
        with poutine.mask(mask=Y[rows] > -1.0):
            pyro.sample("obs", dist.Normal(w[..., 0] + k * w[..., 1], 0.5), obs=Y[rows])
    pyro.sample("outside", dist.Normal(w.sum(-1), 1.0), obs=torch.tensor(0.3))


@config_enumerate
def nested() -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 3, dim=-1):
        group = pyro.sample("group", dist.Bernoulli(0.4))
        with pyro.plate("rows", 12, dim=-2):
            k = pyro.sample("k", dist.Bernoulli(0.2 + 0.5 * group))
            pyro.sample("obs", dist.Normal(w * k + group, 0.5), obs=X)


@config_enumerate
def hidden_markov() -> None:
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    state: Any = 0
    for t in pyro.markov(range(8)):
        state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]))
        pyro.sample(f"obs_{t}", dist.Normal(w[state], 0.5), obs=Y[t])


@config_enumerate
def scaled_factor() -> None:
    with poutine.scale(scale=0.3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Binomial(3, 0.4))
        pyro.factor("energy", -((w - k) ** 2))


@config_enumerate
def network() -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", 12):
        outlier = pyro.sample("outlier", dist.Bernoulli(0.1))
        pyro.sample("obs", dist.Normal(torch.tanh((X * w).sum(-1)), 0.3 + 2 * outlier), obs=Y)


@config_enumerate
def spike_and_slab() -> None:
    on = pyro.sample("on", dist.Bernoulli(0.4))
    w = pyro.sample("w", dist.Normal(0.0, 0.1 + on))
    with pyro.plate("data", 12):
        pyro.sample("obs", dist.Normal(w, 0.5), obs=Y)


MODELS = [mixture, subsampled, nested, hidden_markov, scaled_factor, network]


def of_continuous(make: Callable[..., Any], model: Any) -> Any:
    return make(poutine.block(model, expose=CONTINUOUS))


def started(make: Callable[..., Any], model: Any) -> Any:
    pyro.set_rng_seed(0)
    guide = of_continuous(make, model)
    guide()
    for parameter in guide.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return guide


def assert_same(first: tuple[float, dict[str, Tensor]], second: tuple[float, dict[str, Tensor]]) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-12)
    assert any(gradient.any() for gradient in second[1].values())
    for name, gradient in second[1].items():
        torch.testing.assert_close(first[1][name], gradient)


@pytest.mark.parametrize("model", [*MODELS, spike_and_slab])
@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_gaussian_law_is_pyros_estimator(make: Callable[..., Any], model: Any) -> None:
    guide = started(make, model)
    for particles in (1, 2):
        results = []
        for elbo in (
            ps.SAM_ELBO(ps.Gaussian(), num_particles=particles, max_plate_nesting=2),
            TraceEnum_ELBO(num_particles=particles, max_plate_nesting=2),
        ):
            for _ in range(2):  # the first step finds out that the model enumerates
                pyro.set_rng_seed(1)
                result = gradients_of(elbo, model, guide)
            results.append(result)
        assert_same(*results)


@pytest.mark.parametrize("model", [mixture, network])
def test_vectorised_particles_are_pyros(model: Any) -> None:
    guide = started(AutoNormal, model)
    settings = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 2}
    results = []
    for elbo in (ps.SAM_ELBO(ps.Gaussian(), **settings), TraceEnum_ELBO(**settings)):
        pyro.set_rng_seed(1)
        results.append(gradients_of(elbo, model, guide))
    assert_same(*results)


def test_closed_form_kl_replaces_the_sampled_one() -> None:
    guide = started(ps.MeanFieldNormal, network)
    losses = []
    for elbo in (ps.SAM_ELBO(ps.Gaussian(), max_plate_nesting=1), TraceEnum_ELBO(max_plate_nesting=1)):
        pyro.set_rng_seed(1)
        losses.append(gradients_of(elbo, network, guide)[0])
    pyro.set_rng_seed(1)
    site = poutine.trace(guide).get_trace().nodes["w"]
    prior = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    sampled = site["fn"].log_prob(site["value"]) - prior.log_prob(site["value"])
    exact = torch.distributions.kl_divergence(site["fn"], prior)
    assert losses[0] - losses[1] == pytest.approx(float((exact - sampled).detach()), rel=1e-9)


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("make", [ps.MeanFieldNormal, AutoNormal])
def test_every_law_is_that_of_the_model_summed_by_hand(make: Callable[..., Any], law: ps.Perturbation) -> None:
    guide = started(make, mixture)
    results = []
    for model in (mixture, mixture_by_hand):
        pyro.set_rng_seed(1)
        elbo = ps.SAM_ELBO(law, num_particles=2, kl_weight=0.3, max_plate_nesting=1)
        results.append(gradients_of(elbo, model, guide))
    assert_same(*results)


def test_plate_nesting_is_found_without_being_told() -> None:
    guide = started(AutoNormal, nested)
    results = []
    for nesting in (2, float("inf")):
        elbo = ps.SAM_ELBO(ps.Adversarial(0.5), kl_weight=0.0, max_plate_nesting=nesting)
        results.append(gradients_of(elbo, nested, guide))
    assert_same(*results)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_all_passes_sum_the_same_model_and_leave_no_trace(law: ps.Perturbation) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    masks = []

    @config_enumerate
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", 12, subsample_size=6) as rows:
            hidden = net(X[rows])
            masks.append((rows, hidden.detach()))
            outlier = pyro.sample("outlier", dist.Bernoulli(0.1))
            pyro.sample("obs", dist.Normal((hidden * w).sum(-1), 0.3 + 2 * outlier), obs=Y[rows])

    guide = ps.MeanFieldNormal(model).initialize()
    elbo = ps.SAM_ELBO(law, max_plate_nesting=1)
    elbo.loss_and_grads(model, guide)
    for parameter in guide.parameters():
        parameter.grad = None
    masks.clear()
    before = int(net[2].num_batches_tracked)
    elbo.loss_and_grads(model, guide)
    assert int(net[2].num_batches_tracked) == before + 1
    assert all(torch.equal(rows, masks[0][0]) and torch.equal(hidden, masks[0][1]) for rows, hidden in masks)


def test_svi_finds_the_components_of_a_mixture() -> None:
    data = torch.cat([torch.randn(60) * 0.3 - 2, torch.randn(40) * 0.3 + 2])

    @config_enumerate
    def model() -> None:
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 2.0))
        with pyro.plate("data", 100):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.6, 0.4])))
            pyro.sample("obs", dist.Normal(locs[k], 0.3), obs=data)

    guide = ps.MeanFieldNormal(model, init_loc_fn=init_to_mean)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), ps.SAM_ELBO(ps.Adversarial(0.5)))
    for _ in range(150):
        svi.step()
    expected = torch.stack([data[:60].mean(), data[60:].mean()])
    torch.testing.assert_close(guide.median()["locs"], expected, atol=0.05, rtol=0)


def test_predictions_draw_the_site_that_the_loss_sums_over() -> None:
    @config_enumerate
    def model(y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Bernoulli(0.25))
            pyro.sample("obs", dist.Normal(w + 4 * k, 0.1), obs=y)

    guide = ps.MeanFieldNormal(model, init_scale=0.01).initialize(torch.zeros(4))
    prediction = ps.predict(model, guide, num_samples=2000)
    mean = guide.median()["w"].detach() + 4 * 0.25
    torch.testing.assert_close(prediction.mean, mean.expand(4), atol=4 * 4 * (0.1875 / 2000) ** 0.5, rtol=0)


def refused(model: Any, match: str, law: ps.Perturbation | None = None, **settings: Any) -> None:
    pyro.clear_param_store()
    guide = started(ps.MeanFieldNormal, model)
    with pytest.raises(ValueError, match=match):
        ps.SAM_ELBO(law or ps.Gaussian(), **settings).loss_and_grads(model, guide)


def test_prior_under_the_sum_is_refused_where_it_cannot_be_told_from_the_likelihood() -> None:
    match = r"prior of latent site 'w' depends on a site that is summed out.*MixtureSameFamily"
    refused(spike_and_slab, match, ps.Adversarial(0.5))
    refused(spike_and_slab, match, kl_weight=0.5)


def test_sites_of_different_scale_in_one_sum_are_refused() -> None:
    @config_enumerate
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.4))
        with pyro.plate("data", 12, subsample_size=6) as rows:
            pyro.sample("obs", dist.Normal(w + k, 0.5), obs=Y[rows])

    refused(model, r"must share one scale .* got 1, 2\.")

    @config_enumerate
    def tensor_scale() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 12), poutine.scale(scale=torch.ones(12)):
            k = pyro.sample("k", dist.Bernoulli(0.4))
            pyro.sample("obs", dist.Normal(w + k, 0.5), obs=Y)

    refused(tensor_scale, r"poutine.scale must be a number at and below enumerated sites")


@pytest.mark.parametrize("mark", [lambda model: model, partial(config_enumerate, num_samples=5)])
def test_unmarked_or_sampled_discrete_sites_are_refused_with_the_cure(mark: Callable[..., Any]) -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.4))
        pyro.sample("obs", dist.Normal(w + k, 0.5), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match=r"'k' of the model is discrete \(Bernoulli\).*config_enumerate"):
        ps.SAM_ELBO().loss_and_grads(mark(model), lambda: guides.normal("w"))


def test_running_statistics_advance_once_in_the_step_that_meets_the_first_enumerated_site() -> None:
    norm = torch.nn.BatchNorm1d(1)

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        x = norm(torch.arange(4.0)[:, None]).squeeze(-1)
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("obs", dist.Normal(x + k * loc, 1.0), obs=torch.zeros(4))

    def guide() -> None:
        pyro.sample("loc", dist.Normal(pyro.param("at", torch.tensor(0.1)), 0.1))

    elbo = ps.SAM_ELBO(ps.Adversarial(0.5))
    for step in (1, 2):
        elbo.loss_and_grads(model, guide)
        assert int(norm.num_batches_tracked) == step
