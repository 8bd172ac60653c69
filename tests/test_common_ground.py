"""What fast and ordinary steps have in common, against oracles: Pyro's estimator, or the same said otherwise."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_sam as ps
from pyro_sam._step.call import Call
from pyro_sam._step.knowledge import Knowledge

X = torch.linspace(-1, 1, 24).reshape(12, 2).double()
Y = X[:, 0] - X[:, 1].sin()


def taken(elbo: Any, model: Any, guide: Any, seed: int) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of a step at a seed."""
    for _, leaf in pyro.get_param_store().named_parameters():
        leaf.grad = None
    pyro.set_rng_seed(seed)
    loss = elbo.loss_and_grads(model, guide, X, Y)
    named = pyro.get_param_store().named_parameters()
    return float(loss), {name: leaf.grad.clone() for name, leaf in named if leaf.grad is not None}


def same(a: Any, b: Any) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-10)
    assert a[1].keys() == b[1].keys()
    for name, value in a[1].items():
        torch.testing.assert_close(value, b[1][name], rtol=1e-9, atol=1e-11)


def regression(prior: Callable[[], Any]) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor) -> None:
        w = prior()
        with pyro.plate("data", 40, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)

    return model


def heavy(around: Any) -> Callable[[], Any]:
    def prior() -> Any:
        with around():
            return pyro.sample("w", dist.StudentT(3.0, 0.0, 1.0).expand([2]).to_event(1))

    return prior


HANDLERS = {
    "scale": lambda: poutine.scale(scale=0.1),
    "mask": lambda: poutine.mask(mask=False),
    "both": lambda: poutine.scale(scale=3.0),
}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("handler", HANDLERS)
def test_an_estimated_kl_is_scaled_and_masked_as_the_prior_is(handler: str, fast: bool) -> None:
    model = regression(heavy(HANDLERS[handler]))
    guide = ps.MeanFieldNormal(model).initialize(X, Y)
    elbo, pyros = ps.SAM_ELBO(ps.Gaussian(), fast=fast), TraceMeanField_ELBO()
    for seed in range(3):
        same(taken(elbo, model, guide, seed), taken(pyros, model, guide, seed))


@pytest.mark.parametrize("fast", [True, False])
def test_the_scale_of_a_whole_model_counts_in_an_estimated_kl(fast: bool) -> None:
    model = poutine.scale(regression(heavy(lambda: poutine.scale(scale=1.0))), scale=0.2)
    guide = ps.MeanFieldNormal(model).initialize(X, Y)
    elbo, pyros = ps.SAM_ELBO(ps.Gaussian(), fast=fast), TraceMeanField_ELBO()
    for seed in range(3):
        same(taken(elbo, model, guide, seed), taken(pyros, model, guide, seed))


def stopped(tau: Tensor) -> Tensor:
    """The value of tau, without a gradient but with a graph: what detach() is, in sight."""
    return tau + (tau.detach() - tau)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("law", [ps.Mean(), ps.Adversarial(3.0), ps.AscendedSample(2.0)], ids=repr)
def test_a_prior_on_a_detached_latent_depends_on_the_noise(law: ps.Perturbation, fast: bool) -> None:
    def hierarchy(cut: Callable[[Tensor], Tensor]) -> Any:
        def prior() -> Any:
            tau = pyro.sample("tau", dist.Normal(0.0, 1.0))
            return pyro.sample("w", dist.StudentT(3.0, 0.0, cut(tau).exp()).expand([2]).to_event(1))

        return regression(prior)

    hidden, seen = hierarchy(torch.Tensor.detach), hierarchy(stopped)
    guide = ps.MeanFieldNormal(hidden).initialize(X, Y)
    elbos = ps.SAM_ELBO(law, fast=fast), ps.SAM_ELBO(law, fast=fast)
    for seed in range(3):
        same(taken(elbos[0], hidden, guide, seed), taken(elbos[1], seen, guide, seed))


@pytest.mark.parametrize("fast", [True, False])
def test_a_prior_is_not_held_to_hang_on_a_latent_after_it_no_longer_does(fast: bool) -> None:
    tied = True

    def prior() -> Tensor:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        w: Tensor = pyro.sample("w", dist.Normal(mean if tied else 0.5, torch.ones(2)).to_event(1))
        return w

    model = regression(prior)
    guide, elbo = ps.MeanFieldNormal(model), ps.SAM_ELBO(ps.Gaussian(), kl_weight=0.0, fast=fast)
    for _ in range(3):  # nothing asks for the KL
        elbo.loss_and_grads(model, guide, X, Y)
    elbo.kl_weight, elbo.perturbation = 0.7, ps.Mean()
    with torch.no_grad():
        elbo.loss(model, guide, X, Y)
    tied = False
    pyro.set_rng_seed(0)
    start = torch.get_rng_state()
    for _ in range(3):
        got = taken(elbo, model, guide, 0)
        assert torch.equal(torch.get_rng_state(), start)  # a KL in closed form draws nothing
        same(got, taken(ps.SAM_ELBO(ps.Mean(), kl_weight=0.7, fast=False), model, guide, 0))


