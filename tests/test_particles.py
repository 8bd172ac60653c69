"""Many weights at once, against a loop over plain networks that hold one of them each."""

import copy
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from layers import LAYERS, make
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_sam.nn import BayesianModule

P, X = 3, torch.linspace(-1, 1, 24).reshape(6, 4).double()
PARTICLES = "num_particles_vectorized"


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def draw(net: nn.Module, *leading: int) -> dict[str, Tensor]:
    return {name: (0.5 * torch.randn(*leading, *p.shape)).requires_grad_() for name, p in net.named_parameters()}


def networks(net: nn.Module, weights: Mapping[str, Tensor]) -> list[nn.Module]:
    """Return a plain copy of the network for each weight along the first dimension."""
    copies = [copy.deepcopy(net) for _ in range(P)]
    for i, twin in enumerate(copies):
        for name, parameter in twin.named_parameters():
            if name in weights:
                parameter.data = weights[name][i].detach().clone().reshape(parameter.shape)
    return copies


def in_particles(bnn: BayesianModule, weights: Mapping[str, Tensor], *args: Any, dim: int = -2, **kwargs: Any) -> Any:
    with pyro.plate(PARTICLES, P, dim=dim), poutine.condition(data=dict(weights)):
        return bnn(*args, **kwargs)


# torch has no rule of its own for attention on a CPU, and says so
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_particles_are_a_loop_over_networks(layer: str, train: bool) -> None:
    net, x = make(layer, train=train and layer != "BatchNorm")
    weights = draw(net, P, 1)
    copies = networks(net, weights)
    output = in_particles(BayesianModule(net), weights, x)
    expected = torch.stack([twin(x) for twin in copies])
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-12)
    (output**2).sum().backward()
    (expected**2).sum().backward()
    for name, weight in weights.items():
        gradients = [dict(twin.named_parameters())[name].grad for twin in copies]
        torch.testing.assert_close(weight.grad[:, 0], torch.stack(gradients), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layer", ["Linear", "LSTM"])
@pytest.mark.parametrize("leading", [(P,), (P, 1), (P, 1, 1), (P, 1, 1, 1)])
def test_particles_stand_at_their_plate(layer: str, leading: tuple[int, ...]) -> None:
    net, x = make(layer)
    weights = draw(net, *leading)
    output = in_particles(BayesianModule(net), weights, x, dim=-len(leading))
    expected = torch.stack([twin(x) for twin in networks(net, weights)])
    shape = (P, *[1] * max(len(leading) - 2, 0), *expected.shape[1:])
    torch.testing.assert_close(output, expected.reshape(shape), rtol=1e-11, atol=1e-12)


def test_a_particle_of_one_keeps_its_dimension() -> None:
    weights = draw(mlp(), 1, 1)
    assert poutine.condition(BayesianModule(mlp()), weights)(X).shape == (1, 6, 3)


def test_a_plate_of_networks_left_of_the_data_is_an_ensemble() -> None:
    bnn = BayesianModule(mlp())
    with pyro.plate("members", P, dim=-2):
        trace = poutine.trace(bnn).get_trace(X)
    weights = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
    expected = torch.stack([twin(X) for twin in networks(bnn.net, weights)])
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], expected, rtol=1e-11, atol=1e-12)


def test_shared_weights_and_hidden_parameters_get_the_gradients_of_all_particles() -> None:
    net = mlp()
    weights = draw(net, P, 1)
    del weights["0.bias"]
    weights["2.bias"] = torch.randn(3, requires_grad=True)
    repeated = {**weights, "2.bias": weights["2.bias"].expand(P, 3)}
    copies = networks(net, repeated)
    (in_particles(BayesianModule(net, hide="0.bias"), weights, X) ** 2).sum().backward()
    for twin in copies:
        (twin(X) ** 2).sum().backward()
    torch.testing.assert_close(net[0].bias.grad, sum(twin[0].bias.grad for twin in copies), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weights["2.bias"].grad, sum(twin[2].bias.grad for twin in copies), rtol=1e-10, atol=0)


