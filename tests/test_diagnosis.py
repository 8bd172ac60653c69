"""The diagnosis: its numbers against their formulas, bad trainings told with a cure that works, good ones silent."""

import copy
import itertools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import kl_divergence

import pyro_sam as ps
from pyro_sam.diagnosis.constant import best_constant
from pyro_sam.training import collapse

Pair = tuple[Tensor, Tensor]


def optimiser(lr: float = 1e-2) -> Any:
    return ps.optim.JointOptim(torch.optim.Adam, {"lr": lr})


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = []
    for here, there in itertools.pairwise(widths):
        layers += [nn.Linear(here, there), act()]
    return nn.Sequential(*layers[:-1])


def digits(number: int) -> Pair:
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:number]
    return x[rows].float() / 16, y[rows]


def wave() -> Pair:
    """200 points whose noise differs."""
    x = torch.rand(200, 1, generator=torch.Generator().manual_seed(0)).float() * 4 - 2
    noise = torch.randn(200, generator=torch.Generator().manual_seed(1)).float()
    return x, torch.sin(2 * x[:, 0]) + (0.05 + 0.2 * (x[:, 0] > 0)) * noise


def echoes() -> Pair:
    """Two classes told apart by the sign of a sum of many inputs, as the sonar's."""
    x = torch.randn(167, 60, generator=torch.Generator().manual_seed(0)).float()
    return x, (x[:, :20].sum(-1) > 0).long()


def categorical(outputs: Tensor) -> Any:
    return dist.Categorical(logits=outputs)


def spread(outputs: Tensor) -> Any:
    return dist.Normal(outputs[:, 0], nn.functional.softplus(outputs[:, 1]) + 1e-3)


def network(
    net: nn.Module,
    data: Pair,
    law: ps.Perturbation,
    *,
    prior: Any = None,
    likelihood: Any = categorical,
    init_scale: float = 0.02,
    kl_weight: float = 1.0,
    lr: float = 1e-2,
) -> SVI:
    bnn = ps.BayesianModule(net.float(), prior=dist.Normal(0.0, 1.0) if prior is None else prior)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        outputs = bnn(x)
        with pyro.plate("data", len(data[0]), subsample_size=len(x)):
            pyro.sample("obs", likelihood(outputs), obs=y)

    pyro.clear_param_store()
    guide = ps.MeanFieldNormal(model, init_scale=init_scale)
    return SVI(model, guide, optimiser(lr), ps.SAM_ELBO(law, kl_weight=kl_weight))


def steps(svi: SVI, data: Any, number: int, batch: int | None = None) -> SVI:
    for _ in range(number):
        rows = torch.randperm(len(data[0]))[: batch or len(data[0])]
        svi.step(*(part[rows] for part in data))
    return svi


# The numbers

FAMILIES: dict[str, tuple[Any, Any]] = {
    "Normal": (lambda n: dist.Normal(torch.randn(n), torch.rand(n) + 0.1), 2),
    "Categorical": (lambda n: dist.Categorical(logits=torch.randn(n, 3)), 3),
    "OneHotCategorical": (lambda n: dist.OneHotCategorical(logits=torch.randn(n, 3)), 3),
    "Bernoulli": (lambda n: dist.Bernoulli(logits=torch.randn(n)), 1),
    "Poisson": (lambda n: dist.Poisson(torch.rand(n) * 5), 1),
}
BUILD: dict[str, Callable[[Tensor], Any]] = {
    "Normal": lambda free: dist.Normal(free[0], free[1].exp()),
    "Categorical": lambda free: dist.Categorical(logits=free),
    "OneHotCategorical": lambda free: dist.OneHotCategorical(logits=free),
    "Bernoulli": lambda free: dist.Bernoulli(logits=free[0]),
    "Poisson": lambda free: dist.Poisson(free[0].exp()),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_best_constant_is_the_maximum_that_an_optimiser_finds(name: str) -> None:
    make, size = FAMILIES[name]
    fn, weight = make(50), torch.rand(50) + 0.2
    y = fn.sample()
    free = torch.zeros(size, requires_grad=True)
    search = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def loss() -> Tensor:
        search.zero_grad()
        total = -(weight * BUILD[name](free).log_prob(y)).sum()
        total.backward()
        return total

    search.step(loss)
    found = best_constant(fn, y, weight)
    assert found is not None
    assert found.shape == (50,)
    torch.testing.assert_close((weight * found).sum(), -loss().detach(), rtol=1e-6, atol=1e-6)


def test_the_best_constant_has_a_parameter_for_each_pixel_and_keeps_a_scale_that_is_one_number() -> None:
    y = torch.randint(2, (30, 4, 3)).double()
    pixels = best_constant(dist.Bernoulli(torch.full((30, 4, 3), 0.5)).to_event(2), y, torch.ones(30))
    assert pixels is not None
    torch.testing.assert_close(pixels, dist.Bernoulli(y.mean(0)).to_event(2).log_prob(y))
    z = torch.randn(30)
    held = best_constant(dist.Normal(torch.randn(30), 0.3), z, torch.ones(30))
    assert held is not None
    torch.testing.assert_close(held, dist.Normal(z.mean(), 0.3).log_prob(z))
    assert best_constant(dist.Gamma(torch.ones(3), 1.0), torch.ones(3), torch.ones(3)) is None


def line(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 2.0).to_event(1))
    with pyro.plate("data", 100, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)


