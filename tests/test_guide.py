"""MeanFieldNormal against Pyro's AutoNormal and closed forms."""

import copy
import math
import pickle
import sys
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_sample
from pyro.poutine import trace
from torch.distributions import constraints, kl_divergence

import pyro_sam as ps


def model() -> None:
    """One latent of each kind of support."""
    pyro.sample("real", dist.Normal(torch.tensor([1.0, -1.0]), 2.0).to_event(1))
    pyro.sample("positive", dist.LogNormal(0.5, 0.7))
    with pyro.plate("rows", 3):
        pyro.sample("vector", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("unit", dist.Beta(2.0, 3.0))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(4)))
    pyro.sample("bounded", dist.Uniform(-2.0, 5.0))
    pyro.sample("cholesky", dist.LKJCholesky(3, 1.0))


NAMES = ["real", "positive", "vector", "unit", "simplex", "bounded", "cholesky"]


def moved(guide: Any) -> Any:
    guide.initialize() if isinstance(guide, ps.MeanFieldNormal) else guide()
    torch.manual_seed(1)
    for parameter in guide.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return guide


def test_samples_are_those_of_auto_normal() -> None:
    guides = [moved(make(model)) for make in (ps.MeanFieldNormal, AutoNormal)]
    values = []
    for guide in guides:
        torch.manual_seed(2)
        values.append(guide())
    assert list(values[0]) == NAMES
    for name in NAMES:
        torch.testing.assert_close(values[0][name], values[1][name])


def test_median_and_quantiles_are_those_of_auto_normal() -> None:
    guides = [moved(make(model)) for make in (ps.MeanFieldNormal, AutoNormal)]
    for name in NAMES:
        torch.testing.assert_close(guides[0].median()[name], guides[1].median()[name])
        torch.testing.assert_close(guides[0].quantiles([0.05, 0.95])[name], guides[1].quantiles([0.05, 0.95])[name])


def test_quantiles_of_a_real_latent_are_the_normals() -> None:
    def at_prior_mean(site: Any) -> torch.Tensor:
        return site["fn"].mean if site["name"] == "real" else site["fn"].sample()

    guide = ps.MeanFieldNormal(model, init_loc_fn=at_prior_mean, init_scale=0.4).initialize()
    lower, upper = guide.quantiles([0.05, 0.95])["real"].detach()
    z = 1.6448536269514722
    torch.testing.assert_close(lower, torch.tensor([1.0, -1.0]) - 0.4 * z)
    torch.testing.assert_close(upper, torch.tensor([1.0, -1.0]) + 0.4 * z)


def test_density_is_that_of_auto_normal() -> None:
    # AutoNormal's auxiliary Normal and Delta together are the pushed-forward Normal
    for name in NAMES:
        torch.manual_seed(2)
        ours = trace(moved(ps.MeanFieldNormal(model))).get_trace()
        pyro.clear_param_store()
        torch.manual_seed(2)
        theirs = trace(moved(AutoNormal(model))).get_trace()
        ours.compute_log_prob()
        theirs.compute_log_prob()
        expected = theirs.nodes[name]["log_prob"] + theirs.nodes[name + "_unconstrained"]["log_prob"]
        torch.manual_seed(2)
        torch.testing.assert_close(ours.nodes[name]["log_prob"], expected)


def test_kl_is_closed_form_for_gaussian_and_log_normal_priors() -> None:
    guide = moved(ps.MeanFieldNormal(model))
    q, p = trace(guide).get_trace().nodes, trace(model).get_trace().nodes
    for name in ("real", "positive", "vector"):
        assert kl_divergence(q[name]["fn"], p[name]["fn"]).shape == q[name]["fn"].batch_shape
    loc, scale = guide._get_loc_and_scale("positive")
    expected = kl_divergence(dist.Normal(loc, scale), dist.Normal(0.5, 0.7))
    torch.testing.assert_close(kl_divergence(q["positive"]["fn"], p["positive"]["fn"]), expected)


def test_elbos_of_pyro_agree_in_expectation() -> None:
    guide = moved(ps.MeanFieldNormal(model))
    losses = {
        elbo: torch.tensor([elbo().loss(model, guide) for _ in range(600)])
        for elbo in (Trace_ELBO, TraceMeanField_ELBO, lambda: ps.SAM_ELBO(ps.Gaussian()))
    }
    first, *others = losses.values()
    for other in others:
        assert abs(first.mean() - other.mean()) < 4 * (first.var() + other.var()).sqrt() / 600**0.5


