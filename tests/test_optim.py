"""JointOptim: one torch optimiser steps as Pyro's one per parameter, and what only one can do."""

import copy
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.optim import lr_scheduler

import pyro_sam as ps
from pyro_sam.optim import JointOptim

ADAM = (torch.optim.Adam, {"lr": 0.05})


def model(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w + b, 0.5), obs=x.sum(-1))


def train(optim: Any, steps: int = 10, guide: Any = None, step: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Train from the same start and return the parameters by name."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = ps.MeanFieldNormal(model) if guide is None else guide
    svi = SVI(model, guide, optim, loss=ps.SAM_ELBO(ps.Adversarial(0.5)))
    x = torch.randn(7, 3)
    for _ in range(steps):
        svi.step(x) if step is None else step(svi, x)
    named = pyro.get_param_store().named_parameters() or guide.named_parameters()
    return {name: param.detach().clone() for name, param in named}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert a
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    ("constructor", "args"),
    [
        (torch.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.9)}),
        (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
        (torch.optim.Adagrad, {"lr": 0.05}),
        (torch.optim.RMSprop, {"lr": 0.01}),
        (pyro.optim.clipped_adam.ClippedAdam, {"lr": 0.05}),
    ],
)
def test_it_steps_as_one_optimiser_per_parameter_does(constructor: Any, args: dict[str, Any]) -> None:
    separate, joint = train(pyro.optim.PyroOptim(constructor, args)), train(JointOptim(constructor, args))
    for name in separate:
        torch.testing.assert_close(joint[name], separate[name], rtol=1e-12, atol=1e-14)


def test_fused_kernels_are_used_where_the_optimiser_has_them_and_the_user_chose_none() -> None:
    fused, chosen, without = (
        JointOptim(*ADAM),
        JointOptim(torch.optim.Adam, {"lr": 0.05, "foreach": True}),
        JointOptim(torch.optim.RMSprop, {"lr": 0.05}),
    )
    for optim in (fused, chosen, without):
        train(optim, 1)
    assert fused.optimizer.param_groups[0]["fused"] is True
    assert chosen.optimizer.param_groups[0]["fused"] is None
    assert len(without.optimizer.param_groups[0]["params"]) == 4


def test_parameters_without_a_fused_kernel_are_stepped_without() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.complex128, requires_grad=True)
    optim = JointOptim(*ADAM)
    optim.name_parameters([("a", a), ("b", b)])
    (a.sum() + b.abs().sum()).backward()
    optim({a, b})
    assert [group["fused"] for group in optim.optimizer.param_groups] == [True, None]
    assert not torch.equal(a, torch.ones(2))
    assert not torch.equal(b, torch.ones(2, dtype=b.dtype))


def test_clipping_bounds_the_norm_over_all_parameters() -> None:
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    optim = JointOptim(torch.optim.SGD, {"lr": 1.0}, clip_norm=1.0)
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    optim({a, b})
    torch.testing.assert_close(torch.cat([a, b]).detach(), torch.tensor([-0.6, 0.0, -0.8]), rtol=1e-5, atol=0)
    assert float(optim.grad_norm) == 5
    assert a.grad is None
    a.grad, b.grad = torch.tensor([0.3, 0.0]), torch.tensor([0.0])
    optim({a, b})
    assert float(a.detach()[0]) == pytest.approx(-0.9)


def test_a_parameter_that_appears_later_joins_at_the_present_learning_rate() -> None:
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    optim = JointOptim(torch.optim.SGD, {"lr": 1.0}, scheduler=lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5))
    a.grad = torch.ones(2)
    optim([a])
    optim.step()
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    optim([a, b])
    assert a.tolist() == [-1.5, -1.5]
    assert b.tolist() == [-0.5, -0.5]
    assert len(optim.optimizer.param_groups) == 1


def test_a_parameter_that_a_step_does_not_use_stands_still() -> None:
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    optim = JointOptim(*ADAM)
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    optim({a, b})
    before = b.detach().clone()
    a.grad = torch.ones(2)
    optim({a})
    assert torch.equal(b, before)


