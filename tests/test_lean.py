"""Lean steps: the numbers of ordinary ones by a short way, and an ordinary step wherever the way is closed."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.optim import SGD, Adam
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import kl_divergence

import pyro_sam as ps
from pyro_sam._flat.priors import NormalPriors
from pyro_sam._flat.recorder import Silence
from pyro_sam._flat.vectors import FlatNormal
from pyro_sam._step.memory import Layout
from pyro_sam.elbo import particle
from pyro_sam.elbo.particle import Particle

X, Y = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 2
SIZE = 40
Model = Callable[..., Any]


@pytest.fixture
def lean_losses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count lean steps that came to something."""
    taken: list[int] = []
    real = Particle._take_flat

    def take(self: Particle, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        taken.extend([] if result is None else [1])
        return result

    monkeypatch.setattr(Particle, "_take_flat", take)
    return taken


@contextmanager
def only_ordinary() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(particle, "PATIENCE", 0)
        yield


def network(prior: Any = None, **settings: Any) -> Model:
    """A classifier with all that later passes must share: running statistics, dropout masks, a subsampled plate."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2))
    bnn = ps.BayesianModule(net, prior, **settings)

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", SIZE, subsample_size=len(x)) as rows:
            noise = 0.1 * (rows - rows)  # indices are drawn, and held over the passes
        logits = bnn(x) + noise.unsqueeze(-1)
        with pyro.plate("data again", SIZE, subsample_size=len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    return model


def tied() -> Model:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    bnn = ps.BayesianModule(net)

    def model(x: Tensor, y: Tensor) -> None:
        logits = bnn(x)
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    return model


def by_hand() -> Model:
    """Latents in statements of their own: a scalar, a vector prior, one that is no Normal, one with a learnt scale."""

    def model(x: Tensor, y: Tensor) -> None:
        bias = pyro.sample("bias", dist.Normal(0.0, 2.0))
        w = pyro.sample("w", dist.Normal(torch.tensor([0.0, 1.0, -1.0]), torch.tensor([1.0, 2.0, 0.5])).to_event(1))
        heavy = pyro.sample("heavy", dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
        tau = pyro.param("tau", torch.tensor(1.5), constraint=constraints.positive)
        more = pyro.sample("more", dist.Normal(0.0, tau).expand([2]).to_event(1))
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))), poutine.mask(mask=y < 2):
            pyro.sample("obs", dist.Normal((x * w).sum(-1) + bias + heavy.sum(-1) * more.sum(-1), 1.0), obs=y.to(x))
        pyro.factor("penalty", -(bias**2))

    return model


def plain(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(3, 2), 1.0).to_event(2))
    b = pyro.sample("b", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
        pyro.sample("obs", dist.Categorical(logits=x @ w + b), obs=y)


MODELS: dict[str, Callable[[], Model]] = {
    "network": network,
    "fan-in": lambda: network(ps.nn.fan_in_normal(2.0)),
    "laplace": lambda: network(dist.Laplace(0.0, 1.0)),
    "vectors": lambda: network(lambda name, p: dist.Normal(0.1 * torch.ones(p.shape), 1.0 + torch.rand(p.shape))),
    "hidden weights": lambda: network(hide=["4"]),
    "tied": tied,
    "by hand": by_hand,
}
LAWS = [
    ps.Mean(),
    ps.Gaussian(),
    ps.Adversarial(0.5),
    ps.Adversarial(0.5, steps=2),
    ps.Adversarial(0.1, geometry="adaptive"),
    ps.Adversarial(0.1, ord=float("inf")),
    ps.MixSAM(0.5),
    ps.AscendedSample(0.5),
    ps.Mixture([ps.Gaussian(), ps.Adversarial(0.5)], [0.5, 0.5]),
]


def trained(model: Model, elbo: Any, guide: Any = None, sizes: Any = (6, 6, 4, 6, 4)) -> Any:
    """Return losses, parameters, running statistics and the random stream after a few steps of two batch sizes."""
    guide = ps.MeanFieldNormal(model) if guide is None else guide
    svi = SVI(model, guide, SGD({"lr": 1e-3}), elbo)
    pyro.set_rng_seed(1)
    losses = [svi.step(X[:n], Y[:n]) for n in sizes]
    losses.append(svi.evaluate_loss(X[:5], Y[:5]))
    parameters = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    return losses, parameters, torch.get_rng_state()


def assert_same(make: Callable[[], Model], elbo: Callable[[], Any], **settings: Any) -> None:
    results = []
    for context in (nullcontext(), only_ordinary()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        with context:
            model = make()
            results.append(trained(model, elbo(), ps.MeanFieldNormal(model, **settings)))
    (losses, parameters, stream), (losses_there, parameters_there, stream_there) = results
    assert losses == pytest.approx(losses_there, rel=1e-10)
    assert parameters.keys() == parameters_there.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(value, parameters_there[name], rtol=1e-8, atol=1e-10)
    assert torch.equal(stream, stream_there)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_every_law_gives_the_same_numbers(law: ps.Perturbation, lean_losses: list[int]) -> None:
    assert_same(network, lambda: ps.SAM_ELBO(law))
    assert len(lean_losses) == 6


@pytest.mark.parametrize("law", [ps.Gaussian(), ps.MixSAM(0.5)], ids=repr)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_kind_of_model_gives_the_same_numbers(
    make: Callable[[], Model], law: ps.Perturbation, lean_losses: list[int]
) -> None:
    assert_same(make, lambda: ps.SAM_ELBO(law))
    assert len(lean_losses) == 6


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_weight": 0.3},
        {"kl_weight": 0.0},
        {"scope": "site"},
        {"scope": "event"},
        {"scale_gradient": "mean", "perturbation": ps.Adversarial(0.5)},
        {"num_particles": 3},
        {"ascent": "previous", "ascent_decay": 0.6},
        {"ascent": "previous", "perturbation": ps.AscendedSample(-0.5)},
        {"retain_graph": True},
    ],
    ids=repr,
)
def test_every_setting_gives_the_same_numbers(settings: dict[str, Any], lean_losses: list[int]) -> None:
    assert_same(network, lambda: ps.SAM_ELBO(**{"perturbation": ps.MixSAM(0.5), **settings}))
    assert lean_losses


VECTORISED: list[dict[str, Any]] = [
    *({"perturbation": law} for law in LAWS),
    {"perturbation": ps.MixSAM(0.5), "scope": "site", "kl_weight": 0.3},
    {"perturbation": ps.MixSAM(0.5), "max_plate_nesting": 2},
    {"perturbation": ps.Adversarial(0.5), "scale_gradient": "mean"},
]


@pytest.mark.parametrize("settings", VECTORISED, ids=repr)
@pytest.mark.parametrize("make", [tied, by_hand])
def test_vectorised_particles_give_the_same_numbers(
    make: Callable[[], Model], settings: dict[str, Any], lean_losses: list[int]
) -> None:
    assert_same(make, lambda: ps.SAM_ELBO(**settings, num_particles=3, vectorize_particles=True))
    assert len(lean_losses) == 6


def test_vectorised_particles_under_another_prior_take_ordinary_steps(lean_losses: list[int]) -> None:
    def make() -> Model:
        bnn = ps.BayesianModule(nn.Linear(3, 2), dist.Laplace(0.0, 1.0))

        def model(x: Tensor, y: Tensor) -> None:
            logits = bnn(x)
            with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
                pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

        return model

    assert_same(make, lambda: ps.SAM_ELBO(ps.MixSAM(0.5), num_particles=3, vectorize_particles=True))
    assert not lean_losses


def test_a_fixed_scale_gives_the_same_numbers(lean_losses: list[int]) -> None:
    assert_same(network, lambda: ps.SAM_ELBO(ps.MixSAM(0.5)), learn_scale=False, init_scale=0.3)
    assert len(lean_losses) == 6


def test_a_network_in_bfloat16_takes_flat_steps(lean_losses: list[int]) -> None:
    bnn = ps.BayesianModule(nn.Linear(3, 2).to(torch.bfloat16))

    def model(x: Tensor, y: Tensor) -> None:
        logits = bnn(x)
        with pyro.plate("data", SIZE, subsample_size=len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    losses = []
    for fast in (True, False):
        pyro.clear_param_store()
        svi = SVI(model, ps.MeanFieldNormal(model), SGD({"lr": 0.0}), ps.SAM_ELBO(ps.Adversarial(), fast=fast))
        losses.append([svi.step(X.to(torch.bfloat16), Y) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert lean_losses


def test_the_differentiable_loss_has_the_same_gradients_and_curvature() -> None:
    model = tied()
    guide = ps.MeanFieldNormal(model).initialize(X, Y)
    guide(X, Y)
    elbo, results = ps.SAM_ELBO(ps.Adversarial(0.5)), []
    for context in (nullcontext(), only_ordinary()):
        with context:
            loss = elbo.differentiable_loss(model, guide, X, Y)
        parameters = list(guide.parameters())
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        curvature = torch.autograd.grad(sum((g**2).sum() for g in gradients), parameters)
        results.append([loss, *gradients, *curvature])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("prior_loc", "prior_scale"), [(0.0, 1.0), (0.7, 0.4)])
def test_the_kl_is_torchs_with_both_derivatives(prior_loc: float, prior_scale: float) -> None:
    loc, scale = torch.randn(5, requires_grad=True), torch.rand(5).add(0.5).requires_grad_()
    prior = dist.Normal(prior_loc, prior_scale).expand([5]).to_event(1)

    def kl(loc: Tensor, scale: Tensor) -> Tensor:
        flat = FlatNormal(Layout(("w",), (torch.Size([5]),), 1), loc, scale)
        (term,) = NormalPriors(flat.layout, {"w": prior}).kl(flat)
        return term

    torch.testing.assert_close(kl(loc, scale), kl_divergence(dist.Normal(loc, scale).to_event(1), prior))
    assert gradcheck(kl, (loc, scale))
    assert gradgradcheck(kl, (loc, scale))


def test_the_kl_of_a_posterior_next_to_its_prior_keeps_its_digits() -> None:
    # 10^5 terms of 0.5, in single precision, must cancel
    loc, scale = torch.zeros(100_000), torch.full((100_000,), 0.1 * 1.001)
    loc, scale = loc.float(), scale.float()
    flat = FlatNormal(Layout(("w",), (loc.shape,), 1), loc, scale)
    prior = dist.Normal(torch.tensor(0.0).float(), torch.tensor(0.1).float()).expand([len(loc)]).to_event(1)
    (found,) = NormalPriors(flat.layout, {"w": prior}).kl(flat)
    exact = kl_divergence(dist.Normal(loc.double(), scale.double()), dist.Normal(0.0, 0.1)).sum()
    assert float(found) == pytest.approx(float(exact), rel=0.02)


# Where only an ordinary step will do


def steps(model: Model, guide: Any, number: int = 3, law: ps.Perturbation | None = None) -> tuple[SVI, Any]:
    svi = SVI(model, guide, Adam({"lr": 0.02}), ps.SAM_ELBO(ps.Adversarial(0.5) if law is None else law))
    return svi, [svi.step(X, Y) for _ in range(number)]


class Halved(ps.MeanFieldNormal):
    """A guide with another posterior."""

    def _posterior(self, name: str) -> Any:
        loc, scale = self._get_loc_and_scale(name)
        return dist.Normal(loc, 0.5 * scale).to_event(self._event_dims[name])


def constrained(x: Tensor, y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x.sum(-1) * rate, 1.0), obs=y.to(x))


def hierarchical(x: Tensor, y: Tensor) -> None:
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(top, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y.to(x))


def local(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 1.0), obs=y.to(x))


@pytest.mark.parametrize(
    ("model", "kind"),
    [(constrained, ps.MeanFieldNormal), (hierarchical, ps.MeanFieldNormal), (local, ps.MeanFieldNormal)],
)
def test_other_models_take_ordinary_steps(model: Model, kind: Any, lean_losses: list[int]) -> None:
    steps(model, kind(model))
    assert not lean_losses


def test_a_hierarchy_is_lean_where_the_kl_is_taken_at_the_sample(lean_losses: list[int]) -> None:
    assert_same(lambda: hierarchical, lambda: ps.SAM_ELBO(ps.Gaussian()))
    assert len(lean_losses) == 6


def noisy_hierarchy(x: Tensor, y: Tensor) -> None:
    top = pyro.sample("top", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(top, 1.0).expand([3]).to_event(1))
    output = (nn.functional.dropout(x, 0.5) * w).sum(-1)
    with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
        pyro.sample("obs", dist.Normal(output, 1.0), obs=y.to(x))


def noisy_changes() -> Model:
    count = [0]

    def model(x: Tensor, y: Tensor) -> None:
        count[0] += torch.is_grad_enabled()
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        output = (nn.functional.dropout(x, 0.5) * w).sum(-1)
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
            pyro.sample(f"obs_{count[0]}", dist.Normal(output, 1.0), obs=y.to(x))

    return model


@pytest.mark.parametrize("law", [ps.Gaussian(), ps.MixSAM(0.5), ps.AscendedSample(0.5)], ids=repr)
@pytest.mark.parametrize("make", [lambda: noisy_hierarchy, noisy_changes], ids=["hierarchy", "changes"])
def test_an_ordinary_step_after_all_has_its_own_random_numbers(
    make: Callable[[], Model], law: ps.Perturbation, lean_losses: list[int]
) -> None:
    assert_same(make, lambda: ps.SAM_ELBO(law))
    # the last one is an evaluation, at a sample whatever the law
    in_hierarchy = 6 if isinstance(law, ps.Gaussian) else 1
    assert len(lean_losses) == (in_hierarchy if make() is noisy_hierarchy else 0)


def test_a_guide_with_another_posterior_is_called(lean_losses: list[int]) -> None:
    model = tied()
    steps(model, Halved(model))
    assert not lean_losses


def test_hooks_of_the_guide_are_called() -> None:
    model, calls = tied(), []
    guide = ps.MeanFieldNormal(model)
    guide.register_forward_hook(lambda *_: calls.append(1))
    steps(model, guide)
    assert len(calls) >= 3


def test_hooks_of_parameters_see_every_gradient() -> None:
    model = tied()
    guide = ps.MeanFieldNormal(model)
    svi, _ = steps(model, guide)
    seen = []
    leaf = guide.locs.get_parameter("0.weight_unconstrained")
    leaf.register_hook(lambda gradient: seen.append(gradient) or torch.zeros_like(gradient))
    before = leaf.detach().clone()
    other = guide.locs.get_parameter("2.bias_unconstrained").detach().clone()
    svi.optim = Adam({"lr": 0.02})  # without momentum from before
    svi.step(X, Y)
    assert len(seen) == 1
    assert torch.equal(leaf, before)
    assert not torch.equal(guide.locs.get_parameter("2.bias_unconstrained"), other)


def test_a_handler_around_the_step_has_its_effect(lean_losses: list[int]) -> None:
    model = tied()
    guide = ps.MeanFieldNormal(model)
    _, _ = steps(model, guide)
    elbo = ps.SAM_ELBO(ps.Adversarial(0.5))
    plain = elbo.loss_and_grads(model, guide, X, Y)
    taken = len(lean_losses)
    with poutine.scale(scale=0.5):
        assert elbo.loss_and_grads(model, guide, X, Y) == pytest.approx(0.5 * plain, rel=1e-8)
    assert len(lean_losses) == taken


def test_a_trace_of_parameters_sees_their_constrained_values(lean_losses: list[int]) -> None:
    model = tied()
    guide = ps.MeanFieldNormal(model)
    elbo = ps.SAM_ELBO(ps.Mean())
    results = []
    for context in (nullcontext(), only_ordinary()):
        with context, poutine.trace(param_only=True) as capture:
            elbo.loss_and_grads(model, guide, X, Y)
        results.append(capture.trace.nodes)
    assert len(lean_losses) == 1
    assert results[0].keys() == results[1].keys()
    for name, node in results[0].items():
        assert torch.equal(node["value"], results[1][name]["value"])
        assert node["value"].unconstrained() is results[1][name]["value"].unconstrained()
        assert node["type"] == "param"


def test_gradients_add_up_over_steps() -> None:
    model = tied()
    guide = ps.MeanFieldNormal(model).initialize(X, Y)
    guide(X, Y)
    elbo = ps.SAM_ELBO(ps.Adversarial(0.5))
    gradients = []
    for times in (1, 2):
        for parameter in guide.parameters():
            parameter.grad = None
        for _ in range(times):
            elbo.loss_and_grads(model, guide, X, Y)
        gradients.append([parameter.grad.clone() for parameter in guide.parameters()])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(2 * once, twice)


def test_a_frozen_parameter_gets_no_gradient() -> None:
    model = tied()
    guide = ps.MeanFieldNormal(model)
    svi, _ = steps(model, guide, 2)
    leaf = guide.scales.get_parameter("0.weight_unconstrained")
    leaf.requires_grad_(False)
    svi.loss_and_grads(model, guide, X, Y)
    assert not leaf.grad.any()
    assert guide.scales.get_parameter("0.bias_unconstrained").grad.any()


# What may change between two steps


def test_parameters_that_were_replaced_or_moved_are_the_ones_that_count(lean_losses: list[int]) -> None:
    model = tied()
    guide = ps.MeanFieldNormal(model)
    svi, _ = steps(model, guide, 2, ps.Mean())
    store = pyro.get_param_store()
    state = store.get_state()
    changed = {name: value + 1.0 for name, value in state["params"].items()}
    store.set_state({"params": changed, "constraints": state["constraints"]})
    found = svi.loss_and_grads(model, guide, X, Y)
    with only_ordinary():
        assert found == pytest.approx(svi.loss_and_grads(model, guide, X, Y), rel=1e-10)
    leaf = guide.locs.get_parameter("0.weight_unconstrained")
    leaf.data = leaf.data.clone() * 2  # no more a part of the vector
    found = svi.loss_and_grads(model, guide, X, Y)
    with only_ordinary():
        assert found == pytest.approx(svi.loss_and_grads(model, guide, X, Y), rel=1e-10)
    svi.step(X, Y)
    assert lean_losses


@pytest.mark.parametrize("changed", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g)), lambda g: g.float()])
def test_a_guide_that_was_copied_stored_or_converted_trains_on(changed: Callable[[Any], Any]) -> None:
    model = plain
    guide = ps.MeanFieldNormal(model)
    steps(model, guide, 2)
    guide = changed(guide)
    pyro.clear_param_store()
    elbo, losses = ps.SAM_ELBO(ps.Adversarial(0.5)), []
    x = X.to(guide.locs.get_parameter("w_unconstrained").dtype)
    for context in (nullcontext(), only_ordinary()):
        with context:
            losses += [elbo.loss_and_grads(model, guide, x, Y) for _ in range(2)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_an_empty_store_is_filled_again() -> None:
    model = tied()
    guide = ps.MeanFieldNormal(model)
    svi, _ = steps(model, guide, 2)
    pyro.clear_param_store()
    svi.step(X, Y)
    assert len(pyro.get_param_store()) == 6


def test_a_prior_that_is_written_to_is_the_one_that_counts(lean_losses: list[int]) -> None:
    loc = torch.tensor(0.0)
    net = nn.Linear(3, 2)
    bnn = ps.BayesianModule(net, dist.Normal(loc, torch.tensor(1.0)))

    def model(x: Tensor, y: Tensor) -> None:
        logits = bnn(x)
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    guide = ps.MeanFieldNormal(model)
    svi, _ = steps(model, guide, 2, ps.Mean())
    loc.fill_(3.0)
    found = svi.loss_and_grads(model, guide, X, Y)
    with only_ordinary():
        assert found == pytest.approx(svi.loss_and_grads(model, guide, X, Y), rel=1e-10)
    assert len(lean_losses) == 3


def test_a_network_that_was_changed_is_met_as_new() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    bnn = ps.BayesianModule(net)

    def model(x: Tensor, y: Tensor) -> None:
        logits = bnn(x)
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    guide = ps.MeanFieldNormal(model)
    svi, _ = steps(model, guide)
    net.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"2\.weight"):
        svi.step(X, Y)


def test_a_latent_that_appears_later_is_refused() -> None:
    appears = [False]

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        if appears[0]:
            pyro.sample("late", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y.to(x))

    guide = ps.MeanFieldNormal(model)
    svi, _ = steps(model, guide)
    appears[0] = True
    with pytest.raises(ValueError, match="late"):
        svi.step(X, Y)


def test_a_structure_that_changes_all_the_time_is_trained_in_ordinary_steps(lean_losses: list[int]) -> None:
    count = [0]

    def model(x: Tensor, y: Tensor) -> None:
        count[0] += 1
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample(f"obs_{count[0]}", dist.Normal(x @ w, 1.0), obs=y.to(x))

    guide = ps.MeanFieldNormal(model)
    svi, _ = steps(model, guide, 5, ps.Gaussian())
    assert not lean_losses
    before = count[0]
    svi.step(X, Y)
    assert count[0] == before + 1  # no more is tried


def test_wrong_values_are_refused_in_a_later_step_and_change_nothing() -> None:
    pyro.set_rng_seed(3)
    model = network()
    guide = ps.MeanFieldNormal(model)
    svi, _ = steps(model, guide)
    before = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    for x, y in ((X, Y + 5), (X * torch.nan, Y), (X[:, :2], Y)):
        with pytest.raises((ValueError, RuntimeError)):
            svi.step(x, y)
    for name, parameter in pyro.get_param_store().named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.grad.any()
    svi.step(X, Y)


def test_passes_leave_running_statistics_as_one_run_does() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    bnn = ps.BayesianModule(net)

    def model(x: Tensor, y: Tensor) -> None:
        logits = bnn(x)
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    steps(model, ps.MeanFieldNormal(model), 4, ps.Adversarial(0.5, steps=3))
    assert int(net[1].num_batches_tracked) == 4


def test_modules_after_the_network_are_watched_again() -> None:
    net, after = nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False)
    bnn = ps.BayesianModule(net)

    def model(x: Tensor, y: Tensor) -> None:
        logits = after(bnn(x))
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    weight, before = net.weight, net.weight.detach().clone()
    steps(model, ps.MeanFieldNormal(model), 4)
    assert int(after.num_batches_tracked) == 4
    assert net.weight is weight
    assert torch.equal(weight, before)


class BadGradient(torch.autograd.Function):
    """The identity; on demand its gradient is infinite."""

    is_bad = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Tensor:
        return outer * torch.inf if BadGradient.is_bad else outer


def test_a_gradient_that_is_not_finite_leaves_the_ascent_of_earlier_steps(lean_losses: list[int]) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Normal(x @ BadGradient.apply(w), 1.0), obs=y.to(x))

    guide = ps.MeanFieldNormal(model)
    elbo = ps.SAM_ELBO(ps.Adversarial(0.5), ascent="previous")
    averages = []
    for bad in (False, True, False):
        BadGradient.is_bad = bad
        elbo.loss_and_grads(model, guide, X, Y)
        averages.append(elbo.state_dict()["ascent"]["w"])
    assert torch.equal(averages[0], averages[1])
    assert not torch.equal(averages[1], averages[2])
    assert len(lean_losses) == 3


def test_a_masked_observation_is_looked_at_too() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))), poutine.mask(mask=torch.arange(len(x)) > 0):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y.to(x))

    svi, _ = steps(model, ps.MeanFieldNormal(model), 2)
    y = Y.to(X)
    y[0] = torch.nan
    with pytest.raises(ValueError, match="support"):
        svi.step(X, y)


class Hidden(nn.Module):
    """A network whose normalisation layer is not found among its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(3, 4), [nn.BatchNorm1d(4, affine=False)]

    def forward(self, x: Tensor) -> Any:
        return self.rest[0](self.first(x))


def test_running_statistics_out_of_sight_are_left_alone_too() -> None:
    net = Hidden()
    bnn = ps.BayesianModule(net)

    def model(x: Tensor, y: Tensor) -> None:
        logits = bnn(x)
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    steps(model, ps.MeanFieldNormal(model), 4)
    assert int(net.rest[0].num_batches_tracked) == 4


def test_running_statistics_that_come_later_are_left_alone_too(lean_losses: list[int]) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 2))
    bnn = ps.BayesianModule(net)

    def model(x: Tensor, y: Tensor) -> None:
        logits = bnn(x)
        with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    svi, _ = steps(model, ps.MeanFieldNormal(model), 3)
    net[1] = nn.BatchNorm1d(4, affine=False)
    for _ in range(3):
        svi.step(X, Y)
    assert int(net[1].num_batches_tracked) == 3
    assert len(lean_losses) == 6


