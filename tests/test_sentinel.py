"""The sentinel: a fast step that goes wrong is found, said once, and its numbers are not used."""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import SGD
from torch import Tensor, nn

import pyro_sam as ps
from pyro_sam._flat.passes import FlatRan
from pyro_sam._flat.place import Place
from pyro_sam._graph import lowering
from pyro_sam.elbo import sentinel

pytestmark = pytest.mark.watched

X, Y = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 2
LAWS = [ps.Gaussian(), ps.Adversarial(0.5), ps.MixSAM(0.5), ps.AscendedSample(0.5)]


def network() -> Callable[..., None]:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2))
    bnn = ps.BayesianModule(net)

    def model(x: Tensor, y: Tensor) -> None:
        logits = bnn(x)
        with pyro.plate("data", 40, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    model.net = net  # type: ignore[attr-defined]
    return model


def trained(elbo: ps.SAM_ELBO, steps: int = 9, model: Any = None) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = network() if model is None else model
    svi = SVI(model, ps.MeanFieldNormal(model), SGD({"lr": 1e-3}), elbo)
    losses = [svi.step(X, Y) for _ in range(steps)]
    values = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    buffers = {name: b.clone() for name, b in model.net.named_buffers()} if hasattr(model, "net") else {}
    return losses, values, buffers, torch.get_rng_state()


def same(a: Any, b: Any, rtol: float) -> None:
    assert a[0] == pytest.approx(b[0], rel=rtol)
    for here, there in zip(a[1:3], b[1:3], strict=True):
        for name, value in here.items():
            torch.testing.assert_close(value, there[name], rtol=rtol, atol=rtol)
    assert torch.equal(a[3], b[3])


def test_it_is_due_at_powers_of_two_and_then_at_thousands() -> None:
    due = [count for count in range(1, 4001) if sentinel.is_due(count)]
    assert due == [
        *(2**k for k in range(1, 10)), 1000, 2000, 3000, 4000,
    ]  # fmt: skip
    of_replicas = [count for count in range(1, 20_001) if sentinel.is_due(count, replicas=True)]
    assert of_replicas == [2, 1000, 10_000, 20_000]


@pytest.mark.parametrize("settings", [{}, {"ascent": "previous"}, {"num_particles": 2}], ids=str)
@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_a_look_leaves_no_trace(law: ps.Perturbation, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = trained(ps.SAM_ELBO(law, **settings))
    monkeypatch.setattr(sentinel, "is_due", lambda count, **_: False)
    alone = trained(ps.SAM_ELBO(law, **settings))
    assert watched[0] == alone[0]  # to the last bit
    same(watched, alone, 0.0)


@pytest.mark.parametrize("how", ["loss_and_grads", "differentiable_loss"])
def test_gradients_from_before_are_added_to(how: str) -> None:
    found = []
    for fast in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = network()
        guide = ps.MeanFieldNormal(model).initialize(X, Y)
        elbo = ps.SAM_ELBO(ps.MixSAM(0.5), fast=fast)
        for _ in range(4):
            loss = getattr(elbo, how)(model, guide, X, Y)
            if isinstance(loss, Tensor):
                loss.backward()
        found.append({name: p.grad for name, p in pyro.get_param_store().named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-9, atol=1e-9)


def break_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FlatRan.kl
    monkeypatch.setattr(FlatRan, "kl", lambda self: 1.01 * right(self))


def break_scale_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Place.backward

    def backward(ctx: Any, *outer: Any) -> Any:
        to_loc, to_scale, *rest = right(ctx, *outer)
        return to_loc, None if to_scale is None else -to_scale, *rest

    monkeypatch.setattr(Place, "backward", staticmethod(backward))


@pytest.mark.parametrize("break_it", [break_kl, break_scale_gradient])
@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_a_wrong_fast_step_ends_the_fast_steps_with_one_warning(
    law: ps.Perturbation, break_it: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentinel, "is_due", lambda count, **_: True)  # also the first
    break_it(monkeypatch)
    elbo = ps.SAM_ELBO(law)
    with pytest.warns(UserWarning, match="A shortened step gave other numbers") as said:
        trained(elbo)
    assert len(said) == 1
    (pair,) = elbo._knowledge._pairs.values()
    assert pair.slow
    assert pair.fast_steps == 1  # none after it


def test_what_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    break_scale_gradient(monkeypatch)
    with pytest.warns(UserWarning, match=r"gradient of 'MeanFieldNormal\.scales\.\S+' differs by"):
        trained(ps.SAM_ELBO(ps.Gaussian()))


def test_the_ordinary_numbers_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    break_kl(monkeypatch)
    model = network()
    guide = ps.MeanFieldNormal(model).initialize(X, Y)
    elbo, ordinary = ps.SAM_ELBO(ps.MixSAM(0.5)), ps.SAM_ELBO(ps.MixSAM(0.5), fast=False)
    for _ in range(2):  # the first one meets the model, the second is the first fast one
        elbo.loss_and_grads(model, guide, X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(3):
            losses = []
            for each in (elbo, ordinary):
                pyro.set_rng_seed(seed)
                guide.zero_grad()
                losses.append((each.loss_and_grads(model, guide, X, Y), [p.grad.clone() for p in guide.parameters()]))
            assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-12)
            for a, b in zip(losses[0][1], losses[1][1], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Counting:
    """A model that counts its runs, and may read the count."""

    def __init__(self, matters: bool) -> None:
        self.matters, self.runs = matters, 0

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.runs += 1
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        scale = 1.0 + 0.1 * self.runs if self.matters else 1.0
        with pyro.plate("data", 40, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Normal((x * w).sum(-1), scale), obs=y.to(x))


def test_a_count_of_runs_is_as_without_the_look() -> None:
    model = Counting(matters=False)
    trained(ps.SAM_ELBO(ps.Adversarial(0.5)), 1, model)
    before = model.runs
    elbo = ps.SAM_ELBO(ps.Adversarial(0.5))
    trained(elbo, 9, model)
    assert model.runs <= before + 9 * 2 + 6  # two a step, and the first step's look at the structure


def test_a_count_that_a_captured_model_reads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "compiled", lambda graph, inputs: graph)
    with pytest.warns(UserWarning, match="a second run of the same step changes it"):
        trained(ps.SAM_ELBO(ps.Mean(), compile=True), 4, Counting(matters=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(ps.SAM_ELBO(ps.Mean(), compile=True), 4, Counting(matters=False))


def with_outer(outer: Callable[[], Tensor], make: Callable[..., ps.SAM_ELBO], steps: int = 4) -> list[Tensor | None]:
    """Return the gradients of ``outer``'s leaf step by step, where a model reads what it returns."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    leaf = torch.zeros((), dtype=torch.float64, requires_grad=True)
    seen = {"scale": leaf}

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * w).sum(-1), seen["scale"].exp()), obs=y.to(x))

    guide, elbo, found = ps.MeanFieldNormal(model).initialize(X, Y), make(ps.MixSAM(0.5)), []
    for _ in range(steps):
        seen["scale"] = outer(leaf)
        leaf.grad = None
        elbo.loss_and_grads(model, guide, X, Y)
        found.append(None if leaf.grad is None else leaf.grad.clone())
    return found


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("outer", [lambda leaf: leaf, lambda leaf: 2 * leaf.sin() + 0.1], ids=["leaf", "its own graph"])
def test_a_tensor_that_the_model_holds_gets_its_gradient_once(
    outer: Any, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "compiled", lambda graph, inputs: graph)
    watched = with_outer(outer, lambda law: ps.SAM_ELBO(law, compile=compile))
    ordinary = with_outer(outer, lambda law: ps.SAM_ELBO(law, fast=False))
    torch.testing.assert_close(watched, ordinary, rtol=1e-9, atol=1e-9)


def test_an_argument_with_a_graph_of_its_own_is_climbed_once() -> None:
    found = []
    for fast in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, encoder = network(), nn.Linear(3, 3, dtype=torch.float64)
        guide, elbo = ps.MeanFieldNormal(model).initialize(X, Y), ps.SAM_ELBO(ps.MixSAM(0.5), fast=fast)
        for _ in range(4):
            elbo.loss_and_grads(model, guide, encoder(X), Y)
        found.append(encoder.weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_a_hook_that_trains_as_gradients_come_is_called_once_a_step() -> None:
    pyro.clear_param_store()
    model, called = network(), list[int]()
    guide, elbo = ps.MeanFieldNormal(model).initialize(X, Y), ps.SAM_ELBO(ps.MixSAM(0.5))
    parameter = next(iter(guide.parameters()))
    parameter.register_post_accumulate_grad_hook(lambda p: called.append(1))
    for _ in range(5):
        elbo.loss_and_grads(model, guide, X, Y)
    assert len(called) == 5


class Fading(ps.Perturbation):
    """A law that holds all kinds of things, and changes them."""

    def __init__(self) -> None:
        self.steps, self.seen, self.average = 0, [0.0], torch.zeros(())
        self.generator = torch.Generator().manual_seed(3)

    def noise(self, space: Any) -> Tensor:
        self.steps += 1
        self.seen.append(torch.rand((), generator=self.generator).item())
        self.average.add_(self.seen[-1])
        return (self.average / self.steps + len(self.seen)) * space.direction(space.zeros()) / self.steps


@pytest.mark.parametrize("compile", [False, True])
def test_a_law_that_changes_is_asked_once_a_step(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "compiled", lambda graph, inputs: graph)
    law, same_law = Fading(), Fading()
    watched = trained(ps.SAM_ELBO(law, compile=compile))
    same(watched, trained(ps.SAM_ELBO(same_law, fast=False)), 1e-9)
    assert law.steps == same_law.steps == 9
    assert law.seen == same_law.seen
    assert law.average == same_law.average


def test_a_law_is_put_back_where_a_shortened_step_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    break_kl(monkeypatch)
    law, same_law = Fading(), Fading()
    with pytest.warns(UserWarning, match="A shortened step gave other numbers"):
        trained(ps.SAM_ELBO(law))
    trained(ps.SAM_ELBO(same_law, fast=False))
    assert law.steps == same_law.steps
    assert law.seen == same_law.seen