def test_a_parameter_renewed_under_its_name_takes_the_place_of_the_old_one() -> None:
    optim = JointOptim(*ADAM)
    first = train(optim)
    assert_equal(train(optim), first)  # a cleared store, the same names: a fresh start
    assert len(optim.optim_objs) == len(optim.optimizer.state) == 4


def test_arguments_per_parameter_come_from_its_name() -> None:
    asked = []

    def args(name: str) -> dict[str, Any]:
        asked.append(name)
        return {"lr": 0.1 if "loc" in name else 0.01}

    joint, separate = train(JointOptim(torch.optim.Adam, args)), train(pyro.optim.Adam(args))
    for name in separate:
        torch.testing.assert_close(joint[name], separate[name], rtol=1e-12, atol=1e-14)
    assert set(asked) == set(separate)
    optim = JointOptim(torch.optim.Adam, args)
    train(optim)
    assert sorted(group["lr"] for group in optim.optimizer.param_groups) == [0.01, 0.1]


# Schedulers


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_the_scheduler_follows_its_interval(interval: Any) -> None:
    optim = JointOptim(*ADAM, scheduler=lambda o: lr_scheduler.ExponentialLR(o, gamma=0.5), scheduler_interval=interval)
    optim.step()  # before the first step there is no scheduler yet
    train(optim, 3)
    lr = {"epoch": 0.05, "step": 0.05 / 8}[interval]
    assert optim.optimizer.param_groups[0]["lr"] == pytest.approx(lr)
    optim.step()
    assert optim.optimizer.param_groups[0]["lr"] == pytest.approx(lr / 2)


def test_a_scheduler_that_wants_the_loss_gets_it() -> None:
    optim = JointOptim(*ADAM, scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.1))
    train(optim, 1)
    for loss in (1.0, 2.0):
        optim.step(loss)
    assert optim.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


# Closures


def quadratic_guide(x: Tensor) -> None:
    w = pyro.param("w_loc", torch.ones(3))
    b = pyro.param("b_loc", torch.ones(()))
    pyro.sample("w", dist.Delta(w, event_dim=1))
    pyro.sample("b", dist.Delta(b))


def test_lbfgs_finds_the_ridge_solution_in_a_step() -> None:
    optim = JointOptim(torch.optim.LBFGS, {"lr": 1.0, "max_iter": 50, "line_search_fn": "strong_wolfe"})
    x = torch.randn(7, 3)
    svi = SVI(model, quadratic_guide, optim, loss=Trace_ELBO())
    before = float(Trace_ELBO().loss(model, quadratic_guide, x))
    assert optim.minimize(svi, x) == pytest.approx(before, rel=1e-12)
    design = torch.cat([x, torch.ones(7, 1)], -1)
    exact = torch.linalg.solve(design.T @ design / 0.25 + torch.eye(4), design.T @ x.sum(-1) / 0.25)
    store = pyro.get_param_store()
    torch.testing.assert_close(torch.cat([store["w_loc"], store["b_loc"][None]]).detach(), exact, rtol=1e-6, atol=1e-8)


def test_every_evaluation_of_a_closure_sees_the_same_noise() -> None:
    seen = []

    class Loss(ps.SAM_ELBO):
        def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
            seen.append(torch.get_rng_state())
            return super().loss_and_grads(*args, **kwargs)

    optim = JointOptim(torch.optim.LBFGS, {"lr": 0.01, "max_iter": 4})
    svi = SVI(model, ps.MeanFieldNormal(model), optim, loss=Loss(ps.Gaussian()))
    x = torch.randn(7, 3)
    optim.minimize(svi, x)
    assert len(seen) > 2
    assert all(torch.equal(state, seen[0]) for state in seen)
    optim.minimize(svi, x)
    assert not torch.equal(seen[-1], seen[0])


