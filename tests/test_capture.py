"""compile=True: a captured step is the ordinary step, and is captured anew where it must be."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam
from torch import nn

import pyro_sam as ps
from pyro_sam._graph import lowering, replay

X = torch.linspace(-1, 1, 24).reshape(12, 2).double()
Y = (torch.sin(3 * X.sum(-1)) > 0).long()


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay graphs operation by operation, which takes no seconds of a C++ compiler."""
    monkeypatch.setattr(lowering, "compiled", lambda graph, inputs: graph)


def network(dropout: float) -> nn.Module:
    drop = nn.Dropout(dropout)
    return nn.Sequential(drop, nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), drop, nn.Linear(4, 2))


def problem(
    make: Callable[..., Any] = ps.MeanFieldNormal, dropout: float = 0.2
) -> tuple[nn.Module, Callable[..., Any], Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    net = network(dropout)
    bnn = ps.BayesianModule(net)

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        logits = bnn(x)
        with pyro.plate("data", 40, subsample_size=len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    guide = make(model)
    guide(X, Y)
    return net, model, guide


def trained(
    compile: bool, law: ps.Perturbation, make: Any = ps.MeanFieldNormal, dropout: float = 0.2, **settings: Any
) -> Any:
    """Return losses, parameters and buffers of a few steps on minibatches of two shapes."""
    net, model, guide = problem(make, dropout)
    svi = SVI(model, guide, Adam({"lr": 0.02}), ps.SAM_ELBO(law, compile=compile, **settings))
    pyro.set_rng_seed(1)
    losses = [svi.step(X[:n], Y[:n]) for n in (6, 6, 4, 6, 4)]
    parameters = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    return losses, parameters, {name: b.clone() for name, b in net.named_buffers()}


LAWS = [
    ps.Mean(),
    ps.Gaussian(),
    ps.Adversarial(0.5),
    ps.Adversarial(0.5, steps=2, geometry="fisher"),
    ps.MixSAM(0.5),
    ps.AscendedSample(0.5),
    ps.Mixture([ps.Gaussian(), ps.Adversarial(0.5)], [0.5, 0.5]),
]
CASES: list[tuple[ps.Perturbation, dict[str, Any]]] = [
    *((law, {}) for law in LAWS),
    (ps.Adversarial(0.5), {"ascent": "previous"}),
    (ps.AscendedSample(-0.5), {"ascent": "previous"}),
    (ps.Adversarial(0.5), {"scale_gradient": "mean", "kl_weight": 0.3}),
    (ps.MixSAM(0.5), {"scope": "site", "hide": ["1.bias"], "kl_weight": 0.0}),
    (ps.MixSAM(0.5), {"num_particles": 2}),
    (ps.MixSAM(0.5), {"make": AutoNormal}),
    (ps.Adversarial(0.5), {"make": AutoMultivariateNormal}),
]


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize(("law", "settings"), CASES, ids=str)
def test_replayed_steps_are_the_ordinary_ones(law: ps.Perturbation, settings: dict[str, Any]) -> None:
    ordinary, captured = trained(False, law, **settings), trained(True, law, **settings)
    assert captured[0] == pytest.approx(ordinary[0], rel=1e-10)
    for here, there in zip(captured[1:], ordinary[1:], strict=True):
        assert here.keys() == there.keys()
        for name in here:
            torch.testing.assert_close(here[name], there[name], rtol=1e-8, atol=1e-10)


def test_compiled_steps_are_the_ordinary_ones() -> None:
    # no dropout: with several threads torch's compiler draws masks in an order of its own
    ordinary, compiled = (trained(compile, ps.MixSAM(0.5), dropout=0.0) for compile in (False, True))
    assert compiled[0] == pytest.approx(ordinary[0], rel=1e-8)
    for name, value in compiled[1].items():
        torch.testing.assert_close(value, ordinary[1][name], rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("replayed")
def test_python_runs_only_for_the_capture() -> None:
    _, inner, guide = problem()
    runs = [0]

    def model(*args: Any) -> None:
        runs[0] += 1
        inner(*args)

    elbo = ps.SAM_ELBO(ps.MixSAM(0.5), compile=True)
    losses = [elbo.loss_and_grads(model, guide, X, Y)]
    captured = runs[0]
    losses += [elbo.loss_and_grads(model, guide, X, Y) for _ in range(3)]
    assert runs[0] == captured
    assert len(set(losses)) == 4  # fresh noise and fresh masks every time


@pytest.mark.usefixtures("replayed")
def test_capture_itself_advances_no_running_statistics() -> None:
    net, model, guide = problem()
    elbo = ps.SAM_ELBO(ps.MixSAM(0.5), compile=True)
    elbo.loss_and_grads(model, guide, X, Y)
    assert int(net[2].num_batches_tracked) == 1
    for _ in range(2):
        elbo.loss_and_grads(model, guide, X, Y)
    assert int(net[2].num_batches_tracked) == 3


@pytest.mark.usefixtures("replayed")
def test_what_a_graph_holds_is_captured_anew_when_it_changes() -> None:
    net, model, guide = problem()
    elbo, plain = ps.SAM_ELBO(ps.Mean(), compile=True), ps.SAM_ELBO(ps.Mean())

    def same() -> None:
        pyro.set_rng_seed(3)
        expected = float(plain.loss_and_grads(model, guide, X, Y))
        pyro.set_rng_seed(3)
        assert elbo.loss_and_grads(model, guide, X, Y) == pytest.approx(expected, rel=1e-10)

    same()
    net.eval()  # no dropout, running statistics
    same()
    elbo.kl_weight = plain.kl_weight = 0.25
    same()
    elbo.kl_weight = plain.kl_weight = 0.0
    same()
    elbo.perturbation = plain.perturbation = ps.Adversarial(0.7)
    same()
    store = pyro.get_param_store()
    name = next(iter(store.keys()))
    store[name] = store[name].detach() + 1.0  # another tensor under the same name
    same()


@pytest.mark.usefixtures("replayed")
def test_a_loaded_state_reaches_the_graph() -> None:
    _, model, guide = problem()
    elbo = ps.SAM_ELBO(ps.Adversarial(2.0), compile=True, ascent="previous")
    for _ in range(3):
        elbo.loss_and_grads(model, guide, X, Y)
    state = elbo.state_dict()
    losses = []
    for _ in range(2):
        elbo.load_state_dict(state)
        pyro.set_rng_seed(4)
        losses.append(elbo.loss_and_grads(model, guide, X, Y))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.usefixtures("replayed")
def test_elbo_module_and_accumulated_gradients() -> None:
    gradients = []
    for compile in (False, True):
        _, model, guide = problem()
        loss = ps.SAM_ELBO(ps.MixSAM(0.5), compile=compile)(model, guide)
        pyro.set_rng_seed(2)
        for _ in range(2):
            (0.5 * loss(X, Y)).backward()
        gradients.append([p.grad.clone() for p in guide.parameters()])
    for here, there in zip(*gradients, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("replayed")
def test_bad_values_are_refused_and_change_nothing() -> None:
    net, model, guide = problem()
    elbo = ps.SAM_ELBO(ps.Adversarial(0.5), compile=True)
    elbo.loss_and_grads(model, guide, X, Y)
    grads = [p.grad.clone() for p in guide.parameters()]
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    with pytest.raises(ValueError, match="logits"):
        elbo.loss_and_grads(model, guide, X * torch.nan, Y)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(guide.parameters(), grads, strict=True))
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.tensor(0))

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        self.runs = self.runs + 1
        return w


def branching(w: torch.Tensor) -> torch.Tensor:
    return w if w > 0 else -w


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize(
    ("function", "reason"), [(branching, "values of tensors"), (Counting(), "replaces its buffer 'runs'")]
)
def test_a_step_that_is_no_graph_runs_as_usual_and_says_so(
    function: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    def model(y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(1.0, 1.0))
        pyro.sample("obs", dist.Normal(function(w), 1.0), obs=y)

    results = []
    for compile in (False, True):
        pyro.clear_param_store()
        guide = ps.MeanFieldNormal(model, init_loc_fn=lambda site: torch.tensor(0.7))
        elbo = ps.SAM_ELBO(ps.Adversarial(0.5), compile=compile)
        with caplog.at_level(logging.WARNING):
            results.append([elbo.loss_and_grads(model, guide, torch.tensor(y)) for y in (0.0, 2.0)])
    assert results[0] == pytest.approx(results[1], rel=1e-12)
    assert [reason in record.message for record in caplog.records] == [True]


def test_compilation_leaves_pyros_validation_on() -> None:
    trained(True, ps.Mean())
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, -1.0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_recurrent_network_trains_with_compile_too(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    # in single precision the CPU has a kernel for the whole layer
    torch.set_default_dtype(dtype)
    x, results = X.reshape(4, 3, 2).to(dtype), []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        bnn = ps.BayesianModule(nn.LSTM(2, 3, batch_first=True))

        def model(x: torch.Tensor, bnn: Any = bnn) -> None:
            output = bnn(x)[0][:, -1, 0]
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(output, 1.0), obs=torch.ones(len(x)))

        guide = ps.MeanFieldNormal(model)
        elbo = ps.SAM_ELBO(ps.MixSAM(0.5), compile=compile)
        svi = SVI(model, guide, Adam({"lr": 0.02}), elbo)
        with caplog.at_level(logging.WARNING):
            losses = [svi.step(x) for _ in range(4)]
        results.append([losses, [p.detach().clone() for p in guide.parameters()]])
    assert not caplog.records
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    assert results[0][0] == pytest.approx(results[1][0], rel=rtol)
    for here, there in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(here, there, rtol=rtol, atol=rtol)


def test_without_a_compiler_the_graph_is_replayed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        def fail(*inputs: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return fail

    monkeypatch.setattr(lowering, "compiled", broken)
    with caplog.at_level(logging.WARNING):
        captured = trained(True, ps.MixSAM(0.5))
    assert captured[0] == pytest.approx(trained(False, ps.MixSAM(0.5))[0], rel=1e-10)
    assert "no C++ compiler" in caplog.records[0].message


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("how", ["in place", "through data", "new data"])
def test_a_prior_that_a_copy_was_made_of_is_followed(how: str, compile: bool) -> None:
    # a prior in single precision of a network in double: what the step holds is a copy
    scale = torch.tensor(1.0, dtype=torch.float32)
    bnn = ps.BayesianModule(nn.Linear(2, 2), dist.Normal(torch.tensor(0.0, dtype=torch.float32), scale))

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        output = bnn(x)
        with pyro.plate("data", 40, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Categorical(logits=output), obs=y)

    guide = ps.MeanFieldNormal(model).initialize(X, Y)
    elbo, ordinary = ps.SAM_ELBO(ps.Mean(), compile=compile), ps.SAM_ELBO(ps.Mean(), fast=False)
    found = []
    for value in (1.0, 0.3, 2.0):
        if how == "in place":
            bnn.prior.scale.fill_(value)
        elif how == "through data":
            bnn.prior.scale.data.fill_(value)
        else:
            bnn.prior.scale.data = torch.tensor(value, dtype=torch.float32)
        found.append([each.loss_and_grads(model, guide, X, Y) for each in (elbo, elbo, ordinary)])
    for first, second, right in found:
        assert first == pytest.approx(right, rel=1e-10)
        assert second == pytest.approx(right, rel=1e-10)
    assert found[0][2] != pytest.approx(found[2][2], rel=1e-3)


@pytest.mark.usefixtures("replayed")
def test_a_number_that_python_reads_off_a_tensor_is_followed() -> None:
    temperature = torch.tensor(0.5)

    def model(y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(w * float(temperature), 1.0).expand([12]).to_event(1), obs=y)

    guide, y = ps.MeanFieldNormal(model), X[:, 0]
    guide(y)
    elbo, ordinary = ps.SAM_ELBO(ps.Adversarial(2.0), compile=True), ps.SAM_ELBO(ps.Adversarial(2.0), fast=False)
    losses = []
    for value in (0.5, 0.5, 2.0, 0.5):
        temperature.fill_(value)
        losses.append(elbo.loss_and_grads(model, guide, y))
        assert losses[-1] == pytest.approx(ordinary.loss_and_grads(model, guide, y), rel=1e-10)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)
    assert len(elbo._knowledge._pairs.values()[0].graphs.values()[0].variants) == 2  # captured, both of them


class Batch:
    """A batch that does not show what it holds."""

    def __init__(self, y: torch.Tensor) -> None:
        self.y = y


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize("kind", ["array", "object", "sparse"])
def test_arguments_whose_content_may_change_unseen_are_not_captured(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    values = torch.zeros(5000)

    def model(given: Any) -> None:
        y = given.y if kind == "object" else given.to_dense() if kind == "sparse" else torch.as_tensor(given)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(w, 1.0).expand([5000]).to_event(1), obs=y)

    given: Any = {"array": values.numpy(), "object": Batch(values), "sparse": values.to_sparse()}[kind]
    guide = ps.MeanFieldNormal(model)
    guide(given)
    elbo, ordinary = ps.SAM_ELBO(ps.Mean(), compile=True), ps.SAM_ELBO(ps.Mean(), fast=False)
    with caplog.at_level(logging.WARNING):
        for value in (0.0, 3.0):
            values[2000:3000] = value  # in the middle of a long array, which does not show when printed
            given = values.to_sparse() if kind == "sparse" else given
            assert elbo.loss_and_grads(model, guide, given) == ordinary.loss_and_grads(model, guide, given)
    assert len(caplog.records) == 1
    assert "an argument is" in caplog.records[0].message


def test_compiled_steps_tell_strides_apart() -> None:
    x = torch.randn(6, 6)

    def model(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([6]).to_event(1))
        pyro.sample("obs", dist.Normal(x @ w, 1.0).to_event(1), obs=torch.ones(6))

    guide = ps.MeanFieldNormal(model)
    guide(x)
    elbo, ordinary = ps.SAM_ELBO(ps.Adversarial(0.5), compile=True), ps.SAM_ELBO(ps.Adversarial(0.5), fast=False)
    for each in (x, x.T, x, x.T):
        assert elbo.loss_and_grads(model, guide, each) == pytest.approx(
            ordinary.loss_and_grads(model, guide, each), rel=1e-9
        )


@pytest.mark.parametrize("make", [ps.MeanFieldNormal, AutoNormal])
def test_a_step_captured_right_after_a_state_was_loaded_climbs_along_it(replayed: None, make: Any) -> None:
    """A capture runs the step before it counts; what that run adds to the averages is taken off them again."""
    losses = []
    for compile in (True, False):
        _, model, guide = problem(make, dropout=0.0)
        before = ps.SAM_ELBO(ps.Adversarial(2.0), ascent="previous")
        pyro.set_rng_seed(1)
        for _ in range(3):
            before.loss_and_grads(model, guide, X, Y)
        after = ps.SAM_ELBO(ps.Adversarial(2.0), ascent="previous", compile=compile)
        after.load_state_dict(before.state_dict())
        losses.append([after.loss_and_grads(model, guide, X, Y) for _ in range(3)])
        still = ps.SAM_ELBO(ps.Adversarial(2.0), ascent="previous").loss_and_grads(model, guide, X, Y)
        assert abs(losses[-1][0] - still) > 1e-3  # without a state it would not climb
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.usefixtures("replayed")
def test_second_derivatives_of_a_captured_step_are_refused() -> None:
    _, model, guide = problem()
    loss = ps.SAM_ELBO(ps.Adversarial(0.5), compile=True).differentiable_loss(model, guide, X, Y)
    with pytest.raises(RuntimeError, match="has no second derivatives; take the loss with compile=False"):
        torch.autograd.grad(loss, list(guide.parameters()), create_graph=True)


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize("change", ["rho", "rows"])
def test_captures_that_are_of_no_use_end(
    change: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken = []
    right = replay.capture
    monkeypatch.setattr(replay, "capture", lambda *args: taken.append(1) or right(*args))
    _, model, guide = problem(dropout=0.0)
    elbo = ps.SAM_ELBO(ps.Adversarial(0.5), compile=True)
    for k in range(24):
        if change == "rho":
            elbo.perturbation = ps.Adversarial(0.5 + 0.01 * k)
        rows = torch.arange(12 if change == "rho" else k + 2) % 12
        elbo.loss_and_grads(model, guide, X[rows], Y[rows])
    assert len(taken) == 16
    assert [message for message in caplog.messages if "none of its last captures was of use again" in message]
    assert len(caplog.messages) == 1


@pytest.mark.usefixtures("replayed")
def test_a_coin_between_laws_leaves_the_remembered_gradients_as_an_ordinary_step_does() -> None:
    law = ps.Mixture([ps.Gaussian(), ps.Adversarial(0.5)], [0.5, 0.5])
    losses, values, _ = trained(True, law, ascent="previous")
    want = trained(False, law, ascent="previous", fast=False)
    assert losses == pytest.approx(want[0], rel=1e-9)
    for name, value in values.items():
        torch.testing.assert_close(value, want[1][name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("who", ["model", "hide", "law"])
def test_a_single_number_of_a_large_array_may_change(
    replayed: None, caplog: pytest.LogCaptureFixture, who: str
) -> None:
    table = np.full(40_000, 0.5)
    factor = (lambda: float(table[12_345])) if who == "model" else (lambda: 1.0)  # seen by one of the three alone

    class Weighted(ps.Perturbation):
        def noise(self, space: ps.NoiseSpace) -> torch.Tensor:
            return float(table[12_345]) * space.gaussian()

    def model(x: torch.Tensor) -> None:
        w, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "wb")
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(w * factor() + b, 1.0), obs=x)

    guide = ps.MeanFieldNormal(model)
    guide.initialize(X[:, 0])
    law = Weighted() if who == "law" else ps.Mean()
    hide: Any = (lambda name: name == "w" and bool(table[12_345] > 1.0)) if who == "hide" else ()
    elbos = [ps.SAM_ELBO(law, hide=hide, compile=compile, fast=compile) for compile in (True, False)]

    def losses() -> list[float]:
        found = []
        for elbo in elbos:
            pyro.set_rng_seed(0)
            found.append(elbo.loss_and_grads(model, guide, X[:, 0]))
        return found

    with caplog.at_level(logging.WARNING):
        for value in (0.5, 0.5, 0.5, 3.0, 3.0, 0.1):
            table[12_345] = value
            compiled, ordinary = losses()
            assert compiled == pytest.approx(ordinary, rel=1e-4)
    assert "sees a large NumPy array" in caplog.text