def test_every_particle_has_a_dropout_mask_of_its_own() -> None:
    weights = {name: w[:1].expand(P, *w.shape[1:]) for name, w in draw(nn.Linear(4, 200), P, 1).items()}
    net = nn.Sequential(nn.Linear(4, 200), nn.Dropout(0.5))
    output = in_particles(BayesianModule(net), {f"0.{name}": w for name, w in weights.items()}, X)
    kept = output != 0
    assert not torch.equal(kept[0], kept[1])
    share = kept.double()
    assert abs(share.mean() - 0.5) < 4 * share.std() / share.numel() ** 0.5


def test_output_may_be_any_structure() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor, *, name: str) -> dict[str, Any]:
            y = self.linear(x)
            return {"pair": (y, [y.sum(-1), None]), "name": name}

    weights = draw(Several(), P, 1, 1)
    output = in_particles(BayesianModule(Several()), weights, X, dim=-3, name="x")
    expected = [twin(X, name="x") for twin in networks(Several(), weights)]
    pairs = [
        torch.stack(values)[:, None]
        for values in zip(*[(e["pair"][0], e["pair"][1][0]) for e in expected], strict=True)
    ]
    assert output["name"] == "x"
    assert output["pair"][1][1] is None
    torch.testing.assert_close((output["pair"][0], output["pair"][1][0]), tuple(pairs), rtol=1e-12, atol=1e-14)


# Pyro's own vectorised runs


def classifier(bnn: BayesianModule, nesting: int) -> Any:
    def one_plate(x: Tensor, y: Tensor) -> Any:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    def two_plates(x: Tensor, y: Tensor) -> Any:
        logits = bnn(x)
        with pyro.plate("data", len(x), dim=-1), pyro.plate("raters", 2, dim=-2):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    return {1: one_plate, 2: two_plates}[nesting]