def test_starting_points() -> None:
    def proposing() -> None:
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"init_value": torch.tensor([3.0, 4.0])})
        pyro.sample("v", dist.Normal(5.0, 1.0))

    guide = ps.MeanFieldNormal(proposing).initialize()
    assert guide.median()["w"].tolist() == [3.0, 4.0]
    assert guide.median()["v"].item() == 0.0  # feasible, as in AutoNormal
    pyro.clear_param_store()
    guide = ps.MeanFieldNormal(proposing, init_loc_fn=init_to_sample).initialize()
    assert guide.median()["w"].tolist() != [3.0, 4.0]


def test_initial_scales() -> None:
    def by_site(site: Any) -> float | torch.Tensor:
        return torch.tensor([0.1, 0.2]) if site["name"] == "real" else 0.7

    guide = ps.MeanFieldNormal(model, init_scale=by_site).initialize()
    torch.testing.assert_close(guide._get_loc_and_scale("real")[1], torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(guide._get_loc_and_scale("unit")[1], torch.full((3,), 0.7))
    pyro.clear_param_store()
    guide = ps.MeanFieldNormal(model, init_scale=1).initialize()
    torch.testing.assert_close(guide._get_loc_and_scale("unit")[1], torch.ones(3))


def test_fixed_scale_is_no_parameter_but_part_of_the_state() -> None:
    guide = ps.MeanFieldNormal(model, init_scale=0.3, learn_scale=False).initialize()
    assert not [name for name, _ in guide.named_parameters() if "scales" in name]
    assert {name for name, _ in guide.named_buffers()} == {f"scales.{name}" for name in NAMES}
    guide()
    ps.SAM_ELBO().loss_and_grads(model, guide)
    assert torch.equal(guide.scales.unit, torch.full((3,), 0.3))
    assert not [name for name in pyro.get_param_store() if "scales" in name]


@pytest.mark.parametrize("learn_scale", [True, False])
def test_subsampled_local_latents(learn_scale: bool) -> None:
    def local(full: bool = False) -> None:
        with pyro.plate("data", 6, subsample_size=2) as idx:
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 2), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(z.sum(-1), 1.0), obs=idx.double())

    def scales(site: Any) -> torch.Tensor:
        return torch.arange(1.0, 13.0).reshape(6, 2)

    guide = ps.MeanFieldNormal(local, init_scale=scales, learn_scale=learn_scale).initialize()
    recorded = trace(guide).get_trace()
    idx = recorded.nodes["data"]["value"]
    assert recorded.nodes["z"]["fn"].batch_shape == (2,)
    torch.testing.assert_close(recorded.nodes["z"]["fn"].base_dist.scale.detach(), scales(None)[idx])
    loss = ps.SAM_ELBO(ps.Adversarial(0.5), scope="event").loss_and_grads(local, guide)
    assert math.isfinite(loss)


def test_parameters_exist_after_initialize_and_load() -> None:
    guide = moved(ps.MeanFieldNormal(model))
    state = copy.deepcopy(guide.state_dict())
    pyro.clear_param_store()
    fresh = ps.MeanFieldNormal(model).initialize()
    fresh.load_state_dict(state)
    for name in NAMES:
        torch.testing.assert_close(fresh.median()[name], guide.median()[name])
    locs = dict(fresh.named_parameters())["locs.real_unconstrained"]
    fresh.initialize()  # again: nothing happens
    assert dict(fresh.named_parameters())["locs.real_unconstrained"] is locs


def test_copies_and_pickles() -> None:
    guide = moved(ps.MeanFieldNormal(model))
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        for name in NAMES:
            torch.testing.assert_close(twin.median()[name], guide.median()[name])


def test_predictive_of_pyro_works() -> None:
    x = torch.linspace(-1, 1, 10)

    def regression(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10):
            pyro.sample("obs", dist.Normal(w * x, 0.1), obs=y)

    guide = ps.MeanFieldNormal(regression, init_scale=0.3).initialize(x, x)
    for parallel in (False, True):
        samples = Predictive(regression, guide=guide, num_samples=500, parallel=parallel)(x)
        assert samples["obs"].shape == (500, 10)
        variance = 0.3**2 * x**2 + 0.1**2
        estimate = samples["obs"].var(0)
        assert (abs(estimate - variance) < 5 * variance * (2 / 500) ** 0.5).all()


