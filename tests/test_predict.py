"""The streamed posterior predictive against Pyro's Predictive and closed forms; what it keeps and what it costs."""

import subprocess
import sys
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor, nn

import pyro_sam as ps
from pyro_sam.predictive.prediction import Prediction, SampledLikelihood

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


def classifier() -> tuple[Any, ps.MeanFieldNormal, Tensor, Tensor]:
    bnn = ps.BayesianModule(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)))

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
        return logits

    x, y = torch.randn(10, 3), torch.randint(4, (10,))
    return model, ps.MeanFieldNormal(model, init_scale=0.5).initialize(x, y), x, y


def weights_of(guide: Any, num_samples: int) -> Tensor:
    pyro.set_rng_seed(4)
    return torch.stack([guide(X, X)["w"].detach() for _ in range(num_samples)])


def predictions(model: Any, guide: Any, x: Tensor, **settings: Any) -> ps.Prediction:
    pyro.set_rng_seed(4)
    return ps.predict(model, guide, x, **settings)


def test_mixture_of_the_likelihoods_of_the_samples() -> None:
    guide = fitted(linear, X, X)
    w = weights_of(guide, 9)
    prediction = predictions(linear, guide, X, num_samples=9)
    means = w[:, None] * X
    y = torch.randn(12)
    torch.testing.assert_close(prediction.mean, means.mean(0))
    torch.testing.assert_close(prediction.variance, 0.25 + means.var(0, unbiased=False))
    log_prob = dist.Normal(means, 0.5).log_prob(y)
    torch.testing.assert_close(prediction.log_prob(y), log_prob.exp().mean(0).log())
    torch.testing.assert_close(prediction.log_prob_per_sample(y), log_prob)
    torch.testing.assert_close(prediction.cdf(y), dist.Normal(means, 0.5).cdf(y).mean(0))
    assert prediction.num_samples == 9


def test_the_answer_is_that_of_pyros_predictive_at_the_same_weights() -> None:
    model, guide, x, y = classifier()
    pyro.set_rng_seed(4)
    weights = [{name: w.detach() for name, w in guide(x).items()} for _ in range(6)]
    stacked = {name: torch.stack([w[name] for w in weights]) for name in weights[0]}
    logits = Predictive(model, posterior_samples=stacked, return_sites=["_RETURN"])(x)["_RETURN"]
    prediction = predictions(model, guide, x, num_samples=6)
    torch.testing.assert_close(prediction.probs, logits.softmax(-1).mean(0))
    torch.testing.assert_close(prediction.log_prob(y), logits.softmax(-1)[:, range(10), y].mean(0).log())


def test_draws_and_moments_are_those_of_pyros_predictive() -> None:
    guide = fitted(linear, X, X)
    prediction = ps.predict(linear, guide, X, num_samples=2000)
    samples = Predictive(linear, guide=guide, num_samples=2000)(X)["obs"]
    spread = prediction.variance.sqrt()
    for draws in (samples, prediction.samples()):
        assert draws.shape == (2000, 12)
        assert (abs(prediction.mean - draws.mean(0)) < 5 * spread * (2 / 2000) ** 0.5).all()
        assert (abs(prediction.variance / draws.var(0) - 1) < 5 * (4 / 2000) ** 0.5).all()


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_batch_size_does_not_change_the_answer(batch_size: int) -> None:
    guide = fitted(linear, X, X)
    whole = predictions(linear, guide, X, num_samples=7)
    batched = predictions(linear, guide, X, num_samples=7, batch_size=batch_size)
    y = torch.randn(12)
    torch.testing.assert_close(batched.mean, whole.mean)
    torch.testing.assert_close(batched.variance, whole.variance)
    torch.testing.assert_close(batched.log_prob_per_sample(y), whole.log_prob_per_sample(y))
    assert batched.samples().shape == (7, 12)


def test_variance_keeps_its_digits_beside_a_large_mean() -> None:
    def far(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((w + 1e5 * torch.ones_like(x)).float(), x.new_full((), 0.1).float()), obs=y)

    guide = fitted(far, X, X.float())
    w = weights_of(guide, 20)
    prediction = predictions(far, guide, X, num_samples=20)
    exact = float(0.01 + w.var(unbiased=False))
    torch.testing.assert_close(prediction.variance.double(), torch.full((12,), exact), rtol=0.05, atol=0)


def local_guide(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.1))
    pyro.sample("w", dist.Normal(torch.tensor([0.3, -0.2]), 1.0).to_event(1))


def local_model(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(torch.stack([z, w[0].expand(len(x)), w[1] + x], -1), 0.5).to_event(1), obs=y)