@pytest.mark.parametrize("nesting", [1, 2])
def test_vectorised_elbo_is_the_mean_over_its_particles(nesting: int) -> None:
    y = torch.randint(0, 3, (2, 6)[-nesting:])
    bnn = BayesianModule(mlp())
    guide = AutoNormal(classifier(bnn, nesting), init_scale=0.3)
    guide(X, y)
    with pyro.plate(PARTICLES, P, dim=-1 - nesting):
        guide_trace = poutine.trace(guide).get_trace(X, y)
        trace = poutine.trace(poutine.replay(classifier(bnn, nesting), guide_trace)).get_trace(X, y)
    trace.compute_log_prob()
    assert trace.nodes["obs"]["fn"].batch_shape == (P, *y.shape)
    log_prob = trace.nodes["obs"]["log_prob"]
    for i, twin in enumerate(networks(bnn.net, {n: trace.nodes[n]["value"] for n, _ in bnn.net.named_parameters()})):
        expected = dist.Categorical(logits=twin(X)).log_prob(y)
        torch.testing.assert_close(log_prob[i], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("nesting", [1, 2])
def test_vectorised_elbo_equals_the_sequential_one_in_the_mean(nesting: int) -> None:
    y = torch.randint(0, 3, (2, 6)[-nesting:])
    bnn = BayesianModule(mlp())
    guide = AutoNormal(classifier(bnn, nesting), init_scale=0.3)
    guide(X, y)
    together = torch.stack(
        [
            Trace_ELBO(20, vectorize_particles=True).differentiable_loss(classifier(bnn, nesting), guide, X, y)
            for _ in range(40)
        ]
    )
    alone = torch.stack([Trace_ELBO().differentiable_loss(classifier(bnn, nesting), guide, X, y) for _ in range(400)])
    error = (together.var() / 40 + alone.var() / 400).sqrt()
    assert abs(together.mean() - alone.mean()) < 4 * error


@pytest.mark.parametrize("nesting", [1, 2])
@pytest.mark.parametrize("layer", ["Linear", "LSTM"])
def test_parallel_prediction_is_the_sequential_one(nesting: int, layer: str) -> None:
    net, x = make(layer)
    bnn = BayesianModule(net)
    samples = {name: w.detach() for name, w in draw(net, P).items()}

    def model() -> Tensor:
        output = bnn(x)
        with pyro.plate_stack("plates", (1,) * (nesting - 1) + (len(x),)):
            pyro.sample("obs", dist.Normal(0.0, 1.0))
        return output

    def predict(parallel: bool) -> Tensor:
        return Predictive(model, samples, return_sites=("_RETURN",), parallel=parallel)()["_RETURN"]

    expected = torch.stack([twin(x) for twin in networks(net, samples)])
    torch.testing.assert_close(predict(True).reshape(expected.shape), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(predict(False).reshape(expected.shape), expected, rtol=1e-11, atol=1e-12)


# refusals


def test_call_inside_a_data_plate_is_refused() -> None:
    match = r"inside the plate 'data' \(dim=-1\).* its 6 elements.* before you enter"
    with pytest.raises(ValueError, match=match), pyro.plate("data", 6):
        BayesianModule(mlp())(X)


def test_call_inside_a_plate_within_the_particles_is_refused() -> None:
    outer, inner = pyro.plate(PARTICLES, P, dim=-3), pyro.plate("groups", 4, dim=-2)
    with pytest.raises(ValueError, match=r"inside the plate 'groups' \(dim=-2\)"), outer, inner:
        BayesianModule(mlp())(X)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((2, P, 5, 4), r"'0.weight' has the dimensions \(2, 3\) to the left of its parameter's \(5, 4\); only one"),
        ((4, 5), r"'0.weight' has a value of shape \(4, 5\), the network's parameter has shape \(5, 4\)"),
        ((4,), r"'0.weight' has a value of shape \(4,\)"),
    ],
)
def test_values_of_another_shape_are_refused(shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        poutine.condition(BayesianModule(mlp()), {"0.weight": torch.zeros(shape)})(X)


def test_weights_with_different_numbers_of_particles_are_refused() -> None:
    values = {"0.weight": torch.zeros(2, 1, 5, 4), "2.weight": torch.zeros(P, 1, 3, 5)}
    with pytest.raises(ValueError, match=r"differ in their numbers of particles, \{'0.weight': 2, '2.weight': 3\}"):
        poutine.condition(BayesianModule(mlp()), values)(X)


@pytest.mark.parametrize("looped", [False, True])
def test_running_statistics_of_several_particles_are_refused_and_stay(looped: bool) -> None:
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4), *[nn.RNNCell(4, 4)] * looped)

    net = Net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(
        ValueError, match=r"BatchNorm1d '1' cannot keep running statistics .* eval mode, .* vectorize_p"
    ):
        in_particles(BayesianModule(net), draw(net, P, 1), X)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_torch_cannot_vectorise_is_named_with_a_cure() -> None:
    class Branching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if y.sum().item() > 0 else -y

    with pytest.raises(ValueError, match=r"several particles at once; do without vectorize_particles .*item\(\)"):
        in_particles(BayesianModule(Branching(4, 3)), draw(nn.Linear(4, 3), P, 1), X)


def test_the_networks_own_error_is_not_renamed() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match=r"^the user.s own$"):
        in_particles(BayesianModule(Failing(4, 3)), draw(nn.Linear(4, 3), P, 1), X)


@pytest.mark.parametrize("enabled", [True, False])
def test_torchs_switch_for_fused_attention_is_left_as_it_was(enabled: bool) -> None:
    seen = []

    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.backends.mha.get_fastpath_enabled())
            raise RuntimeError("the user's own")

    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with pytest.raises(RuntimeError, match="the user's own"):
            in_particles(BayesianModule(Failing(4, 3)), draw(nn.Linear(4, 3), P, 1), X)
        assert (seen, torch.backends.mha.get_fastpath_enabled()) == ([False], enabled)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
