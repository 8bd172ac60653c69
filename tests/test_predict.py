"""The streamed posterior predictive against Pyro's Predictive and closed forms."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor, nn

import pyro_sam as ps

X = torch.linspace(-1, 1, 12).double()


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 40, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal(w * x, 0.5), obs=y)


def fitted(model: Any, *args: Any, scale: float = 0.3) -> ps.MeanFieldNormal:
    guide = ps.MeanFieldNormal(model, init_scale=scale).initialize(*args)
    for name, parameter in guide.named_parameters():
        if "locs" in name:
            parameter.data += 0.7
    return guide


def weights_of(guide: Any, num_samples: int, model_draws: Any) -> Tensor:
    pyro.set_rng_seed(4)
    weights = []
    for _ in range(num_samples):
        weights.append(guide(X, X)["w"].detach())
        model_draws()
    return torch.stack(weights)


def test_mixture_of_the_likelihoods_of_the_samples() -> None:
    guide = fitted(linear, X, X)
    w = weights_of(guide, 9, lambda: (torch.randperm(40), torch.randn(12)))
    pyro.set_rng_seed(4)
    prediction = ps.predict(linear, guide, X, num_samples=9)
    means = w[:, None] * X
    y = torch.randn(12)
    torch.testing.assert_close(prediction.mean, means.mean(0))
    torch.testing.assert_close(prediction.variance, 0.25 + means.var(0, unbiased=False))
    density = dist.Normal(means, 0.5).log_prob(y).exp().mean(0)
    torch.testing.assert_close(prediction.log_prob(y), density.log())


def test_moments_are_those_of_pyros_predictive() -> None:
    guide = fitted(linear, X, X)
    prediction = ps.predict(linear, guide, X, num_samples=2000)
    samples = Predictive(linear, guide=guide, num_samples=2000)(X)["obs"]
    spread = prediction.variance.sqrt()
    assert (abs(prediction.mean - samples.mean(0)) < 5 * spread * (2 / 2000) ** 0.5).all()
    assert (abs(prediction.variance / samples.var(0) - 1) < 5 * (4 / 2000) ** 0.5).all()


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_batches_see_the_same_posterior_samples(batch_size: int) -> None:
    guide = fitted(linear, X, X)
    pyro.set_rng_seed(4)
    whole = ps.predict(linear, guide, X, num_samples=7)
    pyro.set_rng_seed(4)
    batched = ps.predict(linear, guide, X, num_samples=7, batch_size=batch_size)
    # batches draw other data, so the second sample on is another one: compare the first
    first = torch.cat([fns[0].mean for fns in batched.likelihoods])
    torch.testing.assert_close(first, whole.likelihoods[0][0].mean)
    assert batched.mean.shape == (12,)
    means = torch.stack([torch.cat([fns[s].mean for fns in batched.likelihoods]) for s in range(7)])
    slopes = means / X
    torch.testing.assert_close(slopes, slopes[:, :1].expand(7, 12))


def classifier() -> tuple[Any, ps.MeanFieldNormal, Tensor, Tensor]:
    bnn = ps.BayesianModule(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    x, y = torch.randn(10, 3), torch.randint(4, (10,))
    return model, ps.MeanFieldNormal(model, init_scale=0.5).initialize(x, y), x, y


def test_class_probabilities_are_averaged_and_normalised() -> None:
    model, guide, x, y = classifier()
    prediction = ps.predict(model, guide, x, num_samples=20, batch_size=4)
    assert prediction.probs.shape == (10, 4)
    torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(10))
    torch.testing.assert_close(prediction.log_prob(y), prediction.probs[torch.arange(10), y].log())
    assert not prediction.probs.requires_grad


def test_no_weights_are_kept() -> None:
    model, guide, x, _ = classifier()
    prediction = ps.predict(model, guide, x, num_samples=3)
    held = [t for fns in prediction.likelihoods for fn in fns for t in vars(fn).values() if isinstance(t, Tensor)]
    assert all(t.shape[0] == 10 and t.grad_fn is None for t in held)


def test_bernoulli_and_multivariate_likelihoods() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("click", dist.Bernoulli(logits=w * x))
            pyro.sample("obs", dist.Normal(torch.stack([w * x, x], -1), 1.0).to_event(1), obs=y)

    guide = ps.MeanFieldNormal(pyro.poutine.block(model, hide=["click"])).initialize(X, torch.zeros(12, 2))
    prediction = ps.predict(pyro.poutine.block(model, hide=["click"]), guide, X, num_samples=5)
    assert prediction.mean.shape == (12, 2)
    assert prediction.log_prob(torch.zeros(12, 2)).shape == (12,)
    clicks = ps.predict(pyro.poutine.block(model, hide=["obs"]), guide, X, num_samples=5, site="click")
    assert clicks.probs.shape == (12,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, r"num_samples must be a whole number of at least 1, got num_samples=0"),
        ({"batch_size": 0}, r"batch_size must be a whole number of at least 1, got batch_size=0"),
        ({"batch_size": 2.5}, r"batch_size must be a whole number"),
        ({"site": "y"}, r"the model has no site 'y'; its sites are .*obs"),
    ],
)
def test_bad_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    model, guide, x, _ = classifier()
    if "site" in settings:
        model = pyro.poutine.condition(model, data={"obs": torch.zeros(10)})
    with pytest.raises(ValueError, match=message):
        ps.predict(model, guide, x, **settings)


def test_other_misuse_is_explained() -> None:
    guide = fitted(linear, X, X)
    prediction = ps.predict(linear, guide, X, num_samples=2)
    with pytest.raises(ValueError, match="a Normal likelihood has no class probabilities; use mean and variance"):
        _ = prediction.probs
    with pytest.raises(ValueError, match="one row per predicted data point, 12, got 5"):
        prediction.log_prob(torch.zeros(5))

    def no_plate(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(w * x, 0.5).to_event(1), obs=y)

    with pytest.raises(ValueError, match="site 'obs' has no batch dimension to tell data points apart"):
        ps.predict(no_plate, ps.MeanFieldNormal(no_plate).initialize(X, X), X)
