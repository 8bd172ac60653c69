"""BayesianModule against a plain copy of the network that holds the sampled weights, and against closed forms."""

import copy
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from layers import LAYERS, Tied, make
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.checkpoint import checkpoint

from pyro_sam.nn import BayesianModule, fan_in_normal, init_to_module

X, Y = torch.linspace(-1, 1, 24).reshape(6, 4).double(), torch.tensor([0, 2, 1, 1, 0, 2])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def plain(net: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of the network with the weights written into it."""
    net = copy.deepcopy(net)
    for name, parameter in net.named_parameters():
        if name in weights:
            parameter.data = weights[name].detach().clone()
    return net


def draw(net: nn.Module) -> dict[str, Tensor]:
    return {name: (0.5 * torch.randn_like(p)).requires_grad_() for name, p in net.named_parameters()}


def classifier(bnn: Callable[[Tensor], Tensor], total: int = len(X)) -> Callable[..., Any]:
    def model(x: Tensor = X, y: Tensor | None = Y) -> Any:
        logits = bnn(x)
        with pyro.plate("data", total, subsample_size=len(x)):
            return pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    return model


def prior_of(bnn: BayesianModule, name: str, x: Tensor = X) -> Any:
    return poutine.trace(bnn).get_trace(x).nodes[name]["fn"]


# the functional run


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_output_and_gradients_are_those_of_a_plain_network_with_these_weights(layer: str, train: bool) -> None:
    net, x = make(layer, train=train)
    before = copy.deepcopy(net.state_dict())
    weights = draw(net)
    twin = plain(net, weights)
    bnn = BayesianModule(net)
    bnn(x)  # a first run with other weights, for layers that keep what they last ran with
    net.load_state_dict(before)
    output, expected = poutine.condition(bnn, weights)(x), twin(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    (output**2).sum().backward()
    (expected**2).sum().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(weights[name].grad, parameter.grad, rtol=1e-10, atol=1e-12)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())


@pytest.mark.parametrize("layer", ["LSTM", "MultiheadAttention", "Tied"])
def test_gradient_is_the_central_difference(layer: str) -> None:
    net, x = make(layer, train=False)
    weights = draw(net)
    name = next(iter(weights))
    direction = torch.zeros_like(weights[name])
    direction[1, 0] = 1

    def loss(shift: float = 0.0) -> Tensor:
        moved = weights[name] + shift * direction
        return (poutine.condition(BayesianModule(net), {**weights, name: moved})(x) ** 2).sum()

    (gradient,) = torch.autograd.grad(loss(), weights[name])
    difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
    torch.testing.assert_close(gradient[1, 0], difference, rtol=1e-8, atol=1e-9)


def test_parameters_hidden_later_are_no_latents_from_the_next_run_on() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    bnn, x = BayesianModule(net), torch.ones(5, 3)

    def latents() -> set[str]:
        return {name for name, node in pyro.poutine.trace(bnn).get_trace(x).nodes.items() if node["type"] == "sample"}

    assert latents() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    bnn.hide = "0"
    assert bnn.hide == "0"
    assert latents() == {"1.weight", "1.bias"}
    with pytest.raises(ValueError, match="hide must name parameters or submodules of net, got '7'"):
        bnn.hide = "7"
    assert latents() == {"1.weight", "1.bias"}
    bnn.hide = ()
    assert latents() == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_buffers_are_the_networks_own_and_move_once_per_run() -> None:
    net, x = make("BatchNorm")
    weights = draw(net)
    twin = plain(net, weights)
    poutine.condition(BayesianModule(net), weights)(x)
    twin(x)
    assert net[1].num_batches_tracked == 1
    torch.testing.assert_close(dict(net.named_buffers()), dict(twin.named_buffers()), rtol=1e-12, atol=1e-14)


def test_keyword_arguments_reach_the_network() -> None:
    bnn = BayesianModule(nn.MultiheadAttention(4, 2, batch_first=True))
    x = torch.randn(2, 3, 4)
    assert bnn(x, x, value=x, need_weights=False)[1] is None


def test_checkpointing_inside_or_around_is_refused() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    with pytest.raises(RuntimeError, match=r"Activation checkpointing .* sampled weights"):
        BayesianModule(Checkpointed(nn.Linear(4, 3)))(X)
    with pytest.raises(RuntimeError, match="Activation checkpointing"):
        checkpoint(BayesianModule(mlp()), X, use_reentrant=False)
    checkpoint(mlp(), X, use_reentrant=False)


# sites and priors


@pytest.mark.parametrize("layer", ["Linear", "Tied", "LSTM"])
def test_sites_are_the_parameters_and_each_counts_once(layer: str) -> None:
    net, x = make(layer)
    trace = poutine.trace(BayesianModule(net, dist.Normal(1.0, 2.0))).get_trace(x)
    assert {name: trace.nodes[name]["value"].shape for name in trace.stochastic_nodes} == {
        name: parameter.shape for name, parameter in net.named_parameters()
    }
    w = torch.cat([trace.nodes[name]["value"].flatten() for name in trace.stochastic_nodes])
    expected = (-0.5 * ((w - 1) / 2) ** 2 - math.log(2) - 0.5 * math.log(2 * math.pi)).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-12, atol=0)
    assert all(not trace.nodes[name]["fn"].batch_shape for name in trace.stochastic_nodes)


def test_default_prior_is_standard_normal() -> None:
    w = torch.randn(5, 4)
    prior = prior_of(BayesianModule(mlp()), "0.weight")
    torch.testing.assert_close(prior.log_prob(w), dist.Normal(0.0, 1.0).log_prob(w).sum(), rtol=1e-12, atol=0)


def test_scalar_parameter_gets_a_scalar_site() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x

    prior = prior_of(BayesianModule(Scale(), fan_in_normal(3.0)), "factor")
    assert prior.shape() == ()
    assert prior.scale == 3


SCALAR_PRIORS: dict[str, Callable[[], Any]] = {
    "Normal": lambda: dist.Normal(0.5, 2.0),
    "StudentT": lambda: dist.StudentT(5.0, 0.1, 2.0),
    "Laplace": lambda: dist.Laplace(0.0, 1.0),
    "LogNormal": lambda: dist.LogNormal(0.0, 1.0),
    "HalfCauchy": lambda: dist.HalfCauchy(2.0),
    "masked": lambda: dist.Normal(0.0, 1.0).mask(torch.tensor(True)),
    "transformed": lambda: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0),
        [dist.transforms.AffineTransform(torch.tensor(1.0), torch.tensor(3.0)), dist.transforms.SigmoidTransform()],
    ),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.25, 0.75])), dist.Normal(torch.zeros(2), torch.tensor([1.0, 0.1]))
    ),
}


@pytest.mark.parametrize("make_prior", SCALAR_PRIORS.values(), ids=SCALAR_PRIORS)
def test_prior_moves_to_the_parameters_dtype_and_the_users_own_stays(make_prior: Callable[[], Any]) -> None:
    given = make_prior()
    prior = prior_of(BayesianModule(mlp().float(), given), "0.weight", X.float())
    w = given.sample((5, 4))
    assert w.dtype == torch.float64
    assert prior.sample().dtype == torch.float32
    assert prior.log_prob(w.float()).dtype == torch.float32
    torch.testing.assert_close(prior.log_prob(w.float()).double(), given.log_prob(w).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make_prior", SCALAR_PRIORS.values(), ids=SCALAR_PRIORS)
def test_prior_moves_to_the_parameters_device(make_prior: Callable[[], Any]) -> None:
    net = mlp()
    bnn = BayesianModule(net, make_prior())
    bnn.to("meta")
    with pyro.validation_enabled(False):
        trace = poutine.trace(bnn).get_trace(X.to("meta"))
        assert trace.log_prob_sum().device.type == "meta"
    assert trace.nodes["_RETURN"]["value"].shape == (6, 3)
    assert all(trace.nodes[name]["value"].is_meta for name, _ in net.named_parameters())


def test_static_prior_is_built_once_and_a_callable_asked_at_every_run() -> None:
    asked = []

    def ask(name: str, parameter: nn.Parameter) -> Any:
        asked.append(name)
        return dist.Normal(0.0, 1.0)

    for prior in (dist.Normal(0.0, 1.0), fan_in_normal()):
        bnn = BayesianModule(mlp(), prior)
        assert prior_of(bnn, "0.weight") is prior_of(bnn, "0.weight")
    bnn = BayesianModule(mlp(), ask)
    bnn(X), bnn(X)
    assert asked == [name for name, _ in bnn.net.named_parameters()] * 2


def test_prior_that_learns_is_never_stale() -> None:
    scale = torch.tensor(1.0, requires_grad=True)
    bnn = BayesianModule(mlp().float(), dist.Normal(0.0, scale))
    with torch.no_grad():
        scale.fill_(2.0)
    w = torch.randn(5, 4)
    prior = prior_of(bnn, "0.weight", X.float())
    (gradient,) = torch.autograd.grad(prior.log_prob(w.float()).double(), scale)
    torch.testing.assert_close(gradient, ((w / 2) ** 2 - 1).sum() / 2, rtol=1e-5, atol=0)


def test_prior_kept_from_inference_mode_serves_a_later_gradient() -> None:
    bnn = BayesianModule(mlp().float())
    bnn.double()
    with torch.inference_mode():
        bnn(X)
    w = torch.randn(5, 4, requires_grad=True)
    prior_of(bnn, "0.weight").log_prob(w).backward()
    torch.testing.assert_close(w.grad, -w.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "expand",
    [
        lambda scalar, shape: scalar,
        lambda scalar, shape: scalar.expand(shape),
        lambda scalar, shape: scalar.expand(shape).to_event(1),
        lambda scalar, shape: scalar.expand(shape).to_event(),
    ],
)
def test_callable_prior_may_learn_and_have_its_shape_as_batch_or_event(expand: Callable[..., Any]) -> None:
    def prior(name: str, parameter: nn.Parameter) -> Any:
        scale = pyro.param(f"scale.{name}", torch.tensor(2.0), constraint=constraints.positive)
        return expand(dist.Normal(0.0, scale), parameter.shape)

    trace = poutine.trace(BayesianModule(mlp(), prior)).get_trace(X)
    site, scale = trace.nodes["0.weight"], trace.nodes["scale.0.weight"]["value"]
    assert site["fn"].event_shape == (5, 4)
    (gradient,) = torch.autograd.grad(site["fn"].log_prob(site["value"].detach()), scale)
    torch.testing.assert_close(gradient, ((site["value"] / 2) ** 2 - 1).sum() / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("parameter", "std"), [((7, 5), 0.2 / 5**0.5), ((7, 3, 2, 4), 0.2 / 24**0.5), ((7,), 0.2), ((), 0.2)]
)
def test_fan_in_normal_divides_by_the_root_of_the_inputs(parameter: tuple[int, ...], std: float) -> None:
    prior = pickle.loads(pickle.dumps(fan_in_normal(0.2)))("w", torch.zeros(parameter))
    w = torch.randn(parameter)
    torch.testing.assert_close(prior.log_prob(w), dist.Normal(0.0, std).log_prob(w).sum(), rtol=1e-12, atol=0)
    assert prior.event_shape == parameter


def test_fan_in_normal_keeps_the_size_of_the_output() -> None:
    bnn = BayesianModule(nn.Linear(400, 3000, bias=False), fan_in_normal(2.0))
    x = torch.randn(400)
    outputs = bnn(x / x.square().mean().sqrt()) ** 2
    assert abs(outputs.mean() - 4) < 4 * outputs.std() / len(outputs) ** 0.5


@pytest.mark.parametrize("std", [0.0, -1.0, math.inf, math.nan])
def test_fan_in_normal_needs_a_positive_std(std: float) -> None:
    with pytest.raises(ValueError, match=f"std must be (positive|a finite number), got std={std}"):
        fan_in_normal(std)


@pytest.mark.parametrize(
    ("net", "prior", "match"),
    [
        (3, None, r"net must be a torch.nn.Module, got 3"),
        (nn.Linear, None, r"net must be a torch.nn.Module, got <class"),
        (nn.Tanh(), None, r"net must have parameters to put a prior on, Tanh has none"),
        (nn.LazyLinear(3), None, r"\['weight', 'bias'\] are lazy: run net on one batch first"),
        (nn.DataParallel(nn.Linear(4, 3)), None, r"net must not be a DataParallel.*give the module it wraps"),
        (nn.Linear(4, 3), dist.Normal, r"prior must be a distribution such as pyro.distributions.Normal\(0.0, 1.0\)"),
        (nn.Linear(4, 3), 1.0, r"prior must be a distribution .* got prior=1.0"),
        (nn.Linear(4, 3), torch.distributions.Normal(0.0, 1.0), r"prior of 'weight', shape \(3, 4\).*of pyro.distrib"),
        (nn.Linear(4, 3), dist.Normal(torch.zeros(4), 1.0), r"prior of 'weight' must .* \(3, 4\), got shape \(4,\)"),
    ],
)
def test_bad_networks_and_priors_are_refused(net: Any, prior: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BayesianModule(net, prior)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (None, r"prior of '0.weight', shape \(5, 4\), must be a distribution .* got None"),
        (
            dist.Normal(torch.zeros(4, 5), 1.0),
            r"'0.weight' must be scalar.*\(5, 4\), got shape \(4, 5\). Give a scalar",
        ),
    ],
)
def test_bad_answers_of_a_callable_prior_are_refused(answer: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BayesianModule(mlp(), lambda name, parameter: answer)(X)


# hidden parameters


@pytest.mark.parametrize(
    ("hide", "hidden"),
    [
        ("0.bias", {"0.bias"}),
        (["0.bias", "2.weight"], {"0.bias", "2.weight"}),
        ("2", {"2.weight", "2.bias"}),
        (lambda name: name.endswith("bias"), {"0.bias", "2.bias"}),
        (lambda name: False, set()),
    ],
)
def test_hidden_parameters_are_params_and_the_others_sites(hide: Any, hidden: set[str]) -> None:
    bnn = BayesianModule(mlp(), hide=hide)
    trace = poutine.trace(bnn).get_trace(X)
    names = dict(bnn.net.named_parameters())
    assert set(trace.param_nodes) == set(pyro.get_param_store()) == hidden
    assert set(trace.stochastic_nodes) == set(names) - hidden
    assert all(trace.nodes[name]["value"] is names[name] for name in hidden)


def test_tied_parameter_is_hidden_by_any_of_its_names() -> None:
    bnn = BayesianModule(Tied(), hide="decode.weight")
    assert poutine.trace(bnn).get_trace(torch.tensor([1])).param_nodes == ["embed.weight"]


@pytest.mark.parametrize("hide", [["0.weigth"], "", ["3"]])
def test_unknown_hidden_name_lists_the_parameters(hide: Any) -> None:
    with pytest.raises(ValueError, match=r"hide must name .*; parameters: 0.weight, 0.bias, 2.weight, 2.bias"):
        BayesianModule(mlp(), hide=hide)


def test_hiding_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="hide must leave a parameter Bayesian"):
        BayesianModule(mlp(), hide=["0", "2"])


def likelihood_gradient(net: nn.Module, weights: Mapping[str, Tensor], name: str) -> Tensor:
    twin = plain(net, weights)
    nn.functional.cross_entropy(twin(X), Y, reduction="sum").backward()
    return dict(twin.named_parameters())[name].grad


@pytest.mark.parametrize("local", [False, True])
def test_svi_takes_a_likelihood_step_in_the_networks_own_hidden_tensor(local: bool) -> None:
    net = mlp()
    weights = {name: w.detach() for name, w in draw(net).items() if name != "0.bias"}
    step = -0.1 * likelihood_gradient(net, weights, "0.bias")
    before = copy.deepcopy(net.state_dict())
    with pyro.settings.context(module_local_params=local):
        model = poutine.condition(classifier(BayesianModule(net, hide="0.bias")), weights)
        SVI(model, lambda: None, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO()).step()
        assert set(pyro.get_param_store()) == (set() if local else {"0.bias"})
    torch.testing.assert_close(net[0].bias.detach(), before["0.bias"] + step, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters() if name != "0.bias")


def test_frozen_hidden_parameter_stays() -> None:
    net = mlp()
    net[0].requires_grad_(False)
    trace = poutine.trace(BayesianModule(net, hide="0")).get_trace(X)
    assert not trace.param_nodes
    assert not net[0].weight.requires_grad


def test_hidden_channels_last_weight_is_trained_in_place() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 2)).to(memory_format=torch.channels_last)
    before = net[0].weight.detach().clone()
    BayesianModule(net, hide="0")(torch.randn(1, 2, 3, 3))
    assert pyro.param("0.weight") is net[0].weight
    assert torch.equal(net[0].weight, before)


def test_value_in_the_param_store_is_copied_into_the_network() -> None:
    pyro.param("0.bias", torch.arange(5.0))
    net = mlp()
    own = net[0].bias
    BayesianModule(net, hide="0.bias")(X)
    assert pyro.param("0.bias") is net[0].bias is own
    assert torch.equal(own, torch.arange(5.0))


def test_param_store_of_another_network_is_refused() -> None:
    pyro.param("0.bias", torch.zeros(7))
    with pytest.raises(ValueError, match=r"'0.bias' with shape \(7,\), .* \(5,\). Call pyro.clear_param_store"):
        BayesianModule(mlp(), hide="0.bias")(X)


class Nested(PyroModule):
    def __init__(self, bnn: BayesianModule) -> None:
        super().__init__()
        self.bnn = bnn

    def forward(self) -> Any:
        return classifier(self.bnn)()


@pytest.mark.parametrize("local", [False, True])
def test_inside_a_pyro_module_only_hidden_parameters_are_params(local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        model = Nested(BayesianModule(mlp(), hide="0.bias"))
        guide = AutoNormal(model, init_loc_fn=init_to_module(model.bnn))
        loss = Trace_ELBO()(model, guide)
        loss()
        loss().backward()
        trace = poutine.trace(model).get_trace()
        assert trace.param_nodes == ["bnn.0.bias"]
        stored = [name for name in pyro.get_param_store() if not name.startswith("AutoNormal")]
        assert stored == ([] if local else ["bnn.0.bias"])
    trained = {name for name, parameter in loss.named_parameters() if parameter.grad is not None}
    assert {name for name in trained if name.startswith("model")} == {"model.bnn.net.0.bias"}
    assert len(trained) == 1 + 2 * 3


# starting points


def test_each_site_carries_the_networks_weight() -> None:
    net = mlp()
    trace = poutine.trace(BayesianModule(net)).get_trace(X)
    for name, parameter in net.named_parameters():
        value = trace.nodes[name]["infer"]["init_value"]
        assert torch.equal(value, parameter)
        assert not value.requires_grad


def test_init_to_module_starts_pyros_guides_at_the_weights_but_not_in_them() -> None:
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    bnn = BayesianModule(net)

    def model() -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0))
        with scope(prefix="scoped"):
            classifier(bnn)()

    guide = AutoDelta(model, init_loc_fn=init_to_module(bnn, fallback=lambda site: torch.tensor(7.0)))
    guide()
    for name, parameter in net.named_parameters():
        assert torch.equal(pyro.param(f"AutoDelta.scoped/{name}"), parameter)
        pyro.param(f"AutoDelta.scoped/{name}").data.add_(1)
    assert pyro.param("AutoDelta.other") == 7
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())


def test_init_to_module_falls_back_outside_of_the_support() -> None:
    net = mlp()
    net[0].weight.data.abs_().add_(0.1)
    net[2].weight.data.abs_().neg_()
    bnn = BayesianModule(net, dist.LogNormal(0.0, 1.0), hide=lambda name: name.endswith("bias"))
    guide = AutoNormal(classifier(bnn), init_loc_fn=init_to_module(bnn))
    guide()
    torch.testing.assert_close(guide.median()["0.weight"], net[0].weight.detach())
    torch.testing.assert_close(guide.median()["2.weight"], torch.ones(3, 5))


def test_init_to_module_keeps_the_weights_out_of_the_param_store() -> None:
    bnn = BayesianModule(mlp(), hide="0.bias")
    AutoDelta(classifier(bnn), init_loc_fn=init_to_module(bnn))()
    assert set(pyro.get_param_store()) == {
        "0.bias",
        *(f"AutoDelta.{name}" for name in ("0.weight", "2.weight", "2.bias")),
    }


def test_init_to_module_needs_a_bayesian_module() -> None:
    with pytest.raises(ValueError, match="bnn must be a BayesianModule, got Linear"):
        init_to_module(nn.Linear(4, 3))  # type: ignore[arg-type]


# inference


@pytest.mark.parametrize("estimator", [Trace_ELBO, TraceMeanField_ELBO])
def test_pyros_elbo_has_the_gradient_of_the_plain_network(estimator: type) -> None:
    net = mlp()
    bnn = BayesianModule(net, dist.Normal(0.0, 2.0))
    guide = AutoNormal(classifier(bnn, total=60), init_loc_fn=init_to_module(bnn), init_scale=0.3)
    guide()
    pyro.set_rng_seed(3)
    weights = {name: w.detach() for name, w in guide().items()}
    pyro.set_rng_seed(3)
    estimator().differentiable_loss(classifier(bnn, total=60), guide).backward()
    for name, w in weights.items():
        # log q does not depend on loc: it sees w - loc only
        expected = 10 * likelihood_gradient(net, weights, name) + w / 4
        loc = guide.locs.get_parameter(f"{name}_unconstrained")
        torch.testing.assert_close(loc.grad, expected, rtol=1e-10, atol=1e-12)


def test_hmcs_potential_is_the_closed_form() -> None:
    net = mlp()
    _, potential, _, _ = initialize_model(classifier(BayesianModule(net)))
    weights = draw(net)
    expected = nn.functional.cross_entropy(plain(net, weights)(X), Y, reduction="sum")
    expected = expected + sum(0.5 * (w**2 + math.log(2 * math.pi)).sum() for w in weights.values())
    torch.testing.assert_close(potential(weights), expected, rtol=1e-12, atol=0)


# torch's own interface


def test_copies_compute_the_same() -> None:
    bnn = BayesianModule(mlp(), fan_in_normal(), hide="0.bias")
    bnn(X)  # Pyro now keeps a weak reference at the hidden parameter
    weights = {name: w for name, w in draw(bnn.net).items() if name != "0.bias"}
    expected = poutine.condition(bnn, weights)(X)
    for twin in (copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn))):
        pyro.clear_param_store()
        assert torch.equal(poutine.condition(twin, weights)(X), expected)
        assert twin.net[0].bias is not bnn.net[0].bias
    other = BayesianModule(mlp(), fan_in_normal(), hide="0.bias")
    other.load_state_dict(bnn.state_dict())
    pyro.clear_param_store()
    assert torch.equal(poutine.condition(other, weights)(X), expected)


def test_module_follows_a_change_of_dtype() -> None:
    bnn = BayesianModule(mlp().float())
    assert bnn(X.float()).dtype == torch.float32
    bnn.double()
    trace = poutine.trace(bnn).get_trace(X)
    assert {trace.nodes[name]["value"].dtype for name in trace.stochastic_nodes} == {torch.float64}
