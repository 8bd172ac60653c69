"""ascent="previous": the average of the descent passes' gradients, against the sum written out."""

import copy
import gc
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Quadratic
from pyro import poutine
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal

import pyro_sam as ps
from pyro_sam._graph import lowering


def previous(law: ps.Perturbation, **settings: Any) -> ps.SAM_ELBO:
    return ps.SAM_ELBO(law, ascent="previous", kl_weight=0.0, **settings)


@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_noise_follows_the_average_of_the_gradients_written_out(decay: float) -> None:
    problem = Quadratic.random()
    model, guide = problem.model(), problem.guide()
    elbo = previous(ps.Adversarial(0.7), ascent_decay=decay)
    e, average = torch.zeros(5), torch.zeros(5)
    for _ in range(4):
        loss = elbo.loss_and_grads(model, guide)
        assert loss == pytest.approx(problem.loss(problem.loc + problem.scale * e).item(), rel=1e-12)
        average = decay * average + (1 - decay) * problem.u(e)
        e = 0.7 * average / average.norm()


def test_another_model_starts_from_zero() -> None:
    problem = Quadratic.random()
    elbo = previous(ps.Adversarial(0.7))
    for _ in range(2):
        loss = elbo.loss_and_grads(problem.model(), problem.guide())
        assert loss == pytest.approx(problem.loss(problem.loc).item(), rel=1e-12)


def test_a_negative_alpha_descends() -> None:
    problem = Quadratic.random()
    model, guide = problem.model(), problem.guide()
    elbo = previous(ps.AscendedSample(-0.3))
    draws = []
    for _ in range(2):
        state = torch.get_rng_state()
        draws.append(torch.randn(5))
        torch.set_rng_state(state)
        loss = elbo.loss_and_grads(model, guide)
    u = problem.u(draws[0])
    w = problem.loc + problem.scale * (draws[1] - 0.3 * u / u.norm())
    assert loss == pytest.approx(problem.loss(w).item(), rel=1e-12)


@pytest.mark.parametrize("make", [ps.MeanFieldNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal])
@pytest.mark.parametrize("vectorize", [False, True])
def test_remembered_gradient_is_the_fresh_one(make: Callable[..., Any], vectorize: bool) -> None:
    problem = Quadratic.random()
    model = problem.model()
    guide = make(model)
    guide()
    for parameter in guide.parameters():  # away from a diagonal covariance
        parameter.data += 0.3 * torch.randn_like(parameter)
    particles = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 0} if vectorize else {}
    remembering = previous(ps.Adversarial(0.4), ascent_decay=0.0, **particles)
    remembering.loss_and_grads(model, guide)  # at the mean, where a fresh ascent starts
    fresh = ps.SAM_ELBO(ps.Adversarial(0.4), kl_weight=0.0, **particles)
    expected = fresh.loss_and_grads(model, guide)
    assert remembering.loss_and_grads(model, guide) == pytest.approx(expected, rel=1e-10)


def test_a_step_runs_the_model_once() -> None:
    problem = Quadratic.random()
    inner, guide, runs = problem.model(), problem.guide(), [0]

    def model() -> None:
        runs[0] += 1
        inner()

    elbo = previous(ps.MixSAM(0.5))
    for _ in range(3):
        elbo.loss_and_grads(model, guide)
    assert runs[0] == 3


@pytest.mark.parametrize("renew", [copy.deepcopy, lambda elbo: pickle.loads(pickle.dumps(elbo)), "state_dict"])
def test_the_average_is_state_that_survives(renew: Any) -> None:
    problem = Quadratic.random()
    model, guide = problem.model(), problem.guide()
    elbo = previous(ps.Adversarial(0.7))
    for _ in range(2):
        elbo.loss_and_grads(model, guide)
    if renew == "state_dict":
        other = previous(ps.Adversarial(0.7))
        other.load_state_dict(elbo.state_dict())
    else:
        other = renew(elbo)
    assert other.loss_and_grads(model, guide) == elbo.loss_and_grads(model, guide)
    assert list(elbo.state_dict()["ascent"]) == ["w"]
    assert ps.SAM_ELBO().state_dict() == {}
    with pytest.raises(ValueError, match="another ascent"):
        ps.SAM_ELBO().load_state_dict(elbo.state_dict())


def test_a_gradient_that_is_not_finite_does_not_spoil_the_average() -> None:
    problem = Quadratic.random()
    model, guide = problem.model(), problem.guide()
    elbo = previous(ps.Adversarial(0.7))
    elbo.loss_and_grads(model, guide)
    before = elbo.state_dict()["ascent"]["w"]
    (elbo.differentiable_loss(model, guide) * torch.inf).backward()  # as a loss scaler overflows
    assert torch.equal(elbo.state_dict()["ascent"]["w"], before)


