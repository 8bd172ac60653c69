"""Fact 9: the ascent leaves no trace, also when the model raises, and all passes see the same randomness."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Quadratic
from pyro.infer import SVI
from pyro.optim import Adam
from torch import nn

import pyro_sam as ps

X = torch.linspace(-1, 1, 60).reshape(30, 2).double()
Y = torch.sin(3 * X.sum(-1))

LAWS = [
    ps.Mean(),
    ps.Gaussian(),
    ps.Adversarial(0.5),
    ps.Adversarial(0.5, steps=3),
    ps.MixSAM(0.5),
    ps.AscendedSample(0.5),
    ps.Mixture([ps.Adversarial(0.5), ps.AscendedSample(0.5)], [0.5, 0.5]),
]


class Recorder:
    """A model that keeps what each run of it saw: dropout mask, minibatch, own sample of an unperturbed site."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor] = []
        self.batches: list[torch.Tensor] = []
        self.gammas: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []

    def model(self) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        mask = nn.functional.dropout(torch.ones(40), 0.5)
        with pyro.plate("data", 30, subsample_size=7) as idx:
            pyro.sample("obs", dist.Normal(X[idx] @ w + mask[:7], rate), obs=Y[idx])
        self.masks.append(mask)
        self.batches.append(idx)
        self.gammas.append(rate.detach())
        self.weights.append(w.detach())

    def guide(self) -> None:
        loc = pyro.param("loc", torch.tensor([0.3, -0.2]))
        concentration = pyro.param("concentration", torch.tensor(3.0), constraint=dist.constraints.positive)
        # encoder dropout, drawn before and after the perturbed site
        before = nn.functional.dropout(torch.ones(2), 0.5)
        pyro.sample("w", dist.Normal(loc + 0.01 * before, 0.1).to_event(1))
        after = nn.functional.dropout(torch.ones(()), 0.5)
        pyro.sample("rate", dist.Gamma(concentration + 0.1 * after, 2.0))


def all_equal(tensors: list[torch.Tensor]) -> bool:
    return all(torch.equal(tensors[0], other) for other in tensors[1:])


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_all_passes_of_a_step_see_the_same_randomness(law: ps.Perturbation) -> None:
    record = Recorder()
    ps.SAM_ELBO(law).loss_and_grads(record.model, record.guide)
    assert all_equal(record.masks)
    assert all_equal(record.batches)
    assert all_equal(record.gammas)
    if law.uses_gradient:
        assert not all_equal(record.weights)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_steps_differ_from_each_other(law: ps.Perturbation) -> None:
    record = Recorder()
    elbo = ps.SAM_ELBO(law)
    elbo.loss_and_grads(record.model, record.guide)
    runs = len(record.masks)
    elbo.loss_and_grads(record.model, record.guide)
    assert not torch.equal(record.masks[0], record.masks[runs])
    assert not torch.equal(record.batches[0], record.batches[runs])
    assert not torch.equal(record.gammas[0], record.gammas[runs])


@pytest.mark.parametrize("law", [ps.Mean(), ps.Adversarial(0.5)], ids=repr)
def test_a_step_advances_the_random_stream_like_one_run(law: ps.Perturbation) -> None:
    record = Recorder()
    pyro.set_rng_seed(3)
    ps.SAM_ELBO(law, kl_weight=0.0).loss_and_grads(record.model, record.guide)
    after = torch.rand(3)
    pyro.set_rng_seed(3)
    # Mean draws no noise, so its stream is that of one guide run and one model run
    ps.SAM_ELBO(ps.Mean(), kl_weight=0.0).loss_and_grads(record.model, record.guide)
    assert torch.equal(torch.rand(3), after)