def test_module_local_parameters() -> None:
    with pyro.settings.context(module_local_params=True):
        guide = ps.MeanFieldNormal(model)
        guide.initialize()
        module = ps.SAM_ELBO(ps.Adversarial(0.3))(model, guide)
        module().backward()
        assert len(pyro.get_param_store()) == 0
        assert all(p.grad is not None for p in guide.parameters())


def test_support_is_a_constraint_of_the_values() -> None:
    guide = moved(ps.MeanFieldNormal(model, init_scale=2.0))
    values = guide()
    assert constraints.simplex.check(values["simplex"]).all()
    assert constraints.lower_cholesky.check(values["cholesky"]).all()
    assert ((values["bounded"] > -2) & (values["bounded"] < 5)).all()


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (0.0, r"init_scale must be a positive finite number, got init_scale=0.0"),
        (-1.0, r"init_scale must be a positive finite number"),
        (math.nan, r"init_scale must be a positive finite number, got init_scale=nan"),
        (math.inf, r"init_scale must be a positive finite number"),
        ("wide", r"init_scale must be a positive finite number, got init_scale='wide'"),
        (True, r"init_scale must be a positive finite number"),
        (lambda site: 0.0, r"positive finite number at site 'real', got init_scale=0.0"),
        (lambda site: torch.tensor(-0.1), r"positive and finite at site 'real', got a tensor with minimum -0.1"),
        (lambda site: torch.tensor(math.nan), r"positive and finite at site 'real', got a tensor with minimum nan"),
        (lambda site: torch.ones(7), r"broadcast to the loc's shape \(2,\) at site 'real', got shape \(7,\)"),
    ],
)
def test_bad_initial_scales_are_refused(scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ps.MeanFieldNormal(model, init_scale=scale).initialize()
    assert len(pyro.get_param_store()) == 0


def test_discrete_latents_are_refused_by_name() -> None:
    def discrete() -> None:
        pyro.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="discrete sample site 'k'"):
        ps.MeanFieldNormal(discrete).initialize()


def test_a_guide_that_failed_to_start_starts_anew() -> None:
    tries = []

    def init_scale(site: Any) -> float:
        tries.append(site["name"])
        if len(tries) == 1:
            raise RuntimeError("not yet")
        return 0.3

    guide = ps.MeanFieldNormal(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)), init_scale=init_scale)
    with pytest.raises(RuntimeError, match="not yet"):
        guide()
    guide.initialize()
    torch.testing.assert_close(guide.scales.w.detach(), torch.tensor(0.3))


@pytest.mark.parametrize("local", [False, True])
def test_training_the_guide_leaves_the_network_as_it_was(local: bool) -> None:
    net = torch.nn.Linear(2, 1)
    before = net.weight.detach().clone()
    with pyro.settings.context(module_local_params=local):
        bnn = ps.BayesianModule(net)

        def model() -> None:
            out = bnn(torch.ones(3, 2)).squeeze(-1)
            with pyro.plate("data", 3):
                pyro.sample("obs", dist.Normal(out, 0.1), obs=torch.zeros(3))

        guide = ps.MeanFieldNormal(model).initialize()
        elbo = ps.SAM_ELBO(ps.Mean())(model, guide)
        optimiser = torch.optim.SGD(guide.parameters(), lr=0.01)
        elbo().backward()
        optimiser.step()
        assert not torch.equal(guide.locs.weight, before)
    assert torch.equal(net.weight, before)