def lines() -> Pair:
    x = torch.randn(20, 4)
    return x, x @ torch.tensor([1.0, -1.0, 0.5, 0.0])


@pytest.mark.parametrize("make", [lambda: ps.MeanFieldNormal(line, init_scale=0.3), lambda: AutoNormal(line)])
def test_the_numbers_are_those_of_their_formulas(make: Any) -> None:
    x, y = lines()
    guide = make()
    guide(x, y)
    svi = SVI(line, guide, optimiser(), ps.SAM_ELBO(ps.Adversarial(2.0), kl_weight=0.5))
    w = guide.median(x, y)["w"]
    loc, scale = (part.detach() for part in guide._get_loc_and_scale("w"))
    with torch.no_grad():
        scale.copy_(scale)
    found = ps.diagnose(svi, x, y)
    assert found.data is not None
    likelihood = dist.Normal(x @ w, 0.5).log_prob(y)
    assert found.data.observations == 100
    assert found.data.at_mean == pytest.approx(-5 * float(likelihood.sum()))
    assert found.data.constant == pytest.approx(-5 * float(dist.Normal(y.mean(), 0.5).log_prob(y).sum()))
    # E of a quadratic: the mean's, and the spread's share
    expected = found.data.at_mean + 5 * float(((x * scale) ** 2).sum()) / (2 * 0.25)
    draws = dist.Normal(loc, scale).sample((32,))
    each = -5 * dist.Normal(draws @ x.T, 0.5).log_prob(y).sum(-1)
    assert abs(found.data.at_samples - expected) < 5 * float(each.std()) / 32**0.5
    kl = kl_divergence(torch.distributions.Normal(loc, scale), torch.distributions.Normal(0.0, 2.0))
    if isinstance(guide, ps.MeanFieldNormal):
        assert found.kl == pytest.approx(float(kl.sum()))
    (site,) = found.sites
    assert (site.name, site.size) == ("w", 4)
    assert site.at_prior == float((kl < 0.02).double().mean())
    assert site.signal_to_noise == pytest.approx(float((loc.abs() / scale).median()))
    assert found.data.at_noise > found.data.at_mean  # the worst point of a ball
    assert found.data.predictive is not None
    assert found.data.predictive < found.data.at_samples  # Jensen
    assert "w" in str(found)
    assert "mean network" in str(found)


def test_scalars_at_their_prior_are_counted() -> None:
    x, y = lines()
    guide = ps.MeanFieldNormal(line, init_scale=lambda site: torch.tensor([2.0, 2.1, 1.0, 2.0]))
    guide.initialize(x, y)
    with torch.no_grad():
        guide.locs.w_unconstrained.copy_(torch.tensor([0.1, -0.1, 0.0, 1.0]))
    (site,) = ps.diagnose(SVI(line, guide, optimiser(), ps.SAM_ELBO()), x, y).sites
    assert site.at_prior == 0.5


