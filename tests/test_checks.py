"""After the first step torch's checks cost one wait for the device, and refuse all that they refused before."""

import math
import threading
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import SGD, Adam
from torch.overrides import TorchFunctionMode

import pyro_sam as ps
from pyro_sam._step.checks import postponed

LAWS = [ps.Gaussian(), ps.Mean(), ps.Adversarial(0.5), ps.MixSAM(0.5), ps.AscendedSample(0.5)]


READS = {torch.equal, *(getattr(torch.Tensor, name) for name in ("item", "tolist", "__bool__", "__float__", "__int__"))}


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


class Model:
    """A regression whose likelihood can be chosen."""

    def __init__(self, likelihood: Callable[[torch.Tensor], Any]) -> None:
        self.likelihood = likelihood

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", self.likelihood(x @ w), obs=y)


X = torch.linspace(-1, 1, 12).reshape(6, 2).double()
COUNTS = torch.tensor([0.0, 1, 2, 0, 1, 3]).double()
BITS = torch.tensor([0.0, 1, 1, 0, 1, 0]).double()
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])

CASES = {
    "a bit of 2": (lambda eta: dist.Bernoulli(logits=eta), BITS, X, BITS * 2),
    "a negative count": (lambda eta: dist.Poisson(eta.exp()), COUNTS, X, COUNTS - 1),
    "a label out of range": (
        lambda eta: dist.Categorical(logits=eta[:, None] * torch.arange(3)),
        LABELS,
        X,
        LABELS + 1,
    ),
    "a NaN input": (lambda eta: dist.Normal(eta, 1.0), COUNTS, X * torch.nan, COUNTS),
    "a negative scale": (lambda eta: dist.Normal(0.0, 1 + eta.abs()), COUNTS, X, None),
}


def refusal(loss: Any, case: str, law_steps: int = 2) -> tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return what an estimator says to the bad data after good steps, and the gradients before and after."""
    likelihood, good, x, bad = CASES[case]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = Model(likelihood)
    guide = ps.MeanFieldNormal(model).initialize(X, good)
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss)
    for _ in range(law_steps):
        svi.step(X, good)
    if bad is None:  # the likelihood itself goes bad
        model.likelihood, bad = (lambda eta: dist.Normal(0.0, -1 - eta.abs())), good

    def grads() -> dict[str, torch.Tensor]:
        named = pyro.get_param_store().named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    before = grads()
    with pytest.raises(ValueError, match=r"to satisfy|support") as refused:
        svi.step(x, bad)
    return str(refused.value), before, grads()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_bad_values_are_refused_as_pyro_refuses_them_and_leave_no_gradient(law: ps.Perturbation, case: str) -> None:
    message, before, after = refusal(ps.SAM_ELBO(law), case)
    expected, _, _ = refusal(TraceMeanField_ELBO(), case)
    assert message.splitlines()[0][:60] == expected.splitlines()[0][:60]
    assert before.keys() == after.keys()
    for name, grad in before.items():
        assert torch.equal(grad, after[name])


def test_a_guide_with_a_bad_scale_is_refused() -> None:
    sign = [1.0]

    def model() -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.0)), sign[0] * torch.tensor(0.1)))

    elbo = ps.SAM_ELBO(ps.Adversarial(0.5))
    elbo.loss_and_grads(model, guide)
    sign[0] = -1.0
    with pytest.raises(ValueError, match="scale"):
        elbo.loss_and_grads(model, guide)
    with pyro.validation_enabled(False):
        elbo.loss_and_grads(model, guide)


def test_a_value_outside_of_its_prior_is_refused() -> None:
    shift = [1.0]

    def model() -> None:
        pyro.sample("w", dist.Exponential(1.0))  # whose log_prob is finite everywhere

    def guide() -> None:
        normal = dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.01)
        # a transform, for there is no closed form of the KL then
        pyro.sample("w", dist.TransformedDistribution(normal, [dist.transforms.AffineTransform(shift[0], 1.0)]))

    elbo = ps.SAM_ELBO(ps.Gaussian())
    assert math.isfinite(elbo.loss_and_grads(model, guide))
    shift[0] = -1.0
    with pytest.raises(ValueError, match="support"):
        elbo.loss_and_grads(model, guide)
    with pyro.validation_enabled(False):
        assert math.isfinite(elbo.loss_and_grads(model, guide))


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_a_step_waits_for_the_device_once(law: ps.Perturbation) -> None:
    likelihood, good, x, _ = CASES["a bit of 2"]
    model = Model(likelihood)
    guide = ps.MeanFieldNormal(model).initialize(x, good)
    for validate in (True, False):
        with pyro.validation_enabled(validate):
            svi = SVI(model, guide, SGD({"lr": 0.01}), ps.SAM_ELBO(law))  # Adam reads its own step count
            for _ in range(2):
                svi.step(x, good)
            with Waits() as waits:
                svi.step(x, good)
        assert waits.count == 1


def test_good_data_cost_no_run_more() -> None:
    likelihood, good, x, _ = CASES["a label out of range"]
    runs = [0]
    inner = Model(likelihood)

    def model(*args: Any) -> None:
        runs[0] += 1
        inner(*args)

    guide = ps.MeanFieldNormal(inner).initialize(x, good)
    elbo = ps.SAM_ELBO(ps.Adversarial(0.5))
    elbo.loss_and_grads(model, guide, x, good)
    runs[0] = 0
    elbo.loss_and_grads(model, guide, x, good)
    assert runs[0] == 2


def test_postponed_checks_are_torchs_own() -> None:
    asked = torch._is_all_true
    with postponed() as conditions:
        good = dist.Normal(torch.zeros(2), torch.ones(2))
        good.log_prob(torch.zeros(2))
        assert bool(conditions.hold())
        dist.Normal(torch.zeros(2), torch.tensor([1.0, -1.0]))
        assert not bool(conditions.hold())
    assert torch._is_all_true is asked
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, -1.0)


def test_postponed_checks_leave_other_threads_alone() -> None:
    refused = []

    def elsewhere() -> None:
        with pytest.raises(ValueError, match="scale"):
            dist.Normal(0.0, -1.0)
        refused.append(True)

    with postponed() as conditions:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert refused
    assert conditions.hold() is None


def test_postponed_checks_end_with_an_error() -> None:
    asked = torch._is_all_true
    with pytest.raises(KeyError), postponed(), postponed():
        raise KeyError
    assert torch._is_all_true is asked


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("handler", [pyro.poutine.mask, pyro.poutine.scale], ids=["mask", "scale"])
def test_rows_at_a_latent_are_refused_in_any_step(handler: Callable[..., Any], fast: bool) -> None:
    """A mask or a scale with rows gives a latent's log probability rows, though no size of the model changed."""
    pyro.clear_param_store()
    model = Model(lambda eta: dist.Normal(eta, 1.0))
    rows = torch.tensor([True, False, True, True, True, True])
    elbo = ps.SAM_ELBO(ps.Gaussian(), fast=fast)
    guide = ps.MeanFieldNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.01}), elbo)
    plain = SVI(model, guide, Adam({"lr": 0.01}), TraceMeanField_ELBO())
    for _ in range(3):
        svi.step(X, COUNTS)
    for each in (plain, svi):
        with (
            pytest.raises(ValueError, match='at site "w", invalid log_prob shape'),
            handler(**{handler.__name__: rows if handler is pyro.poutine.mask else 1.0 + rows}),
        ):
            each.step(X, COUNTS)
