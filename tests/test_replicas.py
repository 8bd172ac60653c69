"""Replicas: each is what a run of its own would be, whatever becomes of the others."""

import gc
import io
import math
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal, init_to_feasible
from pyro.optim import Adam
from torch import Tensor, nn

import pyro_sam as ps
from pyro_sam._flat.passes import FlatPasses
from pyro_sam._flat.replicas import ReplicaPasses, ReplicaRan
from pyro_sam._graph import lowering
from pyro_sam._step.ordinary import OrdinaryPasses
from pyro_sam._step.side_by_side import SideBySide

R = 3
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = (X.sum(-1) > 0).long()
TARGETS = X.sum(-1).sin()


class Image(nn.Module):
    """Rows as small pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.conv(x.view(-1, 1, 2, 2)))).flatten(1))


class Sequence(nn.Module):
    """Rows as sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x.unsqueeze(-1))[0][:, -1])


def classifier(net: nn.Module) -> Any:
    bnn = ps.BayesianModule(net)

    def model(x: Tensor, y: Tensor | None = None) -> Any:
        logits = bnn(x)
        with pyro.plate("data", 50, subsample_size=len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    return model


def latents(x: Tensor, y: Tensor | None = None) -> Any:
    """Real latents under priors that are no scalar Normal, no network."""
    w = pyro.sample("w", dist.StudentT(4.0, torch.zeros(4), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(torch.zeros(()), 2.0))
    with pyro.plate("data", 50, subsample_size=len(x)):
        return pyro.sample("obs", dist.Normal(x @ w + b, 0.5), obs=y)


def hierarchy(x: Tensor, y: Tensor | None = None) -> Any:
    """A constrained latent, and a prior that depends on it."""
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(())))
    w = pyro.sample("w", dist.Normal(torch.zeros(4), tau).to_event(1))
    with pyro.plate("data", 50, subsample_size=len(x)):
        return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)


def dependent(x: Tensor, y: Tensor | None = None) -> Any:
    """A prior that depends on another real latent: the KL must not be taken at the adversary's noise."""
    m = pyro.sample("m", dist.Normal(torch.zeros(()), 1.0))
    w = pyro.sample("w", dist.Normal(m.expand(4), 1.0).to_event(1))
    with pyro.plate("data", 50, subsample_size=len(x)):
        return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)


MODELS: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "mlp": (lambda: classifier(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))), LABELS),
    "conv and GroupNorm": (lambda: classifier(Image()), LABELS),
    "LSTM": (lambda: classifier(Sequence()), LABELS),
    "latents": (lambda: latents, TARGETS),
    "hierarchy": (lambda: hierarchy, TARGETS),
    "dependent prior": (lambda: dependent, TARGETS),
}
NUMBERS = (0.3, 1.0, 2.5)
LAWS: dict[str, Callable[[Any], ps.Perturbation]] = {
    "Mean": lambda number: ps.Mean(),
    "Gaussian": lambda number: ps.Gaussian(),
    "Adversarial": lambda number: ps.Adversarial(number),
    "two steps": lambda number: ps.Adversarial(number, steps=2),
    "sign": lambda number: ps.Adversarial(number, ord=math.inf),
    "sign, two steps": lambda number: ps.Adversarial(number, ord=math.inf, steps=2),
    "euclidean": lambda number: ps.Adversarial(number, geometry="euclidean"),
    "adaptive": lambda number: ps.Adversarial(number, geometry="adaptive"),
    "fisher": lambda number: ps.Adversarial(number, geometry="fisher"),
    "drop-in radius": lambda number: ps.Adversarial(None),
    "MixSAM": lambda number: ps.MixSAM(number, kappa=number),
    "AscendedSample": lambda number: ps.AscendedSample(number),
    "Mixture": lambda number: ps.Mixture((ps.Adversarial(number), ps.AscendedSample(number)), (1.0, 0.0)),
}