def test_a_structure_is_met_before_an_interruption_as_after_it() -> None:
    # a step's numbers do not depend on whether it is the first one of an estimator
    model = network()
    guide = ps.MeanFieldNormal(model)
    first, second = ps.SAM_ELBO(ps.MixSAM(0.5)), ps.SAM_ELBO(ps.MixSAM(0.5))
    first.loss_and_grads(model, guide, X, Y)
    losses = []
    for elbo in (first, second):
        pyro.set_rng_seed(5)
        losses.append(elbo.loss_and_grads(model, guide, X, Y))
    assert losses[0] == losses[1]


def test_evaluations_in_inference_mode_leave_training_lean(lean_losses: list[int]) -> None:
    model = tied()
    svi, _ = steps(model, ps.MeanFieldNormal(model), 2)
    with torch.inference_mode():
        for _ in range(5):
            svi.evaluate_loss(X[:7], Y[:7])  # of a size that no step has met
    assert len(lean_losses) == 7
    svi.step(X, Y)
    assert len(lean_losses) == 8


def test_a_network_hears_of_no_recorder_behind_silence() -> None:
    bnn = ps.BayesianModule(nn.Linear(3, 2))
    with poutine.trace(), Silence():
        assert bnn(X).shape == (12, 2)


def test_evaluation_in_inference_mode() -> None:
    model = tied()
    guide = ps.MeanFieldNormal(model)
    svi, _ = steps(model, guide)
    with torch.inference_mode():
        x, y = X[:7].clone(), Y[:7].clone()
        pyro.set_rng_seed(2)
        found = svi.evaluate_loss(x, y)
    pyro.set_rng_seed(2)
    assert found == pytest.approx(svi.evaluate_loss(X[:7], Y[:7]), rel=1e-10)