class Switch:
    """Holds whether something is on, for a model to read."""

    def __init__(self, on: bool = False) -> None:
        self.on = on


def switched(kind: str) -> tuple[Callable[..., None], Callable[[bool], tuple[Any, dict[str, Any]]]]:
    """Return a model whose prior on w hangs on a detached latent where it is told so, and what tells it."""
    switch, table, flag = Switch(), {"on": False}, torch.zeros((), dtype=torch.bool)
    on = False

    def is_told() -> bool:
        return on or switch.on or table["on"] or bool(flag.item())

    def model(x: Tensor, y: Tensor, given: Any = False, **options: Any) -> None:
        told = given.on if isinstance(given, Switch) else bool(given)
        tied = is_told() or told or options.get("tied", False)
        tau = pyro.sample("tau", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(tau.detach() if tied else 0.0, torch.ones(2)).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ w + tau, 0.5), obs=y)

    def close_over(to: bool) -> None:
        nonlocal on
        on = to

    hidden: dict[str, Callable[[bool], Any]] = {
        "closure": close_over,
        "attribute": lambda to: setattr(switch, "on", to),
        "entry": lambda to: table.update(on=to),
        "flag": flag.fill_,
    }
    given: dict[str, Callable[[bool], Any]] = {
        "tensor": lambda to: torch.tensor(float(to)), "argument": bool, "number": float, "object": Switch,
    }  # fmt: skip

    def tell(to: bool) -> tuple[Any, dict[str, Any]]:
        if kind in given:
            return (X, Y, given[kind](to)), {}
        if kind in hidden:
            hidden[kind](to)
        return (X, Y), {"tied": True} if kind == "keyword" and to else {}

    return model, tell


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("there_and_back", [False, True])
@pytest.mark.parametrize("law", [ps.Mean(), ps.Adversarial(3.0)], ids=repr)
@pytest.mark.parametrize(
    "kind", ["closure", "attribute", "entry", "flag", "tensor", "argument", "number", "keyword", "object"]
)
def test_a_prior_may_come_to_hang_on_a_detached_latent(
    kind: str, law: ps.Perturbation, there_and_back: bool, fast: bool
) -> None:
    model, tell = switched(kind)
    args, kwargs = tell(False)
    guide, elbo = ps.MeanFieldNormal(model), ps.SAM_ELBO(law, fast=fast)

    def loss(elbo: ps.SAM_ELBO, seed: int) -> float:
        pyro.set_rng_seed(seed)
        return elbo.loss_and_grads(model, guide, *args, **kwargs)

    for seed in range(4):
        loss(elbo, seed)
    for to in (True, False, True) if there_and_back else (True,):
        args, kwargs = tell(to)
        for seed in range(2):
            assert loss(elbo, seed) == pytest.approx(loss(ps.SAM_ELBO(law, fast=False), seed), rel=1e-12)


class Shrunk(ps.Perturbation):
    """A tenth of a draw, in place or not."""

    def __init__(self, in_place: bool) -> None:
        self.in_place = in_place

    def noise(self, space: ps.NoiseSpace) -> Tensor:
        z = space.gaussian()
        return z.mul_(0.1) if self.in_place else z * 0.1


class Climb(ps.Perturbation):
    """Three steps, in place or not."""

    def __init__(self, in_place: bool) -> None:
        self.in_place = in_place

    def noise(self, space: ps.NoiseSpace) -> Tensor:
        e = space.zeros()
        for _ in range(3):
            step = 0.5 * space.direction(e)
            e = e.add_(step) if self.in_place else e + step
        return e


class Scaled(ps.Perturbation):
    """A direction at a length from loc and scale, which it writes into or not."""

    def __init__(self, in_place: bool) -> None:
        self.in_place = in_place

    def noise(self, space: ps.NoiseSpace) -> Tensor:
        loc, scale = space.loc_and_scale()
        u = space.gradient(space.zeros())
        length = loc.abs_().add_(0.1).div_(scale) if self.in_place else (loc.abs() + 0.1) / scale
        return length * (u.div_(u.norm() + 1e-9) if self.in_place else u / (u.norm() + 1e-9))