def test_every_batch_sees_the_same_shared_latents_and_its_own_local_ones() -> None:
    prediction = ps.predict(local_model, local_guide, X, num_samples=4, batch_size=5)
    for s in range(4):
        z, w0, w1 = torch.cat([parts[s].fn.mean for parts in prediction.batches]).T
        assert (abs(z - X) < 0.1 * 6).all()
        assert len(z.unique()) == 12
        assert len(w0.unique()) == 1
        torch.testing.assert_close(w1 - X, (w1 - X)[:1].expand(12))


@pytest.mark.parametrize("replica", [None, 1])
def test_replicas_with_latents_in_plates_run_one_by_one(replica: int | None) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(w * x + z, 1.0), obs=y)

    x = torch.linspace(-1, 1, 5)
    guide = ps.MeanFieldNormal(model, init_scale=0.3, num_replicas=2).initialize(x, x)
    guide.locs.z = torch.stack([x, -x])  # type: ignore[union-attr]
    pyro.set_rng_seed(0)
    once = ps.predict(model, guide, x, num_samples=6, replica=replica)
    pyro.set_rng_seed(0)
    together = ps.predict(model, guide, x, num_samples=6, samples_at_once=3, replica=replica)
    torch.testing.assert_close(together.log_prob_per_sample(x), once.log_prob_per_sample(x))
    if replica is not None:
        with pytest.raises(ValueError, match="that of a single guide, or of one replica"):
            once.replica(0)


def test_class_probabilities_are_averaged_and_normalised() -> None:
    model, guide, x, y = classifier()
    prediction = ps.predict(model, guide, x, num_samples=20, batch_size=4)
    assert prediction.probs.shape == (10, 4)
    torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(10))
    torch.testing.assert_close(prediction.log_prob(y), prediction.probs[torch.arange(10), y].log())
    assert not prediction.probs.requires_grad


@pytest.mark.parametrize(("samples_at_once", "batch_size"), [(3, None), (7, 4), (50, None)])
def test_samples_that_run_at_once_are_each_predicted_at_their_own_weights(
    samples_at_once: int, batch_size: int | None
) -> None:
    model, guide, x, y = classifier()
    seen: list[dict[str, Tensor]] = []

    def spied(x: Tensor) -> None:
        seen.append(guide(x))

    prediction = ps.predict(model, spied, x, num_samples=7, samples_at_once=samples_at_once, batch_size=batch_size)
    del seen[0]  # the first look
    weights = {
        n: torch.cat([w[n].reshape(-1, *p.shape) for w in seen])
        for n, p in model.__closure__[0].cell_contents.net.named_parameters()
    }
    assert len(weights["0.bias"]) == 7
    logits = Predictive(model, posterior_samples=weights, return_sites=["_RETURN"])(x)["_RETURN"]
    torch.testing.assert_close(prediction.probs, logits.softmax(-1).mean(0))
    torch.testing.assert_close(prediction.log_prob_per_sample(y), logits.log_softmax(-1)[:, range(10), y])
    assert prediction.samples().shape == (7, 10)
    assert prediction.num_samples == 7


def test_no_weights_are_kept() -> None:
    model, guide, x, _ = classifier()
    prediction = ps.predict(model, guide, x, num_samples=3)
    held = [
        t for parts in prediction.batches for part in parts for t in vars(part.fn).values() if isinstance(t, Tensor)
    ]
    assert all(t.shape[0] == 10 and t.grad_fn is None for t in held)