def test_minimize_is_a_step_of_svi_for_other_optimisers() -> None:
    stepped = train(JointOptim(*ADAM, clip_norm=0.5))
    optim = JointOptim(*ADAM, clip_norm=0.5)
    assert_equal(train(optim, step=lambda svi, x: optim.minimize(svi, x)), stepped)


def test_svi_step_cannot_serve_an_optimiser_that_needs_a_closure() -> None:
    with pytest.raises(ValueError, match=r"LBFGS evaluates the loss several times.*optim\.minimize"):
        train(JointOptim(torch.optim.LBFGS, {"lr": 1.0}), 1)


@pytest.mark.parametrize("wrong", [1, 4])
def test_minimize_raises_where_an_evaluation_is_not_finite_and_undoes_the_step(wrong: int) -> None:
    calls = 0

    class Loss(Trace_ELBO):
        def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
            nonlocal calls
            calls += 1
            loss = super().loss_and_grads(*args, **kwargs)
            return float("inf") if calls == 5 + wrong else loss  # the first step has five

    optim = JointOptim(torch.optim.LBFGS, {"lr": 0.1, "max_iter": 5})
    svi, x = SVI(model, quadratic_guide, optim, loss=Loss()), torch.randn(7, 3)
    optim.minimize(svi, x)
    assert calls == 5
    store = dict(pyro.get_param_store().named_parameters())
    kept = {name: param.detach().clone() for name, param in store.items()}
    state = copy.deepcopy(optim.get_state()["optimizer"]["state"])
    with pytest.raises(FloatingPointError, match=r"the loss is inf .*The parameters are those before this step"):
        optim.minimize(svi, x)
    assert_equal({name: param.detach() for name, param in store.items()}, kept)
    torch.testing.assert_close(optim.get_state()["optimizer"]["state"], state, rtol=0, atol=0)
    assert all(param.grad is None for param in store.values())


def test_an_error_within_a_step_leaves_neither_gradients_nor_a_move() -> None:
    calls = 0

    class Loss(Trace_ELBO):
        def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
            nonlocal calls
            calls += 1
            loss = super().loss_and_grads(*args, **kwargs)
            if calls == 3:
                raise RuntimeError("out of memory")
            return loss

    optim = JointOptim(torch.optim.LBFGS, {"lr": 0.1, "max_iter": 5})
    with pytest.raises(RuntimeError, match="out of memory"):
        optim.minimize(SVI(model, quadratic_guide, optim, loss=Loss()), torch.randn(7, 3))
    store = dict(pyro.get_param_store().named_parameters())
    assert store
    assert all(param.grad is None and torch.equal(param, torch.ones_like(param)) for param in store.values())


def test_minimize_names_parameters_that_the_store_does_not_know() -> None:
    with pyro.settings.context(module_local_params=True):
        optim, guide = JointOptim(torch.optim.LBFGS, {"lr": 0.01}), ps.MeanFieldNormal(model)
        optim.minimize(SVI(model, guide, optim, loss=ps.SAM_ELBO(ps.Mean())), torch.randn(7, 3))
        assert len(optim.get_state()["names"]) == len(list(guide.parameters()))


def test_lbfgs_refuses_parameters_that_appear_later() -> None:
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    optim = JointOptim(torch.optim.LBFGS, {"lr": 1.0})
    optim([a], lambda: 0.0)
    with pytest.raises(ValueError, match="LBFGS cannot take parameters that appear after its first step"):
        optim([a, b], lambda: 0.0)


# State


def scheduled(constructor: Any = torch.optim.Adam, **args: Any) -> JointOptim:
    return JointOptim(
        constructor, {"lr": 0.05, **args}, scheduler=lambda o: lr_scheduler.StepLR(o, 4), scheduler_interval="step"
    )