def test_local_latents_of_a_minibatch_are_refused() -> None:
    def model() -> None:
        with pyro.plate("data", 10, subsample_size=3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", 10, subsample_size=3):
            pyro.sample("z", dist.Normal(loc, 1.0))

    with pytest.raises(ValueError, match="'z' is inside the subsampled plate 'data'"):
        previous(ps.Adversarial(0.5)).loss_and_grads(model, guide)
    with pytest.raises(ValueError, match="no Gaussian site"):
        previous(ps.Adversarial(0.5), hide="z").loss_and_grads(model, guide)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ascent": "stale"}, "ascent must be"),
        ({"ascent_decay": 1.0}, r"ascent_decay must be in \[0, 1\)"),
        ({"ascent_decay": float("nan")}, "ascent_decay must be"),
        ({"ascent": "previous", "scale_gradient": "mean"}, "fresh gradient at the mean"),
        ({"ascent": "previous", "sync_ascent": True}, "sync_ascent"),
        ({"compile": True, "sync_ascent": True}, "sync_ascent"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ps.SAM_ELBO(ps.Adversarial(), **settings)


def test_steps_leave_no_tensors_behind() -> None:
    problem = Quadratic.random()
    model, guide = problem.model(), problem.guide()
    elbo = previous(ps.Adversarial(0.7))

    def tensors() -> list[Any]:
        gc.collect()
        return [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]

    earlier = tensors()  # of other tests; they are kept, so that none goes meanwhile
    known = set(map(id, earlier))

    def tensors_after(steps: int) -> int:
        for _ in range(steps):
            elbo.loss_and_grads(model, guide)
        return sum(id(each) not in known for each in tensors())

    assert tensors_after(3) == tensors_after(10)


@pytest.mark.parametrize("settings", [{}, {"fast": False}, {"compile": True}], ids=str)
@pytest.mark.parametrize("differentiable", [False, True])
def test_particles_climb_along_what_was_before_their_step(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], differentiable: bool
) -> None:
    """No particle sees another's gradient of the same step; their mean is added, whatever the order of backward."""
    monkeypatch.setattr(lowering, "compiled", lambda graph, inputs: graph)
    problem, number, decay, alpha = Quadratic.random(), 3, 0.6, 0.8
    model, guide = problem.model(), problem.guide()
    elbo = previous(ps.AscendedSample(alpha), ascent_decay=decay, num_particles=number, **settings)
    average = torch.zeros(5)
    for step in range(4):
        pyro.set_rng_seed(step)
        noise = [torch.randn(5) for _ in range(number)]
        climb = alpha * average / average.norm() if step else torch.zeros(5)
        expected = sum(problem.loss(problem.loc + problem.scale * (z + climb)) for z in noise) / number
        pyro.set_rng_seed(step)
        if differentiable:
            total = elbo.differentiable_loss(model, guide)
            total.backward()  # a captured step has its average in the graph
            loss = total.item()
        else:
            loss = elbo.loss_and_grads(model, guide)
        assert loss == pytest.approx(expected.item(), rel=1e-11)
        gradients = torch.stack([problem.u(z + climb) for z in noise])
        average = decay * average + (1 - decay) * gradients.mean(0)


def climbs(model_at: Any, number: int = 1) -> list[float]:
    """Return the losses of a pair's steps, ``number`` pairs of one estimator taking turns."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x, y = torch.randn(8, 2), torch.randn(8)

    def make(k: int) -> tuple[Any, Any]:
        def model(x: torch.Tensor, y: torch.Tensor) -> None:
            w = pyro.sample(f"w{k}", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("data", 8):
                pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)

        guide = ps.MeanFieldNormal(model, init_scale=0.3)
        guide._pyro_name = f"guide{k}"
        return model, guide.initialize(x, y)

    pairs, elbo, losses = [make(k) for k in range(number)], ps.SAM_ELBO(ps.Adversarial(1.0), ascent="previous"), []
    for _ in range(4):
        losses += [elbo.loss_and_grads(model_at(model), guide, x, y) for model, guide in pairs][:1]
    return losses


@pytest.mark.parametrize(
    "wrapped",
    [partial, lambda model: poutine.scale(model, scale=1.0), lambda model: pyro.condition(partial(model), data={})],
    ids=["partial", "scale", "condition"],
)
def test_a_model_that_is_wrapped_anew_at_each_step_still_climbs(wrapped: Any) -> None:
    alone = climbs(lambda model: model)
    assert alone[1] > alone[0] + 1
    assert climbs(wrapped) == pytest.approx(alone, rel=1e-9)


def test_a_dozen_pairs_that_take_turns_all_climb() -> None:
    assert climbs(lambda model: model, 12) == pytest.approx(climbs(lambda model: model), rel=1e-9)