def test_joint_guides_and_other_losses_are_described_too() -> None:
    x, y = lines()
    guide = AutoDiagonalNormal(line)
    svi = SVI(line, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    svi.step(x, y)
    found = ps.diagnose(svi, x, y)
    assert [site.size for site in found.sites] == [4]
    assert found.kl_weight == 1


# It leaves no trace


def test_it_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    bnn = ps.BayesianModule(net)
    counter = [0]

    def model(x: Tensor, y: Tensor) -> None:
        counter[0] += 1
        outputs = bnn(x) + float(np.random.randn()) * random.random()  # noqa: NPY002
        with pyro.plate("data", 60, subsample_size=len(x)):
            pyro.sample("obs", categorical(outputs), obs=y)

    x, y = torch.randn(60, 4), torch.randint(3, (60,))
    guide = ps.MeanFieldNormal(model)
    svi = SVI(model, guide, optimiser(), ps.SAM_ELBO(ps.AscendedSample(), ascent="previous"))
    for _ in range(3):
        svi.step(x, y)

    def state() -> list[Any]:
        streams = [torch.get_rng_state(), torch.as_tensor(np.random.get_state()[1].astype(np.int64))]  # noqa: NPY002
        params = [p.detach().clone() for p in pyro.get_param_store()._params.values()]
        grads = [p.grad for p in guide.parameters()]
        moments = [t.clone() for s in svi.optim.get_state()["optimizer"]["state"].values() for t in s.values()]
        ascent = list(svi.loss.__self__.state_dict()["ascent"].values())  # type: ignore[attr-defined]
        buffers = [b.clone() for b in net.buffers()]
        return [streams, params, grads, moments, ascent, buffers, list(pyro.get_param_store()), random.getstate()]

    before = state()
    ps.diagnose(svi, x, y)
    torch.testing.assert_close(before[:6], state()[:6], rtol=0, atol=0)
    assert before[6:] == state()[6:]
    assert net.training


# Bad trainings, and their cures


def settings_of(found: ps.Diagnosis) -> dict[str, Any]:
    return {problem.setting: problem.value for problem in found.problems}


def accuracy(svi: SVI, data: Pair) -> float:
    probs = ps.predict(lambda x: svi.model(x), svi.guide, data[0], num_samples=16).probs
    return float((probs.argmax(-1) == data[1]).double().mean())


def test_few_digits_collapse_and_a_smaller_weight_of_the_kl_lifts_them_off_chance() -> None:
    data, prior = digits(120), ps.nn.fan_in_normal(2.0)
    bad = steps(network(mlp(64, 50, 50, 10), data, ps.Gaussian(), prior=prior), data, 300)
    assert accuracy(bad, data) < 0.3
    found = ps.diagnose(bad, *data)
    assert settings_of(found) == {"kl_weight": 0.04}
    assert "no better than a constant" in str(found)
    assert "nats to give for 6310 latent scalars" in str(found)
    cured = network(mlp(64, 50, 50, 10), data, ps.Gaussian(), prior=prior, **settings_of(found))
    steps(cured, data, 300)
    assert not ps.diagnose(cured, *data).problems
    assert accuracy(cured, data) > 0.9


def test_a_heteroscedastic_regression_is_told_flat_and_cured() -> None:
    data = wave()
    make = {"likelihood": spread}
    bad = steps(network(mlp(1, 50, 50, 2, act=nn.Tanh), data, ps.Gaussian(), init_scale=0.1, **make), data, 200)
    found = settings_of(ps.diagnose(bad, *data))
    assert found == {"kl_weight": 0.07, "init_scale": 0.04}
    cured = steps(network(mlp(1, 50, 50, 2, act=nn.Tanh), data, ps.Gaussian(), **make, **found), data, 600)
    good = ps.diagnose(cured, *data)
    assert not good.problems
    assert good.data is not None
    assert good.data.constant is not None
    assert good.data.at_mean < good.data.constant - 0.5 * len(data[0])


def test_a_guide_close_to_an_adversary_is_told_too_wide_and_cured() -> None:
    data = digits(1000)
    bad = steps(network(mlp(64, 64, 10), data, ps.Adversarial(), init_scale=0.1), data, 200, batch=100)
    found = settings_of(ps.diagnose(bad, *data))
    assert found == {"perturbation": ps.AscendedSample(), "init_scale": 0.04}
    cured = steps(network(mlp(64, 64, 10), data, ps.AscendedSample(), init_scale=0.04), data, 200, batch=100)
    assert not ps.diagnose(cured, *data).problems


def test_a_tight_prior_is_told_and_how_wide_it_should_be() -> None:
    data = echoes()
    net = mlp(60, 50, 50, 2)
    bad = steps(network(net, data, ps.Gaussian(), prior=ps.nn.fan_in_normal(0.5)), data, 300)
    found = settings_of(ps.diagnose(bad, *data))
    assert set(found) == {"kl_weight", "prior"}
    std = float(found["prior"].removeprefix("ps.nn.fan_in_normal(").removesuffix(")"))
    assert 1 < std < 4
    narrow = network(net, data, ps.Gaussian(), prior=dist.Normal(0.0, 0.05))
    told = settings_of(ps.diagnose(steps(narrow, data, 300), *data))
    assert told["prior"].startswith("dist.Normal(0, 0.")


def test_a_wide_start_is_told_and_cured() -> None:
    data = digits(1000)
    sizes, make = (64, 50, 50, 50, 10), {"prior": ps.nn.fan_in_normal(2.0), "kl_weight": 0.25}
    bad = network(mlp(*sizes), data, ps.Gaussian(), init_scale=0.3, lr=3e-3, **make)
    found = settings_of(ps.diagnose(steps(bad, data, 150, batch=100), *data))
    assert found == {"init_scale": 0.04}
    cured = network(mlp(*sizes), data, ps.Gaussian(), lr=3e-3, **make, **found)
    assert not ps.diagnose(steps(cured, data, 150, batch=100), *data).problems


def test_an_adversary_beyond_all_weights_is_told() -> None:
    data = digits(500)
    bad = network(mlp(64, 64, 10), data, ps.Adversarial(1e6), prior=ps.nn.fan_in_normal(2.0))
    with pytest.warns(UserWarning, match="moves the 4810 latent scalars by 2e"):
        steps(bad, data, 120, batch=100)
    (problem,) = ps.diagnose(bad, *data).problems
    assert (problem.kind, problem.setting, problem.value) == ("far", "rho", 5.0)


def test_a_guide_that_was_not_trained_is_told_so() -> None:
    data = digits(500)
    svi = network(mlp(64, 64, 10), data, ps.Gaussian())
    svi.guide.initialize(*data)
    (problem,) = ps.diagnose(svi, *data).problems
    assert problem.kind == "untrained"


def test_a_model_without_observations_is_told_so() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x * w, 1.0))

    guide = ps.MeanFieldNormal(model).initialize(torch.randn(30))
    found = ps.diagnose(SVI(model, guide, optimiser(), ps.SAM_ELBO()), torch.randn(30))
    assert [problem.kind for problem in found.problems] == ["no data"]
    assert found.data is None
    assert "Try obs=y" in str(found)