def test_number_of_model_runs_is_the_stated_cost() -> None:
    problem = Quadratic.random()
    runs = 0

    def counted() -> None:
        nonlocal runs
        runs += 1
        problem.model()()

    costs = {
        ps.Mean(): 1,
        ps.Gaussian(): 1,
        ps.Adversarial(0.5): 2,
        ps.Adversarial(0.5, steps=4): 5,
        ps.MixSAM(0.5): 2,
        ps.AscendedSample(0.5): 2,
        ps.Mixture([ps.Gaussian(), ps.MixSAM()], [1.0, 0.0]): 1,
        ps.Adversarial(0.0): 1,
    }
    for law, cost in costs.items():
        elbo, guide = ps.SAM_ELBO(law), problem.guide()
        runs = 0
        elbo.loss_and_grads(counted, guide)
        assert runs <= cost + 1, law  # the first step also looks whether other noise changes the KL
        runs = 0
        elbo.loss_and_grads(counted, guide)
        assert runs == cost, law


def norm_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))


def snapshot(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def network_problem(net: nn.Module) -> tuple[Callable[..., Any], ps.MeanFieldNormal]:
    bnn = ps.BayesianModule(net, prior=dist.Normal(0.0, 1.0))

    def model(fail: bool = False) -> None:
        out = bnn(X).squeeze(-1)
        if fail:
            raise RuntimeError("the model fell over")
        with pyro.plate("data", 30):
            pyro.sample("obs", dist.Normal(out, 0.1), obs=Y)

    return model, ps.MeanFieldNormal(model, init_scale=0.05)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_batch_norm_statistics_advance_once_per_step(law: ps.Perturbation) -> None:
    net = norm_net()
    model, guide = network_problem(net)
    before = snapshot(net)
    guide.initialize()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    elbo = ps.SAM_ELBO(law)
    for step in (1, 2, 3):
        elbo.loss_and_grads(model, guide)
        assert int(net[1].num_batches_tracked) == step
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])
    # the weights themselves are never written to
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_running_statistics_are_those_of_the_last_pass() -> None:
    net = norm_net()
    model, guide = network_problem(net)
    guide.initialize()
    seen = []
    net[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    ps.SAM_ELBO(ps.Adversarial(2.0)).loss_and_grads(model, guide)
    assert not torch.equal(seen[0], seen[-1])
    torch.testing.assert_close(net[1].running_mean, 0.1 * seen[-1].mean(0))


RUNS = zip(LAWS, [1, 1, 2, 4, 2, 2, 2], strict=True)


@pytest.mark.parametrize(
    ("law", "failing_run"), [(law, run) for law, runs in RUNS for run in range(1, runs + 1)], ids=repr
)
def test_a_model_that_raises_leaves_everything_as_it_was(law: ps.Perturbation, failing_run: int) -> None:
    net = norm_net()
    good, guide = network_problem(net)
    guide.initialize()
    countdown = [0]

    def model() -> None:
        countdown[0] -= 1
        good(fail=countdown[0] == 0)

    svi = SVI(model, guide, Adam({"lr": 0.01}), ps.SAM_ELBO(law))
    svi.step()
    state = {**snapshot(net), **snapshot(guide)}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in guide.named_parameters()}
    countdown[0] = failing_run
    with pytest.raises(RuntimeError, match="the model fell over"):
        svi.step()
    for name, value in {**net.state_dict(), **guide.state_dict()}.items():
        assert torch.equal(value, state[name]), name
    for name, parameter in guide.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None)
        assert grads[name] is None or torch.equal(parameter.grad, grads[name])
    countdown[0] = 0
    tracked = int(net[1].num_batches_tracked)
    assert torch.isfinite(torch.tensor(svi.step()))
    assert int(net[1].num_batches_tracked) == tracked + 1


def test_ascent_touches_no_grad_and_works_under_no_grad() -> None:
    problem = Quadratic.random()
    guide = problem.guide()
    guide()
    parameters = [p for _, p in pyro.get_param_store().named_parameters()]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 7.0)
    loss = ps.SAM_ELBO(ps.Adversarial(0.5)).differentiable_loss(problem.model(), guide)
    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in parameters)
    with torch.no_grad():
        quiet = ps.SAM_ELBO(ps.Adversarial(0.5)).differentiable_loss(problem.model(), guide)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, loss.detach())