MEMORY = """
import torch, pyro, pyro.distributions as dist, pyro_sam as ps
net = torch.nn.Sequential(torch.nn.Linear(100, 9000), torch.nn.ReLU(), torch.nn.Linear(9000, 10))
bnn = ps.BayesianModule(net)
def model(x, y=None):
    logits = bnn(x)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
x = torch.randn(20, 100)
guide = ps.MeanFieldNormal(model).initialize(x, torch.zeros(20))
assert sum(p.numel() for p in net.parameters()) >= 990_000
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
before = peak()
prediction = ps.predict(model, guide, x, num_samples=256, batch_size=10)
assert prediction.probs.shape == (20, 10)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak off Linux's /proc")
def test_a_million_weights_and_256_samples_need_less_than_100_mb_above_the_model() -> None:
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 100


def test_bernoulli_and_multivariate_observations_of_one_model() -> None:
    def model(x: Tensor, y: Tensor | None = None, click: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("click", dist.Bernoulli(logits=w * x), obs=click)
            pyro.sample("obs", dist.Normal(torch.stack([w * x, x], -1), 1.0).to_event(1), obs=y)

    guide = ps.MeanFieldNormal(model).initialize(X, torch.zeros(12, 2), torch.zeros(12))
    prediction = ps.predict(model, guide, X, num_samples=5, batch_size=5)
    assert prediction.mean.shape == (12, 2)
    torch.testing.assert_close(prediction.mean[:, 1], X)
    assert prediction.log_prob(torch.zeros(12, 2)).shape == (12,)
    clicks = ps.predict(model, guide, X, num_samples=5, site="click")
    assert clicks.probs.shape == (12,)
    torch.testing.assert_close(clicks.probs, clicks.mean)


@pytest.mark.parametrize(
    "likelihood",
    [
        lambda f: dist.Poisson(f.exp()),
        lambda f: dist.StudentT(4.0, f, 1.0),
        lambda f: dist.NegativeBinomial(3.0, logits=f),
        lambda f: dist.MultivariateNormal(torch.stack([f, f], -1), torch.eye(2)),
        lambda f: dist.LogNormal(f, 0.1),
        lambda f: dist.OneHotCategorical(logits=torch.stack([f, -f, f], -1)),
        lambda f: dist.ZeroInflatedPoisson(f.exp(), gate=torch.tensor(0.2)),
        lambda f: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(*f.shape, 2)), dist.Normal(torch.stack([f, -f], -1), torch.ones(2))
        ),
    ],
)
@pytest.mark.parametrize("samples_at_once", [1, 2])
def test_any_likelihood_with_a_log_prob(likelihood: Any, samples_at_once: int) -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", likelihood(w * x), obs=y)

    y = likelihood(X).sample()
    guide = fitted(model, X, y)
    prediction = predictions(model, guide, X, num_samples=5, batch_size=8, samples_at_once=samples_at_once)
    seen: list[Tensor] = []
    pyro.set_rng_seed(4)
    with pyro.plate("particles", samples_at_once, dim=-2):
        while sum(map(len, seen)) < 5:
            seen.append(guide(X, y)["w"].detach().reshape(-1))
    # the last run of two at once is a run of one: other random numbers
    exact = torch.stack([likelihood(w * X).log_prob(y) for w in torch.cat(seen)])[: 5 - (samples_at_once > 1)]
    torch.testing.assert_close(prediction.log_prob_per_sample(y)[: len(exact)], exact)


def test_data_may_lie_along_an_outer_plate() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("outputs", 3, dim=-1), pyro.plate("data", len(x), dim=-2):
            pyro.sample("obs", dist.Normal(w * x[:, None], torch.tensor([1.0, 2.0, 3.0])), obs=y)

    guide = fitted(model, X, torch.zeros(12, 3))
    y = torch.randn(12, 3)
    whole = predictions(model, guide, X, num_samples=4)
    batched = predictions(model, guide, X, num_samples=4, batch_size=5)
    assert batched.mean.shape == (12, 3)
    torch.testing.assert_close(batched.log_prob(y), whole.log_prob(y))
    at_once = predictions(model, guide, X, num_samples=4, batch_size=5, samples_at_once=2)
    assert at_once.log_prob(y).shape == (12, 3)


def test_samples_that_run_at_once_stay_left_of_plates_that_the_observations_are_not_in() -> None:
    bnn = ps.BayesianModule(nn.Linear(1, 1))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("groups", 3, dim=-2):
            pyro.sample("elsewhere", dist.Normal(0.0, 1.0))
        mean = bnn(x[:, None]).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    prediction = ps.predict(model, fitted(model, X, X), X, num_samples=4, samples_at_once=4)
    assert prediction.samples().shape == (4, 12)
    assert prediction.mean.shape == prediction.log_prob(X).shape == (12,)


def test_only_tensors_with_the_rows_of_the_first_are_cut() -> None:
    def model(data: dict[str, Tensor], basis: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(30), 1.0).to_event(1))
        features = torch.exp(-((data["x"][:, None] - basis) ** 2)) * data["weight"][:, None]
        with pyro.plate("data", len(data["x"])):
            pyro.sample("obs", dist.Normal(features @ w, 1.0), obs=y)

    data, basis = {"x": X, "weight": torch.rand(12)}, torch.linspace(-1, 1, 30)
    guide = fitted(model, data, basis, X)
    pyro.set_rng_seed(1)
    whole = ps.predict(model, guide, data, basis, num_samples=3)
    pyro.set_rng_seed(1)
    batched = ps.predict(model, guide, data, basis, num_samples=3, batch_size=5)
    torch.testing.assert_close(whole.mean, batched.mean)


def test_buffers_and_gradients_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    bnn = ps.BayesianModule(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = bnn(x[:, None]).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    guide = ps.MeanFieldNormal(model).initialize(X, X)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    ps.predict(model, guide, X, num_samples=3)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert all(parameter.grad is None for parameter in guide.parameters())


def test_full_covariance_autoguides_work() -> None:
    guide = AutoMultivariateNormal(linear, init_scale=0.1)
    guide(X, X)
    assert ps.predict(linear, guide, X, num_samples=3, batch_size=5, samples_at_once=2).mean.shape == (12,)


def test_progress_is_shown_on_demand(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    guide = fitted(linear, X, X)
    ps.predict(linear, guide, X, num_samples=3)
    assert capsys.readouterr().err == ""
    ps.predict(linear, guide, X, num_samples=3, progress=True)
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r'progress=True needs tqdm: pip install "pyro-sam\[progress\]"'):
        ps.predict(linear, guide, X, num_samples=3, progress=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, r"num_samples must be a whole number of at least 1, got num_samples=0"),
        ({"num_samples": True}, r"num_samples must be a whole number"),
        ({"batch_size": 0}, r"batch_size must be a whole number of at least 1, got batch_size=0"),
        ({"batch_size": 2.5}, r"batch_size must be a whole number"),
        ({"samples_at_once": 0}, r"samples_at_once must be a whole number of at least 1"),
        ({"site": 3}, r"site must be a site of the model, got site=3"),
        ({"site": "y"}, r"site must be a site of the model, got site='y'; the model's sites are .*obs"),
    ],
)
def test_bad_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    model, guide, x, _ = classifier()
    with pytest.raises(ValueError, match=message):
        ps.predict(model, guide, x, **settings)


def test_what_cannot_predict_is_refused() -> None:
    model, guide, x, _ = classifier()
    with pytest.raises(ValueError, match="model must be a callable, such as a Pyro model, got 3"):
        ps.predict(3, guide, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guide must be a callable, such as a Pyro guide, got <class"):
        ps.predict(model, ps.MeanFieldNormal, x)
    with pytest.raises(ValueError, match=r"guide MeanFieldNormal has no parameters yet.*guide\(x, y\)"):
        ps.predict(model, ps.MeanFieldNormal(model), x)
    with pytest.raises(ValueError, match=r"latent site '0.weight' of the model is missing from the guide"):
        ps.predict(model, lambda x: None, x)

    def no_plate(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(w * x, 0.5).to_event(1), obs=y)

    with pytest.raises(ValueError, match="site 'obs' has no batch dimension to tell data points apart"):
        ps.predict(no_plate, ps.MeanFieldNormal(no_plate).initialize(X, X), X)


@pytest.mark.parametrize("q", [0.025, 0.5, 0.9])
def test_quantile_inverts_the_distribution_function_of_the_mixture(q: float) -> None:
    prediction = ps.predict(linear, fitted(linear, X, X, scale=3.0), X, num_samples=8, batch_size=5)
    torch.testing.assert_close(prediction.cdf(prediction.quantile(q)), torch.full((12,), q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_likelihoods_of_half_precision_are_mixed_in_single(dtype: torch.dtype) -> None:
    logits = torch.randn(64, 20, 3).to(dtype)
    labels, coins = torch.randint(3, (20,)), torch.randint(2, (20,)).to(dtype)
    for make, rows, y in ((dist.Categorical, logits, labels), (dist.Bernoulli, logits[..., 0], coins)):
        half = [SampledLikelihood(make(logits=row), None, 1) for row in rows]
        full = [SampledLikelihood(make(logits=row.double()), None, 1) for row in rows]
        one, other = Prediction([half]), Prediction([full])
        torch.testing.assert_close(one.probs.double(), other.probs, rtol=torch.finfo(dtype).eps, atol=0.0)
        if make is dist.Categorical:
            torch.testing.assert_close(one.probs.sum(-1), torch.ones(20, dtype=torch.float32))
        assert one.log_prob(y).dtype == torch.float32
        torch.testing.assert_close(one.log_prob(y).double(), other.log_prob(y.double()), rtol=1e-2, atol=1e-2)


def test_what_a_prediction_does_not_have_is_explained() -> None:
    prediction = ps.predict(linear, fitted(linear, X, X), X, num_samples=2)
    with pytest.raises(ValueError, match="a Normal likelihood has no class probabilities; use mean and variance"):
        _ = prediction.probs
    with pytest.raises(ValueError, match=r"one row per predicted data point, so shape \(12,\), got shape \(5,\)"):
        prediction.log_prob(torch.zeros(5))
    with pytest.raises(ValueError, match="y must be a tensor of real observations, got list"):
        prediction.log_prob([0.0] * 12)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"observations that the Normal likelihood can have, got dtype .* nan"):
        prediction.log_prob(torch.full((12,), torch.nan))

    model, guide, x, y = classifier()
    classes = ps.predict(model, guide, x, num_samples=2)
    with pytest.raises(ValueError, match=r"the Categorical likelihood can have, .* values from 4 to 7"):
        classes.log_prob(y + 4 - y.min())
    with pytest.raises(ValueError, match=r"a Categorical likelihood has no distribution function \(cdf\)"):
        classes.cdf(y)
    with pytest.raises(ValueError, match=r"has no distribution function with an inverse \(icdf\); use samples"):
        classes.quantile(0.5)
    with pytest.raises(ValueError, match=r"q must be between 0 and 1, got q=1"):
        prediction.quantile(1)