def test_the_param_store_holds_nothing_but_the_guides_parameters() -> None:
    guide = ps.MeanFieldNormal(model).initialize()
    guide()
    store: Any = pyro.get_param_store()
    assert {id(p) for p in store._param_to_name} == {id(p) for p in guide.parameters()}


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("learn_scale", [False, True])
def test_a_first_step_that_sets_the_guide_up_shows_its_parameters_alone(learn_scale: bool, local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        guide = ps.MeanFieldNormal(model, learn_scale=learn_scale)
        with trace(param_only=True) as statements:
            guide()
        shown = {id(site["value"].unconstrained()) for site in statements.trace.nodes.values()}
        assert shown == {id(parameter) for parameter in guide.parameters()}


def test_a_guide_that_was_pickled_before_its_parts_moved_goes_on() -> None:
    guide = ps.MeanFieldNormal(pickled_model).initialize()
    elbo = ps.SAM_ELBO(ps.Gaussian())
    for _ in range(2):
        elbo.loss_and_grads(pickled_model, guide)
    # as such a pickle has it: under another module's name, and without what came later
    assert sys.modules["pyro_sam.flat"].FlatParameters is type(guide._flat)
    del guide._flat._layout
    again = pickle.loads(pickle.dumps(guide))
    losses = []
    for each in (again, again.__class__(pickled_model)):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        values = {name: p.detach().clone() for name, p in again.named_parameters()}
        each.initialize().load_state_dict({**each.state_dict(), **values})
        pyro.set_rng_seed(4)
        losses.append(elbo.loss_and_grads(pickled_model, each))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def pickled_model() -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("obs", dist.Normal(w.sum(), 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize("num_replicas", [None, 3])
def test_a_sam_radius_is_how_far_noise_of_the_length_of_a_draw_moves_all_latents(num_replicas: int | None) -> None:
    guide = ps.MeanFieldNormal(
        model, init_scale=ps.SAMRadius(0.3), learn_scale=False, num_replicas=num_replicas
    ).initialize()
    scales = [guide.replica(0), guide.replica(2)] if num_replicas else [guide]
    for single in scales:
        every = torch.cat([scale.flatten() for scale in single.scales.buffers()])
        assert float(every.norm()) == pytest.approx(0.3)
        assert len(every) == 19  # 2 + 1 + 6 + 3 + 3 + 1 + 3 unconstrained scalars
        assert every.unique().numel() == 1


@pytest.mark.parametrize(
    ("radius", "what"),
    [(0.0, "positive"), (-1.0, "positive"), (math.inf, "a finite number"), ("wide", "a finite number")],
)
def test_a_sam_radius_is_positive(radius: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"radius must be {what}, got radius="):
        ps.SAMRadius(radius)


@pytest.mark.parametrize("learn_scale", [True, False])
def test_the_posterior_is_what_the_guide_samples_from(learn_scale: bool) -> None:
    guide = moved(ps.MeanFieldNormal(model, learn_scale=learn_scale))
    posterior = guide.posterior()
    assert list(posterior) == NAMES
    nodes = trace(guide).get_trace().nodes
    for name, site in posterior.items():
        value = nodes[name]["value"]
        assert site.shape() == nodes[name]["fn"].shape()
        torch.testing.assert_close(site.log_prob(value), nodes[name]["fn"].log_prob(value))
    torch.testing.assert_close(posterior["real"].mean, guide.median()["real"])
    half_width = (guide.quantiles([0.841344746])["real"][0] - guide.median()["real"]).detach()
    torch.testing.assert_close(posterior["real"].stddev, half_width, rtol=1e-6, atol=1e-6)


def test_the_posterior_stays_when_training_goes_on() -> None:
    guide = ps.MeanFieldNormal(model).initialize()
    posterior = guide.posterior()
    values = guide.median()
    known = {name: posterior[name].log_prob(values[name]) for name in NAMES}
    moved(guide)
    for name in NAMES:
        assert torch.equal(posterior[name].log_prob(values[name]), known[name])
        assert not known[name].requires_grad


def test_the_posterior_as_the_next_prior_has_no_kl_to_itself() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    guide = ps.MeanFieldNormal(ps.BayesianModule(net)).initialize(torch.randn(4, 3))
    torch.manual_seed(1)
    for parameter in guide.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    posterior = guide.posterior()
    following = ps.BayesianModule(net, prior=lambda name, parameter: posterior[name])
    prior = trace(following).get_trace(torch.randn(4, 3)).nodes
    for name in posterior:
        assert kl_divergence(posterior[name], prior[name]["fn"]) == 0


@pytest.mark.parametrize("read", [lambda g: g.median(), lambda g: g.quantiles([0.5]), lambda g: g.posterior()])
def test_a_guide_without_parameters_or_with_replicas_has_no_posterior_of_its_own(read: Any) -> None:
    with pytest.raises(ValueError, match=r"no parameters yet; call guide.initialize\(\*args\)"):
        read(ps.MeanFieldNormal(model))
    guide = ps.MeanFieldNormal(model, num_replicas=2).initialize()
    with pytest.raises(ValueError, match=r"use guide.replica\(r\)"):
        read(guide)
    read(guide.replica(1))