def test_retain_graph_and_accumulation() -> None:
    problem = Quadratic.random()
    elbo = ps.SAM_ELBO(ps.Adversarial(0.5))
    elbo.loss_and_grads(problem.model(), problem.guide())
    once = {name: p.grad.clone() for name, p in pyro.get_param_store().named_parameters()}
    elbo.loss_and_grads(problem.model(), problem.guide())
    for name, parameter in pyro.get_param_store().named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_passes_that_draw_differently_still_share_the_minibatch_and_the_hidden_noise() -> None:
    batches, hidden = [], []

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        if w[0] == 0.3:  # only at the mean: that pass has used up more of the random stream
            torch.rand(5)
        with pyro.plate("data", 30, subsample_size=7) as idx:
            pyro.sample("obs", dist.Normal(X[idx] @ w + b, 1.0), obs=Y[idx])
        batches.append(idx)
        hidden.append(b.detach())

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor([0.3, -0.2]))
        w = pyro.sample("w", dist.Normal(loc, 0.1).to_event(1))
        if w[0] != 0.3:
            torch.rand(5)
        pyro.sample("b", dist.Normal(pyro.param("b_loc", torch.tensor(0.0)), 0.1))

    ps.SAM_ELBO(ps.Adversarial(0.5), hide="b").loss_and_grads(model, guide)
    assert len(batches) == 3  # the third looks whether other noise changes the KL
    assert all_equal(batches)
    assert all_equal(hidden)


class Counting(nn.Module):
    """Replaces one buffer at every run, and has another in the graph of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.tensor(0))
        self.register_buffer("slope", torch.tensor(2.0))

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        self.runs = self.runs + 1
        return a * self.slope


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_replaced_buffers_are_put_back_and_those_in_a_graph_keep_it_valid(law: ps.Perturbation) -> None:
    module = Counting()

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(module(a), 1.0))
        pyro.factor("data", -((a - b) ** 2))

    guide = ps.MeanFieldNormal(model).initialize()
    elbo = ps.SAM_ELBO(law)
    for step in (1, 2):
        elbo.loss_and_grads(model, guide)
        assert int(module.runs) == step


def links(kind: str) -> Callable[[], None]:
    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.3))
        a = pyro.sample("a", dist.Normal(loc, 0.5))
        parent = {"none": loc, "graph": a, "detached": a.detach()}[kind]
        pyro.sample("b", dist.Normal(parent, 0.2))

    return guide


@pytest.mark.parametrize(("kind", "runs"), [("none", 1), ("graph", 2), ("detached", 2)])
def test_the_guide_runs_again_only_where_something_in_it_follows_the_noise(kind: str, runs: int) -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.factor("data", -((a - 2 * b - 1) ** 2))

    count = [0]
    guide = links(kind)

    def counted() -> None:
        count[0] += 1
        guide()

    elbo = ps.SAM_ELBO(ps.Adversarial(0.7), kl_weight=0.0)
    first = elbo.loss_and_grads(model, counted)
    count[0] = 0
    again = elbo.loss_and_grads(model, counted)
    assert count[0] == runs
    # a = 0.3 + 0.5 e1, b = parent + 0.2 e2, u = -2 (a - 2 b - 1) (0.5 da, -0.4) at e = 0, negated for the loss
    link = 0.0 if kind == "none" else 1.0
    through_graph = 1.0 if kind == "graph" else 0.0
    a, b = 0.3, 0.3
    u = 2 * (a - 2 * b - 1) * torch.tensor([0.5 * (1 - 2 * through_graph), -0.4])
    e = 0.7 * u / u.norm()
    a = 0.3 + 0.5 * e[0]
    b = (a if link else 0.3) + 0.2 * e[1]
    assert first == pytest.approx(float((a - 2 * b - 1) ** 2), rel=1e-12)
    assert again == pytest.approx(first, rel=1e-12)
