"""One estimator behind every interface: SVI, ELBOModule, mixed precision, checkpointing, copies, several models."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pair_guides as guides
import pair_models as models
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import gradients_of
from pair_models import X, Y
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam, ClippedAdam
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyro_sam as ps

LAWS = [ps.Gaussian(), ps.Adversarial(0.5), ps.MixSAM(1.0), ps.AscendedSample(0.5)]
each_law = pytest.mark.parametrize("law", LAWS, ids=repr)
Gradients = dict[str, Tensor]


@pytest.fixture
def local_parameters() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        yield


def gradients_through_module(elbo: Any, model: Any, guide: Any, seed: int = 3) -> tuple[float, Gradients]:
    module = elbo(model, guide)
    pyro.set_rng_seed(0)
    module()  # guides are lazy
    module.zero_grad()
    pyro.set_rng_seed(seed)
    loss = module()
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in guide.named_parameters() if p.grad is not None}


def assert_same(first: tuple[float, Gradients], second: tuple[float, Gradients]) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-12)
    assert first[1].keys() == second[1].keys()
    for name in first[1]:
        torch.testing.assert_close(first[1][name], second[1][name])


def assert_parameters_equal(first: nn.Module, second: nn.Module) -> None:
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


# Parameters in the store and parameters in modules


@each_law
@pytest.mark.parametrize("make", [ps.MeanFieldNormal, AutoNormal, lambda model: guides.ModuleGuide()])
def test_module_local_parameters_get_the_same_gradients(make: Callable[..., Any], law: ps.Perturbation) -> None:
    expected = gradients_through_module(ps.SAM_ELBO(law), models.deterministic, make(models.deterministic))
    assert expected[1]
    pyro.clear_param_store()
    with pyro.settings.context(module_local_params=True):
        found = gradients_through_module(ps.SAM_ELBO(law), models.deterministic, make(models.deterministic))
        assert not list(pyro.get_param_store().keys())
    assert_same(found, expected)


@pytest.mark.parametrize("local", [False, True])
def test_svi_and_a_torch_optimiser_take_the_same_steps(local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        trained = []
        for use_svi in (True, False):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            guide = ps.MeanFieldNormal(models.deterministic).initialize()
            elbo = ps.SAM_ELBO(ps.MixSAM(1.0))
            if use_svi:
                svi = SVI(models.deterministic, guide, Adam({"lr": 0.01}), elbo)
                losses = [svi.step() for _ in range(5)]
            else:
                module = elbo(models.deterministic, guide)
                optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
                losses = []
                for _ in range(5):
                    optimizer.zero_grad()
                    loss = module()
                    loss.backward()
                    optimizer.step()
                    losses.append(float(loss.detach()))
            trained.append((losses, guide))
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-12)
    assert_parameters_equal(trained[0][1], trained[1][1])


@each_law
def test_evaluate_loss_is_pyros_loss_and_trains_nothing(law: ps.Perturbation) -> None:
    guide = ps.MeanFieldNormal(models.hierarchical).initialize()
    before = copy.deepcopy(guide.state_dict())
    losses = []
    for elbo in (ps.SAM_ELBO(law), TraceMeanField_ELBO()):
        pyro.set_rng_seed(1)
        losses.append(SVI(models.hierarchical, guide, Adam({}), elbo).evaluate_loss())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in guide.parameters())


# Optimisers


def rows_model(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", 12, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal((x * w).sum(-1), 0.7), obs=y)


def test_accumulated_minibatches_are_the_whole_batch() -> None:
    guide = ps.MeanFieldNormal(rows_model).initialize(X, Y)
    module = ps.SAM_ELBO(ps.Mean())(rows_model, guide)
    gradients = []
    for splits in (1, 3):
        module.zero_grad()
        for x, y in zip(X.chunk(splits), Y.chunk(splits), strict=True):
            (module(x, y) / splits).backward()
        gradients.append({name: p.grad.clone() for name, p in guide.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


def test_gradients_clip_by_their_global_norm() -> None:
    guide = ps.MeanFieldNormal(models.regression).initialize()
    module = ps.SAM_ELBO()(models.regression, guide)
    module().backward()
    before = torch.cat([p.grad.flatten() for p in guide.parameters()])
    assert torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1) == pytest.approx(float(before.norm()))
    clipped = torch.cat([p.grad.flatten() for p in guide.parameters()])
    torch.testing.assert_close(clipped, 0.1 * before / before.norm(), rtol=1e-4, atol=1e-6)
    svi = SVI(models.regression, guide, ClippedAdam({"lr": 0.01, "clip_norm": 1.0}), ps.SAM_ELBO())
    assert svi.step() < float("inf")


def test_lbfgs_with_a_closure_finds_the_exact_map() -> None:
    guide = ps.MeanFieldNormal(models.deterministic, learn_scale=False).initialize()
    module = ps.SAM_ELBO(ps.Mean())(models.deterministic, guide)
    optimizer = torch.optim.LBFGS(module.parameters(), tolerance_change=0.0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    precision = X.T @ X / 0.7**2 + torch.eye(3)
    torch.testing.assert_close(guide.median()["w"], torch.linalg.solve(precision, X.T @ Y / 0.7**2))


# Mixed precision and checkpointing


def single_precision_network() -> tuple[Any, nn.Module]:
    torch.set_default_dtype(torch.float32)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    bnn, x, y = ps.BayesianModule(net), X.float(), (Y > 0).long()

    def model() -> None:
        logits = bnn(x)
        with pyro.plate("data", 12):
            pyro.sample("obs", dist.Categorical(logits=logits.float()), obs=y)

    return model, ps.MeanFieldNormal(model, init_scale=0.02).initialize()


@each_law
def test_autocast_to_bfloat16_stays_close_and_keeps_gradients_in_float32(law: ps.Perturbation) -> None:
    model, guide = single_precision_network()
    exact_loss, exact = gradients_through_module(ps.SAM_ELBO(law, kl_weight=0.1), model, guide)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = gradients_through_module(ps.SAM_ELBO(law, kl_weight=0.1), model, guide)
    assert loss == pytest.approx(exact_loss, rel=0.02)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0)
        assert cosine > 0.99, name


@each_law
def test_grad_scaler_in_its_usual_order_takes_the_unscaled_step(law: ps.Perturbation) -> None:
    trained = []
    for scaled in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide = single_precision_network()
        module = ps.SAM_ELBO(law)(model, guide)
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(module()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
        trained.append(guide)
    for (name, a), (_, b) in zip(*(guide.named_parameters() for guide in trained), strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-5, atol=1e-6)


@each_law
def test_activation_checkpointing_in_the_model_changes_nothing(law: ps.Perturbation) -> None:
    decoder = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 1))
    results = []
    for checkpointed in (False, True):

        def model(checkpointed: bool = checkpointed) -> None:
            pyro.module("decoder", decoder)
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            mean = checkpoint(decoder, X * w, use_reentrant=False) if checkpointed else decoder(X * w)
            with pyro.plate("data", 12):
                pyro.sample("obs", dist.Normal(mean.squeeze(-1), 0.7), obs=Y)

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = ps.MeanFieldNormal(model).initialize()
        pyro.set_rng_seed(1)
        results.append(gradients_of(ps.SAM_ELBO(law), model, guide))
    assert_same(results[0], results[1])


# Copies, and several models in one process


@each_law
def test_pickled_guide_and_elbo_go_on_as_the_originals(law: ps.Perturbation, local_parameters: None) -> None:
    guide, elbo = ps.MeanFieldNormal(models.hierarchical).initialize(), ps.SAM_ELBO(law)
    elbo.loss_and_grads(models.hierarchical, guide)
    again = pickle.loads(pickle.dumps((guide, elbo)))
    assert_same(
        gradients_through_module(again[1], models.hierarchical, again[0]),
        gradients_through_module(elbo, models.hierarchical, guide),
    )


def test_copied_guide_and_elbo_live_on_their_own(local_parameters: None) -> None:
    guide, elbo = ps.MeanFieldNormal(models.hierarchical).initialize(), ps.SAM_ELBO()
    elbo.loss_and_grads(models.hierarchical, guide)
    its_elbo, its_guide = copy.deepcopy((elbo, guide))
    before = copy.deepcopy(guide.state_dict())
    SVI(models.hierarchical, its_guide, Adam({"lr": 0.1}), its_elbo).step()
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name])
        assert not torch.equal(value, its_guide.state_dict()[name])


def test_a_cleared_param_store_makes_a_second_run_the_first() -> None:
    elbo, runs = ps.SAM_ELBO(ps.MixSAM(1.0)), []
    for _ in range(2):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        guide = ps.MeanFieldNormal(models.hierarchical)
        svi = SVI(models.hierarchical, guide, Adam({"lr": 0.1}), elbo)
        runs.append([svi.step() for _ in range(4)])
    assert runs[0] == runs[1]


def test_one_estimator_serves_two_models_in_turn() -> None:
    pairs = [(models.deterministic, guides.of_w), (models.markov_chain, guides.markov)]
    alone = []
    for model, make in pairs:
        pyro.set_rng_seed(7)
        alone.append(gradients_of(ps.SAM_ELBO(), model, make(model))[0])
    elbo = ps.SAM_ELBO()
    for _ in range(2):
        for (model, make), expected in zip(pairs, alone, strict=True):
            pyro.set_rng_seed(7)
            assert gradients_of(elbo, model, make(model))[0] == pytest.approx(expected, rel=1e-12)


def test_parameters_of_another_model_in_the_store_are_refused() -> None:
    def wider() -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))

    ps.SAM_ELBO().loss_and_grads(models.deterministic, ps.MeanFieldNormal(models.deterministic))
    with pytest.raises(
        ValueError, match=r"'MeanFieldNormal.locs.w' with shape \(3,\), .* shape \(4,\).*clear_param_store"
    ):
        ps.SAM_ELBO().loss_and_grads(wider, ps.MeanFieldNormal(wider))
    with pyro.settings.context(module_local_params=True):
        ps.MeanFieldNormal(wider).initialize()