@pytest.mark.parametrize("settings", [{}, {"fast": False}, {"ascent": "previous"}, {"compile": True}], ids=str)
@pytest.mark.parametrize("law", [Shrunk, Climb, Scaled])
def test_a_law_may_write_into_what_it_was_given(law: Any, settings: Any) -> None:
    model = regression(heavy(lambda: poutine.scale(scale=1.0)))
    guide = ps.MeanFieldNormal(model).initialize(X, Y)
    elbos = ps.SAM_ELBO(law(True), **settings), ps.SAM_ELBO(law(False), **settings)
    for seed in range(4):
        same(taken(elbos[0], model, guide, seed), taken(elbos[1], model, guide, seed))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("changed", [{"prior"}, {"net"}, {"net", "prior"}])
def test_a_prior_or_network_set_later_is_as_one_given(changed: set[str], fast: bool) -> None:
    def build(net: nn.Module, prior: Any) -> tuple[ps.BayesianModule, Any]:
        bnn = ps.BayesianModule(net, prior)

        def model(x: Tensor, y: Tensor) -> None:
            mean = bnn(x).squeeze(-1)
            with pyro.plate("data", 40, subsample=torch.arange(len(x))):
                pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

        return bnn, model

    def net(act: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), act, nn.Linear(3, 1))

    bnn, model = build(net(nn.Tanh()), dist.Normal(0.0, 1.0))
    guide, elbo = ps.MeanFieldNormal(model).initialize(X, Y), ps.SAM_ELBO(ps.Adversarial(0.5), fast=fast)
    for seed in range(2):
        taken(elbo, model, guide, seed)
    if "prior" in changed:
        bnn.prior = dist.Normal(0.0, 10.0)
    if "net" in changed:
        bnn.net = net(nn.ReLU())
    act = nn.ReLU() if "net" in changed else nn.Tanh()
    _, fresh = build(net(act), dist.Normal(0.0, 10.0 if "prior" in changed else 1.0))
    same(taken(elbo, model, guide, 5), taken(ps.SAM_ELBO(ps.Adversarial(0.5), fast=False), fresh, guide, 5))
    with pytest.raises(ValueError, match="prior must be a distribution"):
        bnn.prior = 3.0
    with pytest.raises(ValueError, match=r"net must be a torch\.nn\.Module"):
        bnn.net = 3.0


class Owner:
    """A model that is a method."""

    def model(self, x: Tensor, y: Tensor) -> None:
        regression(heavy(lambda: poutine.scale(scale=1.0)))(x, y)


def test_a_method_is_one_model_however_often_it_is_mentioned() -> None:
    owner, knowledge = Owner(), Knowledge()
    mentions = [owner.model, owner.model]  # two objects, both alive
    first, second = (knowledge.of(Call(mention, regression, (), {})) for mention in mentions)
    assert first is second
    assert knowledge.of(Call(Owner().model, regression, (), {})) is not first


@pytest.mark.parametrize("fast", [True, False])
def test_the_ascent_of_earlier_steps_outlives_evaluations_of_other_models(fast: bool) -> None:
    model = regression(heavy(lambda: poutine.scale(scale=1.0)))
    guide = ps.MeanFieldNormal(model).initialize(X, Y)
    elbos = [ps.SAM_ELBO(ps.Adversarial(0.7), ascent="previous", fast=fast) for _ in range(2)]
    losses = []
    for seed in range(4):
        want = taken(elbos[0], model, guide, seed)
        for _ in range(10):  # more of them than are remembered
            held_out = regression(heavy(lambda: poutine.scale(scale=1.0)))
            elbos[1].loss(held_out, guide, X[:5], Y[:5])
        same(taken(elbos[1], model, guide, seed), want)
        losses.append(want[0])
    assert losses[1] > losses[0]  # it climbs from the second step on


def test_a_network_that_comes_to_be_called_twice_is_refused_by_fast_steps_too() -> None:
    times = {"n": 1}
    bnn = ps.BayesianModule(torch.nn.Linear(3, 2))

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        for _ in range(times["n"]):
            logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    guide, x, y = ps.MeanFieldNormal(model), torch.randn(6, 3), torch.arange(6) % 2
    elbo = ps.SAM_ELBO(ps.Gaussian())
    for _ in range(3):
        elbo.loss_and_grads(model, guide, x, y)
    times["n"] = 2
    with pytest.raises(RuntimeError, match=r"[Mm]ultiple.*weight"):
        elbo.loss_and_grads(model, guide, x, y)
    times["n"] = 1
    assert elbo.loss_and_grads(model, guide, x, y) > 0