# Good ones


def test_a_network_that_trains_well_has_no_finding() -> None:
    data = digits(1000)
    law, prior = ps.Adversarial(5.0), ps.nn.fan_in_normal(2.0)
    svi = network(mlp(64, 64, 10), data, law, prior=prior, kl_weight=0.15)
    found = ps.diagnose(steps(svi, data, 200, batch=100), *data)
    assert not found.problems
    assert "Nothing looks wrong." in str(found)


def schools(sigma: Tensor, y: Tensor) -> None:
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)


@config_enumerate
def mixture(x: Tensor) -> None:
    share = pyro.sample("share", dist.Beta(1.0, 1.0))
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(share)).long()
        pyro.sample("obs", dist.Normal(mu[k], 1.0), obs=x)


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)


def horseshoe(x: Tensor, y: Tensor) -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(1.0)))
    spread = pyro.sample("spread", dist.HalfCauchy(torch.ones(60)).to_event(1))
    z = pyro.sample("z", dist.Normal(torch.zeros(60), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ (z * spread * tau), 1.0), obs=y)


EFFECTS, SIGMA = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
WIDE = torch.randn(100, 60, generator=torch.Generator().manual_seed(0)).double()
OTHERS: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "eight schools": (schools, (SIGMA.double(), EFFECTS.double())),
    "mixture": (mixture, (torch.cat([torch.randn(40) - 3, torch.randn(40) + 3]).double(),)),
    "logistic": (logistic, (WIDE[:, :3], (WIDE[:, 0] > 0).double())),
    "horseshoe": (horseshoe, (WIDE, WIDE[:, 0] * 3 - WIDE[:, 1] * 2)),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("law", [ps.Gaussian(), ps.AscendedSample(0.5)], ids=["gaussian", "ascended"])