@pytest.mark.parametrize("local", [False, True])
def test_saved_and_loaded_it_goes_on_as_if_uninterrupted(local: bool, tmp_path: Path) -> None:
    with pyro.settings.context(module_local_params=local):
        optim = scheduled()
        guide = ps.MeanFieldNormal(model)
        x = torch.randn(7, 3)
        guide.initialize(x)
        optim.name_parameters(guide.named_parameters())
        svi = SVI(model, guide, optim, loss=ps.SAM_ELBO(ps.Adversarial()))
        for _ in range(5):
            svi.step(x)
        optim.save(tmp_path / "optim.pt")
        kept = [param.detach().clone() for param in guide.parameters()]
        for _ in range(5):
            svi.step(x)
        straight = [param.detach().clone() for param in guide.parameters()]
        with torch.no_grad():
            for param, value in zip(guide.parameters(), kept, strict=True):
                param.copy_(value)
        again = scheduled()
        again.name_parameters(guide.named_parameters())
        again.load(tmp_path / "optim.pt")
        assert again.get_state().keys() == {"names", "optimizer", "scheduler"}  # waiting for its parameters
        svi = SVI(model, guide, again, loss=ps.SAM_ELBO(ps.Adversarial()))
        for _ in range(5):
            svi.step(x)
    for param, value in zip(guide.parameters(), straight, strict=True):
        assert torch.equal(param, value)


def test_a_state_set_after_the_first_step_counts_too() -> None:
    a, b = scheduled(), scheduled()
    train(a, 6)
    train(b, 1)
    b.set_state(a.get_state())
    assert b.scheduler.last_epoch == 6
    assert b.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    states = (optim.get_state()["optimizer"]["state"].values() for optim in (a, b))
    for mine, other in zip(*states, strict=True):
        assert torch.equal(mine["exp_avg"], other["exp_avg"])
        assert mine["exp_avg"].data_ptr() != other["exp_avg"].data_ptr()


def test_states_are_matched_by_name_whatever_the_order() -> None:
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    one = JointOptim(torch.optim.SGD, {"lr": 1.0, "momentum": 0.5})
    one.name_parameters([("a", a), ("b", b)])
    a.grad, b.grad = torch.ones(2), 2 * torch.ones(2)
    one({a, b})
    two = JointOptim(torch.optim.SGD, {"lr": 7.0, "momentum": 0.5})
    two.name_parameters([("a", a), ("b", b)])
    two.set_state(one.get_state())
    b.grad = torch.zeros(2)
    two({b})  # appears first here
    assert two.optimizer.state[b]["momentum_buffer"].tolist() == [1.0, 1.0]
    assert two.optimizer.param_groups[0]["lr"] == 1.0
    a.grad = torch.zeros(2)
    two({a, b})
    assert two.optimizer.state[a]["momentum_buffer"].tolist() == [0.5, 0.5]


def test_loading_runs_no_pickled_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("ran",))

    torch.save({"names": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        JointOptim(*ADAM).load(tmp_path / "evil.pt")


def test_parameters_without_names_have_no_state_to_keep() -> None:
    with pyro.settings.context(module_local_params=True):
        optim = JointOptim(*ADAM)
        guide = ps.MeanFieldNormal(model)
        train(optim, 1, guide)
        with pytest.raises(ValueError, match=r"4 of 4 parameters have no name.*optim\.name_parameters"):
            optim.get_state()
        optim.name_parameters(guide.named_parameters())
        assert "locs.w_unconstrained" in optim.get_state()["names"]


# Errors


@pytest.mark.parametrize("wrong", [pyro.optim.Adam({"lr": 0.1}), pyro.optim.Adam, pyro.optim.ClippedAdam])
def test_a_pyro_optimiser_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"optim_constructor must be a class of torch optimisers.*one of Pyro"):
        JointOptim(wrong, {"lr": 0.1})


@pytest.mark.parametrize("wrong", [torch.optim.Adam([torch.zeros(1, requires_grad=True)]), "adam", None])
def test_what_is_no_class_of_optimisers_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="optim_constructor must be a class of torch optimisers such as"):
        JointOptim(wrong, {"lr": 0.1})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (0.1, "optim_args must be a dict such as"),
        ({"learning_rate": 0.1}, r"optim_args=.* do not fit Adam: .*learning_rate"),
        ({"lr": -1.0}, r"optim_args=.* do not fit Adam: Invalid learning rate"),
    ],
)
def test_wrong_arguments_are_refused_at_once(args: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JointOptim(torch.optim.Adam, args)


def test_a_callable_that_returns_no_dict_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim_args must return a dict, got 0.1 for parameter 'MeanFieldNormal"):
        train(JointOptim(torch.optim.Adam, lambda name: 0.1), 1)


def test_a_callable_needs_names() -> None:
    with pytest.raises(ValueError, match=r"optim_args is a callable .* a parameter has none"):
        JointOptim(torch.optim.Adam, lambda name: {"lr": 0.1})([torch.zeros(1, requires_grad=True)])


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), "1"])
def test_the_bound_of_the_norm_is_positive(clip: Any) -> None:
    with pytest.raises(ValueError, match="clip_norm must be"):
        JointOptim(*ADAM, clip_norm=clip)