DRAWS: dict[str, Callable[[], Any]] = {
    "NumPy's stream": lambda: np.random.normal,
    "Python's stream": lambda: random.random,
    "a generator of NumPy's": lambda: np.random.default_rng(1).normal,
    "a generator of torch's": lambda: partial(torch.rand, (), generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("law", [ps.Gaussian(), ps.AscendedSample()], ids=str)
def test_a_draw_from_another_stream_is_each_replicas_own(kind: str, law: ps.Perturbation) -> None:
    """Mapped over replicas, a model draws from it once for all of them; fast and ordinary steps draw for each."""

    def steps(**settings: Any) -> list[Tensor]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        bnn, draw = ps.BayesianModule(nn.Linear(4, 2)), DRAWS[kind]()

        def model(x: Tensor, y: Tensor) -> None:
            logits = bnn(x) * (1.0 + float(draw()))
            with pyro.plate("data", 50, subsample_size=len(x)):
                pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

        guide = ps.MeanFieldNormal(model, init_scale=0.2, num_replicas=R)
        elbo = ps.SAM_ELBO(law, **settings)
        return [elbo.loss_and_grads(model, guide, X, LABELS) and elbo.replica_losses for _ in range(3)]

    for fast, ordinary in zip(steps(), steps(fast=False), strict=True):
        torch.testing.assert_close(fast, ordinary, rtol=1e-12, atol=0.0)


class Noise:
    """Gives the rows of a step's noise that were fixed before, to replicas all and to a run of its own its one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.row: int | None = None
        for kind in (FlatPasses, ReplicaPasses, OrdinaryPasses, SideBySide):
            monkeypatch.setattr(kind, "gaussian", lambda passes: self.draw(passes.layout().d))

    def start(self, row: int | None, seed: int = 0) -> None:
        self.row = row
        torch.manual_seed(seed)

    def draw(self, d: int) -> Tensor:
        z = torch.randn(self.number, d)
        return z if self.row is None else z[self.row : self.row + 1].clone()

    number = R


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Noise:
    return Noise(monkeypatch)


def gradients(elbo: Any, model: Any, guide: Any, *args: Any) -> tuple[float, dict[str, Tensor]]:
    params = dict(guide.named_parameters())
    for param in params.values():
        param.grad = None
    loss = elbo.loss_and_grads(model, guide, *args)
    return loss, {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in params.items()}


def agree(noise: Noise, model: Any, y: Tensor, law: str, steps: int = 3, fast: bool = True, **settings: Any) -> Any:
    """Compare the losses and gradients of a few steps with those of runs of their own; return the estimator."""
    number, weights = NUMBERS, (1.0, 0.3, 0.0)
    guide = ps.MeanFieldNormal(model, init_scale=0.3, num_replicas=R).initialize(X, y)
    singles = [guide.replica(r) for r in range(R)]
    together = ps.SAM_ELBO(LAWS[law](number), kl_weight=weights, fast=fast, **settings)
    alone = [ps.SAM_ELBO(LAWS[law](number[r]), kl_weight=weights[r], **settings) for r in range(R)]
    for step in range(steps):
        noise.start(None, seed=step)
        loss, found = gradients(together, model, guide, X, y)
        losses = together.replica_losses
        assert losses is not None
        assert loss == pytest.approx(float(losses.sum()), rel=1e-12)
        for r in range(R):
            noise.start(r, seed=step)
            own_loss, own = gradients(alone[r], model, singles[r], X, y)
            assert float(losses[r]) == pytest.approx(own_loss, rel=1e-12)
            for name, gradient in own.items():
                torch.testing.assert_close(found[name][r], gradient, rtol=1e-11, atol=1e-12, msg=f"{name} of {r}")
    return together


def pair_of(elbo: Any) -> Any:
    (pair,) = elbo._knowledge._pairs.values()
    return pair


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("law", LAWS)
def test_each_law_is_that_of_a_run_of_its_own(noise: Noise, law: str, fast: bool) -> None:
    make, y = MODELS["mlp"]
    agree(noise, make(), y, law, fast=fast)


@pytest.mark.parametrize("law", ["Gaussian", "Adversarial", "MixSAM", "AscendedSample"])
@pytest.mark.parametrize("name", MODELS)
def test_each_model_is_that_of_a_run_of_its_own(noise: Noise, name: str, law: str) -> None:
    make, y = MODELS[name]
    agree(noise, make(), y, law)


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("Adversarial", {"scope": "site"}),
    ("MixSAM", {"scope": "event"}),
    ("Adversarial", {"scale_gradient": "mean"}),
    ("MixSAM", {"scale_gradient": "mean", "scope": "site"}),
    ("AscendedSample", {"ascent": "previous"}),
    ("Adversarial", {"ascent": "previous", "ascent_decay": 0.5}),
    ("AscendedSample", {"num_particles": 2}),
    ("MixSAM", {"num_particles": 2, "vectorize_particles": True}),
    ("AscendedSample", {"hide": ["0.bias"]}),
]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("law", "settings"), SETTINGS, ids=lambda value: str(value))
def test_each_setting_is_that_of_a_run_of_its_own(
    noise: Noise, monkeypatch: pytest.MonkeyPatch, law: str, settings: dict[str, Any], fast: bool
) -> None:
    if "vectorize_particles" in settings:  # replicas take their particles one by one
        monkeypatch.setattr(ps.SAM_ELBO, "_settings_for", _one_by_one)
    if "hide" in settings:  # hidden sites draw for themselves
        monkeypatch.setattr("pyro_sam._step.handlers.standard_normal", lambda core: torch.zeros(core.loc.shape) + 0.5)
    make, y = MODELS["mlp"]
    agree(noise, make(), y, law, fast=fast, **settings)


@pytest.mark.parametrize("fast", [True, False])
def test_a_scalar_latent_has_its_scale_gradient_at_the_mean(noise: Noise, fast: bool) -> None:
    make, y = MODELS["latents"]
    agree(noise, make(), y, "Adversarial", fast=fast, scale_gradient="mean")


def _one_by_one(elbo: Any, guide: Any) -> Any:
    return replace(elbo._settings, vectorize_particles=False)


@pytest.mark.parametrize(("law", "settings"), [("AscendedSample", {}), *SETTINGS[:-1]], ids=lambda value: str(value))
def test_captured_steps_are_those_of_runs_of_their_own(
    noise: Noise, monkeypatch: pytest.MonkeyPatch, law: str, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(lowering, "compiled", lambda graph, inputs: graph)
    if "vectorize_particles" in settings:
        monkeypatch.setattr(ps.SAM_ELBO, "_settings_for", _one_by_one)
    make, y = MODELS["mlp"]
    elbo = agree(noise, make(), y, law, compile=True, **settings)
    ((form,),) = [list(pair_of(elbo).graphs._entries.values())]
    assert form.variants[0].uses == 3


@pytest.mark.parametrize("name", ["conv and GroupNorm", "LSTM", "latents"])
def test_captured_models_are_those_of_runs_of_their_own(
    noise: Noise, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(lowering, "compiled", lambda graph, inputs: graph)
    make, y = MODELS[name]
    agree(noise, make(), y, "AscendedSample", compile=True)


@pytest.mark.parametrize("name", ["mlp", "conv and GroupNorm", "LSTM"])
def test_replicas_of_plain_models_run_as_one(name: str) -> None:
    make, y = MODELS[name]
    model = make()
    elbo = ps.SAM_ELBO(ps.Adversarial(NUMBERS))
    calls: list[int] = []

    def seen(*args: Any) -> Any:
        calls.append(1)
        return model(*args)

    guide = ps.MeanFieldNormal(seen, num_replicas=R)
    svi = SVI(seen, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(3):
        svi.step(X, y)
    calls.clear()
    svi.step(X, y)
    assert len(calls) == 2  # two passes, whatever the number of replicas, once the sentinel is silent


def test_two_hundred_steps_are_those_of_runs_of_their_own(noise: Noise) -> None:
    number, y = 8, LABELS
    noise.number = number
    model = MODELS["mlp"][0]()
    alpha = torch.linspace(-1.0, 3.0, number)
    weights = torch.logspace(-2, 0, number)
    rates = torch.logspace(-3, -1.5, number)
    guide = ps.MeanFieldNormal(model, init_scale=0.05, num_replicas=number).initialize(X, y)
    singles = [guide.replica(r) for r in range(number)]

    def train(guide: Any, law: ps.Perturbation, weight: Any, rate: Any, row: int | None) -> list[Any]:
        optim = ps.optim.JointOptim(torch.optim.Adam, {"lr": rate}, clip_norm=5.0)
        svi = SVI(model, guide, optim, ps.SAM_ELBO(law, kl_weight=weight))
        noise.start(row)
        norms = []
        for _ in range(200):
            svi.step(X, y)
            norms.append(optim.grad_norm)
        return norms

    norms = torch.stack(train(guide, ps.AscendedSample(alpha), weights, rates, None))  # type: ignore[arg-type]
    assert bool((norms > 5).any(0).all())  # every replica was clipped at some step
    trained = {name: param.detach().clone() for name, param in guide.named_parameters()}
    for r, single in enumerate(singles):
        train(single, ps.AscendedSample(float(alpha[r])), float(weights[r]), float(rates[r]), r)
        for name, param in single.named_parameters():
            torch.testing.assert_close(trained[name][r], param.detach(), rtol=1e-8, atol=1e-8, msg=f"{name} of {r}")


def test_dropout_masks_differ_between_replicas() -> None:
    bnn = ps.BayesianModule(nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 2)))

    def model(x: Tensor, y: Tensor) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    guide = ps.MeanFieldNormal(model, init_scale=1e-6, num_replicas=R, init_loc_fn=ps.nn.init_to_module(bnn))
    elbo = ps.SAM_ELBO(ps.Mean(), kl_weight=0.0)
    for _ in range(2):
        elbo.loss_and_grads(model, guide, X, LABELS)
        losses = elbo.replica_losses
        assert losses is not None
        assert len({round(float(loss), 6) for loss in losses}) == R  # the same weights, other masks


def test_both_passes_of_a_step_see_the_same_dropout_masks() -> None:
    model = classifier(nn.Sequential(nn.Linear(4, 20), nn.Dropout(0.5), nn.Linear(20, 2)))
    guide = ps.MeanFieldNormal(model, num_replicas=R)
    elbo = ps.SAM_ELBO(ps.Adversarial((0.0, 0.0, 0.0)), kl_weight=0.0)  # two passes, both at the mean
    elbo.loss_and_grads(model, guide, X, LABELS)
    pair = pair_of(elbo)
    losses: list[Tensor] = []
    right = ReplicaPasses._map

    def noted(passes: Any, values: Any, *, ends: bool) -> Any:
        run = right(passes, values, ends=ends)
        losses.append((run.data if ends else run).detach())
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReplicaPasses, "_map", noted)
        elbo.loss_and_grads(model, guide, X, LABELS)
    assert len(losses) == 2
    assert torch.equal(*losses)
    assert pair.draws
    assert not pair.unmappable


def test_each_replica_may_have_rows_of_its_own(noise: Noise) -> None:
    model, y = MODELS["mlp"][0](), LABELS
    rows = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(r))[:7] for r in range(R)])
    xs, ys = ps.per_replica(X[rows]), ps.per_replica(y[rows])
    guide = ps.MeanFieldNormal(model, num_replicas=R).initialize(xs, ys)
    for fast in (True, False):
        elbo = ps.SAM_ELBO(ps.AscendedSample(), fast=fast)
        for _ in range(2):
            noise.start(None)
            _, found = gradients(elbo, model, guide, xs, ys)
        for r in range(R):
            noise.start(r)
            single = guide.replica(r)
            _, own = gradients(ps.SAM_ELBO(ps.AscendedSample()), model, single, X[rows[r]], y[rows[r]])
            for name, gradient in own.items():
                torch.testing.assert_close(found[name][r], gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("fast", [True, False])
def test_a_replica_that_ends_in_nan_does_not_touch_the_others(noise: Noise, fast: bool) -> None:
    model, y = MODELS["mlp"][0](), LABELS
    guide = ps.MeanFieldNormal(model, num_replicas=R).initialize(X, y)
    single = guide.replica(2)
    with torch.no_grad():
        guide.get_parameter("locs.0.weight_unconstrained")[1] = math.nan

    def train(guide: Any, row: int | None) -> Any:
        optim = ps.optim.JointOptim(torch.optim.Adam, {"lr": 0.01}, clip_norm=1.0)
        svi = SVI(model, guide, optim, ps.SAM_ELBO(ps.AscendedSample(2.0), fast=fast))
        noise.start(row)
        return [svi.step(X, y) for _ in range(5)]

    with pytest.warns(UserWarning, match="replica 1 has values"):
        losses = train(guide, None)
    assert all(map(math.isfinite, losses))  # of the replicas that go on
    train(single, 2)
    for name, param in single.named_parameters():
        torch.testing.assert_close(guide.get_parameter(name)[2].detach(), param.detach(), rtol=1e-10, atol=1e-12)
    assert bool(guide.get_parameter("locs.0.weight_unconstrained")[1].isnan().all())


def test_where_no_replica_is_good_the_error_is_the_ordinary_one() -> None:
    model = MODELS["mlp"][0]()
    svi = SVI(model, ps.MeanFieldNormal(model, num_replicas=R), pyro.optim.Adam({"lr": 0.01}), ps.SAM_ELBO())
    svi.step(X, LABELS)
    with pytest.raises(ValueError, match="within the support"):
        svi.step(X, LABELS + 7)


def test_a_prior_that_comes_to_depend_on_a_latent_is_seen(noise: Noise) -> None:
    """Same sites, same distributions: only the graph of the step tells."""
    knobs = {"tied": False}

    def model(x: Tensor, y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(torch.zeros(()), 1.0))
        w = pyro.sample("w", dist.Normal(m.expand(4) if knobs["tied"] else torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)

    guide = ps.MeanFieldNormal(model, init_scale=0.3, num_replicas=R).initialize(X, TARGETS)
    fast, right = (ps.SAM_ELBO(ps.Adversarial(NUMBERS), fast=fast) for fast in (True, False))
    for tied in (False, False, True, False, True):
        knobs["tied"] = tied
        noise.start(None)
        loss, found = gradients(fast, model, guide, X, TARGETS)
        noise.start(None)
        right_loss, wanted = gradients(right, model, guide, X, TARGETS)
        assert loss == pytest.approx(right_loss, rel=1e-12)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-12)


# Where they start, and what becomes of one of them


def test_replicas_start_at_fresh_weights_and_the_first_at_the_networks() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    model = classifier(net)
    guide = ps.MeanFieldNormal(model, num_replicas=R).initialize(X, LABELS)
    weights = guide.get_parameter("locs.0.weight_unconstrained").detach()
    assert torch.equal(weights[0], net[0].weight)
    bound = 1 / math.sqrt(4)  # of torch's own start of a linear layer
    assert bool((weights[1:].abs() <= bound).all())
    assert len({tuple(row.flatten().tolist()) for row in weights}) == R
    pyro.clear_param_store()
    bnn = ps.BayesianModule(net)
    same = ps.MeanFieldNormal(classifier(net), num_replicas=R, init_loc_fn=ps.nn.init_to_module(bnn))
    weights = same.initialize(X, LABELS).get_parameter("locs.0.weight_unconstrained").detach()
    assert all(torch.equal(row, net[0].weight) for row in weights)


def test_a_rule_of_the_initial_scale_sees_each_replicas_own_site() -> None:
    model = MODELS["mlp"][0]()
    guide = ps.MeanFieldNormal(model, init_scale=lambda site: 0.1 * site["value"].abs() + 1e-3, num_replicas=R)
    guide.initialize(X, LABELS)
    for r in range(R):
        one = guide.replica(r)
        for name, loc in one.median().items():
            scale = attrgetter(name)(one.scales)
            torch.testing.assert_close(scale, 0.1 * loc.abs() + 1e-3)


def test_a_layer_that_cannot_start_anew_is_named() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    model = classifier(nn.Sequential(Gain(), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"Gain '0' has no method reset_parameters.*init_to_module"):
        ps.MeanFieldNormal(model, num_replicas=2).initialize(X, LABELS)


def test_one_replica_is_a_guide_of_its_own_saved_and_loaded_alone() -> None:
    model = MODELS["mlp"][0]()
    guide = ps.MeanFieldNormal(model, num_replicas=R)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), ps.SAM_ELBO(ps.Gaussian()))
    for _ in range(5):
        svi.step(X, LABELS)
    single = guide.replica(1)
    assert single.num_replicas is None
    with guide.as_replica(1):
        for name, value in guide.median().items():
            assert torch.equal(value, single.median()[name])
    file = io.BytesIO()
    torch.save(single.state_dict(), file)
    file.seek(0)
    pyro.clear_param_store()
    fresh = ps.MeanFieldNormal(model).initialize(X, LABELS)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for name, param in single.named_parameters():
        assert torch.equal(fresh.get_parameter(name), param)
    SVI(model, fresh, pyro.optim.Adam({"lr": 0.05}), ps.SAM_ELBO()).step(X, LABELS)


def test_several_replicas_are_a_guide_of_their_own_that_trains_and_predicts() -> None:
    model = MODELS["mlp"][0]()
    guide = ps.MeanFieldNormal(model, num_replicas=4, learn_scale=False)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), ps.SAM_ELBO(ps.Gaussian())).step(X, LABELS)
    some, before = guide.replicas(1, 3), [guide.replica(r).median() for r in range(4)]
    assert some.num_replicas == 2
    for r in range(2):
        for name, value in some.replica(r).median().items():
            assert torch.equal(value, before[1 + r][name])
    assert [*some.buffers()]
    for mine, of_all in zip(some.buffers(), guide.buffers(), strict=True):
        assert torch.equal(mine, of_all[1:3])
    SVI(model, some, pyro.optim.Adam({"lr": 0.05}), ps.SAM_ELBO(ps.Gaussian())).step(X, LABELS)
    for r in range(4):  # a copy
        assert all(torch.equal(value, before[r][name]) for name, value in guide.replica(r).median().items())
    assert not torch.equal(next(some.parameters())[0], next(guide.parameters())[1])
    mixed = ps.predict(model, some, X, num_samples=2)
    torch.testing.assert_close(mixed.probs, (mixed.replica(0).probs + mixed.replica(1).probs) / 2)


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (-1, 2), (2, 2), (3, 1), (0.0, 2), (0, "2")])
def test_replicas_that_are_not_there_are_refused(start: Any, stop: Any) -> None:
    model = MODELS["mlp"][0]()
    guide = ps.MeanFieldNormal(model, num_replicas=4)
    with pytest.raises(ValueError, match="no parameters yet"):
        guide.replicas(0, 2)
    guide.initialize(X, LABELS)
    with pytest.raises(ValueError, match=r"replica must be a whole number from 0 to 3|stop must be larger than start"):
        guide.replicas(start, stop)
    with pytest.raises(ValueError, match="has no replicas"):
        ps.MeanFieldNormal(model).initialize(X, LABELS).replicas(0, 1)


def test_a_copy_of_a_replica_keeps_its_parameters_when_another_is_made() -> None:
    """Two trainings' replicas have one name each in Pyro's store, which decides whose parameters a guide has."""
    model = MODELS["mlp"][0]()
    guide = ps.MeanFieldNormal(model, num_replicas=R).initialize(X, LABELS)
    first = guide.replica(1)
    first(X, LABELS)
    before = {name: value.clone() for name, value in first.median().items()}
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(1.0)
    second = guide.replica(1)
    second(X, LABELS)
    first(X, LABELS)
    for name, value in first.median().items():
        assert torch.equal(value, before[name])
        assert not torch.equal(value, second.median()[name])
    used = len(pyro.get_param_store())
    del first, second
    gc.collect()
    guide.replica(1)(X, LABELS)  # takes a name that nobody uses any more
    assert len(pyro.get_param_store()) == used


def test_predictions_mix_the_replicas() -> None:
    model = MODELS["mlp"][0]()
    guide = ps.MeanFieldNormal(model, init_scale=1e-6, num_replicas=R).initialize(X, LABELS)
    of_one = [ps.predict(model, guide.replica(r), X, num_samples=2).probs for r in range(R)]
    for at_once in (1, 2):
        mixed = ps.predict(model, guide, X, num_samples=2, samples_at_once=at_once)
        assert (mixed.num_replicas, mixed.num_samples) == (R, 2 * R)
        torch.testing.assert_close(mixed.probs, torch.stack(of_one).mean(0), rtol=1e-4, atol=1e-5)
        for r in range(R):
            torch.testing.assert_close(mixed.replica(r).probs, of_one[r], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ps.predict(model, guide, X, replica=2).probs, of_one[2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="replica must be a whole number from 0 to 2, got 3"):
        ps.predict(model, guide, X, replica=3)
    with pytest.raises(ValueError, match="needs a guide with replicas"):
        ps.predict(model, guide.replica(0), X, replica=0)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": [1.0, 0.5]}, "kl_weight must have a number for each of the guide's 3 replicas, got 2"),
        ({"perturbation": ps.Adversarial([1.0, 2.0])}, "rho must have a number for each"),  # type: ignore[arg-type]
        (
            {"perturbation": ps.Mixture((ps.AscendedSample((1.0, 2.0)), ps.Mean()), (0.5, 0.5))},
            "alpha must have a number for each",
        ),
    ],
)
def test_numbers_that_are_not_one_for_each_are_refused(settings: dict[str, Any], message: str) -> None:
    model = MODELS["mlp"][0]()
    guide = ps.MeanFieldNormal(model, num_replicas=R).initialize(X, LABELS)
    with pytest.raises(ValueError, match=message):
        ps.SAM_ELBO(**settings).loss_and_grads(model, guide, X, LABELS)
    with pytest.raises(ValueError, match=r"one for each replica, and the guide has no replicas.*num_replicas=2"):
        ps.SAM_ELBO(**settings).loss_and_grads(model, guide.replica(0), X, LABELS)


@pytest.mark.parametrize("auto", [True, False])
def test_numbers_for_each_replica_need_replicas_in_any_guide(auto: bool) -> None:
    def hand_written(x: Tensor, y: Tensor | None = None) -> None:
        loc = pyro.param("loc", torch.zeros(4))
        pyro.sample("w", dist.Normal(loc, 0.1).to_event(1))
        pyro.sample("b", dist.Normal(0.0, 0.1))

    guide = AutoNormal(latents) if auto else hand_written
    for settings in ({"kl_weight": [1.0, 0.5]}, {"perturbation": ps.AscendedSample([1.0, 2.0])}):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"one for each replica, and the guide has no replicas"):
            ps.SAM_ELBO(**settings).loss_and_grads(latents, guide, X, TARGETS)
    with pytest.raises(ValueError, match=r"rows for 12 replicas .* the guide has no replicas"):
        ps.SAM_ELBO().loss_and_grads(latents, guide, ps.per_replica(X), TARGETS)


def test_a_guide_with_replicas_inside_of_a_handler_is_refused() -> None:
    guide = ps.MeanFieldNormal(latents, num_replicas=R)
    with pytest.raises(ValueError, match="num_replicas cannot be trained inside of a handler"):
        ps.SAM_ELBO().loss_and_grads(latents, poutine.scale(guide, scale=0.5), X, TARGETS)


@pytest.mark.parametrize("numbers", [(), (1.0, -1.0), (1.0, math.nan), "ab"])
def test_each_number_is_checked(numbers: Any) -> None:
    with pytest.raises(ValueError, match="kl_weight"):
        ps.SAM_ELBO(kl_weight=numbers)
    with pytest.raises(ValueError, match="rho"):
        ps.Adversarial(numbers)


def test_running_statistics_and_parameters_that_all_would_share_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model = classifier(net)
    guide = ps.MeanFieldNormal(model, num_replicas=R)
    elbo = ps.SAM_ELBO()
    with pytest.raises(ValueError, match="BatchNorm1d cannot keep running statistics of several replicas"):
        elbo.loss_and_grads(model, guide, X, LABELS)
    net.eval()
    assert math.isfinite(elbo.loss_and_grads(model, guide, X, LABELS))

    def with_parameter(x: Tensor, y: Tensor) -> None:
        sigma = pyro.param("sigma", torch.ones(()))
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w, sigma.exp()), obs=y)

    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"parameters of its own \(sigma\), which all replicas would share"):
        ps.MeanFieldNormal(with_parameter, num_replicas=R).initialize(X, TARGETS)


class Counts(nn.Module):
    """Counts its runs, or keeps the mean of what it saw."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.register_buffer("kept", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.kept += 1 if self.what == "runs" else x.mean()
        return x


@pytest.mark.parametrize("fast", [True, False])
def test_a_buffer_is_written_once_a_step_or_refused_where_replicas_differ(fast: bool) -> None:
    counter = Counts("runs")
    model = classifier(nn.Sequential(nn.Linear(4, 3), counter, nn.Linear(3, 2)))
    guide = ps.MeanFieldNormal(model, num_replicas=R, init_loc_fn=init_to_feasible).initialize(X, LABELS)
    elbo = ps.SAM_ELBO(ps.Adversarial(1.0), fast=fast)
    for _ in range(3):
        elbo.loss_and_grads(model, guide, X, LABELS)
    assert counter.kept == 3
    pyro.clear_param_store()
    mean = Counts("mean")
    model = classifier(nn.Sequential(nn.Linear(4, 3), mean, nn.Linear(3, 2)))
    guide = ps.MeanFieldNormal(model, num_replicas=R, init_loc_fn=init_to_feasible).initialize(X, LABELS)
    with pytest.raises(ValueError, match="Counts writes to its buffer 'kept' what differs from replica to replica"):
        ps.SAM_ELBO(fast=fast).loss_and_grads(model, guide, X, LABELS)
    assert mean.kept == 0


@pytest.mark.parametrize("fast", [True, False])
def test_a_parameter_that_the_model_comes_to_have_is_refused(fast: bool) -> None:
    net = ps.BayesianModule(nn.Linear(4, 2))
    late = False

    def model(x: Tensor, y: Tensor) -> None:
        logits = net(x)
        if late:
            logits = logits * pyro.param("factor", torch.ones(2))
        with pyro.plate("data", 50, subsample_size=len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    guide = ps.MeanFieldNormal(model, num_replicas=2)
    svi = SVI(model, guide, Adam({"lr": 0.1}), ps.SAM_ELBO(fast=fast))
    svi.step(X, LABELS)
    svi.step(X, LABELS)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    late = True
    with pytest.raises(ValueError, match=r"parameters of its own \(factor\), which all replicas would share"):
        svi.step(X, LABELS)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


def test_optimisers_that_mix_elements_are_refused() -> None:
    model = MODELS["mlp"][0]()
    guide = ps.MeanFieldNormal(model, num_replicas=R)
    optim = ps.optim.JointOptim(torch.optim.LBFGS, {"lr": 0.1})
    svi = SVI(model, guide, optim, ps.SAM_ELBO())
    with pytest.raises(ValueError, match="LBFGS does not work element by element"):
        optim.minimize(svi, X, LABELS)
    with pytest.raises(ValueError, match="not in proportion"):
        ps.optim.JointOptim(torch.optim.Rprop, {"lr": (0.1, 0.2)})
    rates = ps.optim.JointOptim(torch.optim.Adam, {"lr": (0.1, 0.2)})
    with pytest.raises(ValueError, match="lr has 2 learning rates, one for each replica, got a guide with 3 replicas"):
        SVI(model, guide, rates, ps.SAM_ELBO()).step(X, LABELS)


def test_a_call_needs_to_know_which_replica() -> None:
    model = MODELS["mlp"][0]()
    guide = ps.MeanFieldNormal(model, num_replicas=R).initialize(X, LABELS)
    with pytest.raises(ValueError, match=r"num_replicas=3 has no sample of its own; use guide.replica\(r\)"):
        guide(X, LABELS)
    with pytest.raises(ValueError, match="num_replicas must be a whole number of at least 1"):
        ps.MeanFieldNormal(model, num_replicas=0)
    with pytest.raises(ValueError, match="the guide has no replicas"):
        ps.MeanFieldNormal(classifier(nn.Linear(4, 2))).replica(0)
    with pytest.raises(ValueError, match="rows for 2 replicas"):
        ps.SAM_ELBO().loss_and_grads(model, guide, ps.per_replica(X.view(2, 6, 4)), LABELS[:6])


@pytest.mark.watched
def test_the_sentinel_sees_a_wrong_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that leaks from one replica to another is noticed."""
    right = ReplicaRan.kl
    monkeypatch.setattr(ReplicaRan, "kl", lambda ran: right(ran).roll(1))  # type: ignore[union-attr]
    model = MODELS["mlp"][0]()
    guide = ps.MeanFieldNormal(model, num_replicas=R)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ps.SAM_ELBO(kl_weight=(0.1, 1.0, 2.0)))
    for _ in range(2):
        svi.step(X, LABELS)
    with pytest.warns(UserWarning, match="gave other numbers than the ordinary one"):
        svi.step(X, LABELS)


@pytest.mark.watched
def test_the_sentinel_passes_over_a_model_that_has_come_to_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout that is switched on just before a step that is looked at draws one by one in another order."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2)).eval()
    model = classifier(net)
    elbo = ps.SAM_ELBO()
    svi = SVI(model, ps.MeanFieldNormal(model, num_replicas=R), pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(2):
        svi.step(X, LABELS)
    net.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.step(X, LABELS)  # the second fast step: it is looked at
    assert pair_of(elbo).fast_steps == 2
    assert pair_of(elbo).draws
    assert not pair_of(elbo).slow