def test_other_models_have_no_finding(name: str, law: ps.Perturbation) -> None:
    model, data = OTHERS[name]
    svi = SVI(model, ps.MeanFieldNormal(model), optimiser(0.03), ps.SAM_ELBO(law))
    for _ in range(150):
        svi.step(*data)
    found = ps.diagnose(svi, *data)
    assert not found.problems
    assert len(found.sites) >= 1


def test_an_autoencoder_has_no_finding() -> None:
    x = (digits(500)[0] > 0.5).float()
    encoder, decoder = mlp(64, 32, 8).float(), mlp(4, 32, 64).float()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", 500, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 4), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", 500, subsample_size=len(x)):
            loc, scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))

    svi = SVI(model, guide, optimiser(), ps.SAM_ELBO(ps.Gaussian()))
    found = ps.diagnose(steps(svi, (x,), 200, batch=100), x)
    assert not found.problems
    assert found.data is not None
    assert found.data.constant is not None
    assert found.data.predictive is not None
    assert found.data.predictive < found.data.constant


# What cannot be diagnosed


def test_what_cannot_be_diagnosed_is_said() -> None:
    x, y = lines()
    with pytest.raises(ValueError, match=r"svi must be a pyro.infer.SVI, got 3"):
        ps.diagnose(3)  # type: ignore[arg-type]
    svi = SVI(line, ps.MeanFieldNormal(line), optimiser(), ps.SAM_ELBO())
    with pytest.raises(ValueError, match=r"has no parameters yet"):
        ps.diagnose(svi, x, y)
    many = ps.MeanFieldNormal(line, num_replicas=3).initialize(x, y)
    with pytest.raises(ValueError, match=r"the guide has 3 replicas: diagnose guide.replica\(r\)"):
        ps.diagnose(SVI(line, many, optimiser(), ps.SAM_ELBO()), x, y)
    point = AutoDelta(line)
    point(x, y)
    with pytest.raises(ValueError, match=r"no Gaussian site to perturb"):
        ps.diagnose(SVI(line, point, optimiser(), ps.SAM_ELBO()), x, y)
    svi.step(x, y)
    y[3] = float("nan")
    with pytest.raises(ValueError, match=r"the second tensor, shape \(20,\), has NaN or infinity in row 3"):
        ps.diagnose(svi, x, y)


# fit's own warning


def few_digits(kl_weight: float) -> tuple[SVI, list[Pair]]:
    data = digits(120)
    svi = network(mlp(64, 50, 50, 10), data, ps.Gaussian(), prior=ps.nn.fan_in_normal(2.0), kl_weight=kl_weight)
    return svi, [data]


def test_fit_warns_once_on_the_way_and_once_at_the_end() -> None:
    svi, loader = few_digits(1.0)
    with pytest.warns(UserWarning, match="Try kl_weight=0.04") as said:
        ps.fit(svi, loader, 150, progress=False)
    first, last = (str(each.message) for each in said)
    assert first.startswith("after 100 epochs training looks collapsed")
    assert last.startswith("training has ended in a posterior that is of no use; print(pyro_sam.diagnose(svi, ...))")


def test_fit_is_silent_where_training_goes_well_or_has_hardly_begun() -> None:
    svi, loader = few_digits(0.04)
    ps.fit(svi, loader, 150, progress=False)
    svi, loader = few_digits(1.0)
    ps.fit(svi, loader, collapse.FIRST - 1, progress=False)


def test_a_fit_goes_on_and_ends_the_same_where_the_look_fails_or_finds_something(monkeypatch: Any) -> None:
    def weights() -> list[Tensor]:
        pyro.set_rng_seed(0)
        svi, loader = few_digits(1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ps.fit(svi, loader, 130, progress=False)
        return [param.detach().clone() for param in svi.guide.parameters()]

    looked = weights()

    def broken(*args: Any) -> Any:
        raise RuntimeError("cannot judge")

    monkeypatch.setattr(collapse, "problems", broken)
    torch.testing.assert_close(weights(), looked, rtol=0, atol=0)


def test_the_largest_batch_is_looked_at() -> None:
    watch = collapse.Watch()
    for rows in (20, 30, 7):
        watch.see((torch.zeros(rows, 2), torch.zeros(rows)))
    assert len(watch._batch[0]) == 30
    assert copy.copy(watch)._rows == 30