def test_a_scheduler_that_already_has_an_optimiser_is_refused() -> None:
    scheduler: Any = lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), 1)
    with pytest.raises(ValueError, match="scheduler must be a callable from the torch optimiser"):
        JointOptim(*ADAM, scheduler=scheduler)


def test_a_scheduler_class_that_needs_more_is_refused() -> None:
    with pytest.raises(ValueError, match="scheduler=StepLR cannot be made from the optimiser alone"):
        train(JointOptim(*ADAM, scheduler=lr_scheduler.StepLR), 1)


def test_an_unknown_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="scheduler_interval must be 'epoch' or 'step'"):
        JointOptim(*ADAM, scheduler_interval="batch")  # type: ignore[arg-type]


def test_a_scheduler_cannot_follow_new_arguments() -> None:
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    optim = JointOptim(
        torch.optim.SGD, lambda name: {"lr": len(name)}, scheduler=lambda o: lr_scheduler.StepLR(o, step_size=1)
    )
    optim.name_parameters([("a", a), ("bb", b)])
    optim([a])
    with pytest.raises(ValueError, match="the scheduler cannot follow parameters with optim_args"):
        optim([a, b])


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"state_dict must come from JointOptim\.get_state.*'w'"):
        JointOptim(*ADAM).set_state({"w": {}})


def test_learning_rates_of_replicas_are_those_of_the_state() -> None:
    def svi(rates: Any) -> SVI:
        pyro.clear_param_store()
        guide = ps.MeanFieldNormal(line, init_scale=0.1, num_replicas=2).initialize(x)
        return SVI(line, guide, JointOptim(torch.optim.SGD, {"lr": rates}), ps.SAM_ELBO(ps.Mean()))

    def line(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(w, 1.0), obs=x)

    def moved(svi: SVI) -> Tensor:
        before = svi.guide.locs.w.detach().clone()
        svi.step(x)
        return svi.guide.locs.w.detach() - before

    x = torch.linspace(0, 1, 3)
    first = svi([0.1, 0.02])
    expected, state = moved(first), first.optim.get_state()
    for other in ([1.0, 1.0], [0.02, 0.1]):
        again = svi(other)
        again.optim.set_state(state)
        torch.testing.assert_close(moved(again), expected)
    for rates in (0.1, [0.1, 0.1, 0.1]):
        with pytest.raises(ValueError, match=r"state_dict must have . learning rates of replicas, as this .* got 2"):
            svi(rates).optim.set_state(state)


def test_a_step_costs_less_than_with_an_optimiser_per_parameter() -> None:
    params = [torch.zeros(10, requires_grad=True) for _ in range(100)]
    times = []
    for optim in (pyro.optim.Adam({"lr": 0.1}), JointOptim(*ADAM)):
        best = float("inf")
        for _ in range(10):
            for param in params:
                param.grad = torch.ones(10)
            start = time.perf_counter()
            optim(set(params))
            best = min(best, time.perf_counter() - start)
        times.append(best)
    assert times[1] < times[0] / 3
