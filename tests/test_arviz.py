"""Draws in ArviZ's groups: its own statistics of them, and a way through netCDF and back."""

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.contrib.autoname
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_sam as ps

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ announces its version 1
    import arviz

from pyro_sam.arviz import to_dict, to_inference_data

X = torch.linspace(-1, 1, 12).double()
Y = 0.7 * X


def model(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(w * x + 0 * v.sum(-1), 0.5), obs=y)


def guide_of(kind: Any = ps.MeanFieldNormal, m: Any = model, scale: float = 0.3) -> Any:
    pyro.clear_param_store()
    guide = kind(m, init_scale=scale)
    guide(X, Y)
    return guide


@pytest.mark.parametrize("kind", [ps.MeanFieldNormal, AutoNormal])
def test_each_group_has_one_chain_of_all_draws(kind: Any) -> None:
    groups = to_dict(model, guide_of(kind), X, num_samples=50, observations=Y)
    shapes = {group: {name: array.shape for name, array in arrays.items()} for group, arrays in groups.items()}
    assert shapes == {
        "posterior": {"w": (1, 50), "v": (1, 50, 2)},
        "posterior_predictive": {"obs": (1, 50, 12)},
        "log_likelihood": {"obs": (1, 50, 12)},
        "observed_data": {"obs": (12,)},
    }
    assert set(to_dict(model, guide_of(kind), X, num_samples=2)) == {"posterior", "posterior_predictive"}


def test_draws_of_all_groups_belong_together() -> None:
    groups = to_dict(model, guide_of(), X, num_samples=400, observations=Y)
    w = torch.as_tensor(groups["posterior"]["w"][0])
    log_prob = dist.Normal(w[:, None] * X, 0.5).log_prob(Y)
    np.testing.assert_allclose(groups["log_likelihood"]["obs"][0], log_prob)
    off = torch.as_tensor(groups["posterior_predictive"]["obs"][0]) - w[:, None] * X
    assert float(off.std()) == pytest.approx(0.5, rel=0.05)
    assert float(w.std()) == pytest.approx(0.3, rel=0.15)


def test_arviz_knows_what_it_gets_and_netcdf_keeps_it(tmp_path: Path) -> None:
    data = to_inference_data(model, guide_of(scale=0.1), X, num_samples=200, observations=Y)
    w = data.posterior["w"]
    assert float(arviz.summary(data, kind="stats", round_to=6).loc["w", "mean"]) == pytest.approx(
        float(w.mean()), abs=1e-5
    )
    loo = arviz.loo(data)
    elpd = loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd  # before and after ArviZ 1
    log_prob = torch.as_tensor(data.log_likelihood["obs"].values[0]).logsumexp(0) - math.log(200)
    assert log_prob.sum() - 1 < float(elpd) < log_prob.sum()  # leaving a point out costs a little
    data.to_netcdf(tmp_path / "posterior.nc")
    again = arviz.from_netcdf(tmp_path / "posterior.nc")
    for group in ("posterior", "posterior_predictive", "log_likelihood", "observed_data"):
        for name, array in data[group].items():
            np.testing.assert_array_equal(again[group][name], array)


def test_networks_and_scopes_have_names_that_netcdf_takes(tmp_path: Path) -> None:
    bnn = ps.BayesianModule(nn.Linear(1, 1))

    def scoped(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.contrib.autoname.scope(prefix="net"):
            mean = bnn(x[:, None]).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    data = to_inference_data(scoped, guide_of(m=scoped), X, num_samples=3)
    assert set(data.posterior) == {"net.weight", "net.bias"}
    data.to_netcdf(tmp_path / "posterior.nc")


def test_names_that_become_one_are_refused() -> None:
    def alike(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("a/w", dist.Normal(0.0, 1.0)) + pyro.sample("a.w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(w * x, 0.5), obs=y)

    guide = guide_of(m=alike)
    with pytest.raises(ValueError, match=r"sites 'a/w', 'a.w' have one name where '/' becomes a dot"):
        to_dict(alike, guide, X, num_samples=2)
    assert list(to_dict(alike, guide, X, num_samples=2, var_names=["a/w"])["posterior"]) == ["a.w"]


def test_bfloat16_becomes_float32() -> None:
    bnn = ps.BayesianModule(nn.Linear(1, 1).to(torch.bfloat16))

    def half(x: Tensor, y: Tensor | None = None) -> None:
        mean = bnn(x.to(torch.bfloat16)[:, None])[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    guide = ps.MeanFieldNormal(half).initialize(X, Y.to(torch.bfloat16))
    assert to_dict(half, guide, X, num_samples=2)["posterior"]["weight"].dtype == np.float32


def test_chosen_latents_are_kept() -> None:
    assert set(to_dict(model, guide_of(), X, num_samples=2, var_names=["v"])["posterior"]) == {"v"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"var_names": ["u"]}, r"var_names must be a collection of the guide's latents .*, got var_names=\['u'\]"),
        ({"var_names": "w"}, r"var_names must be a collection of the guide's latents, got var_names='w'"),
        ({"num_samples": 0}, r"num_samples must be a whole number of at least 1"),
        ({"site": "y"}, r"site must be a site of the model, got site='y'"),
        ({"observations": Y[:3]}, r"y must have one row per predicted data point"),
    ],
)
def test_bad_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_dict(model, guide_of(), X, **settings)


def test_without_arviz_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r'pip install "pyro-sam\[arviz\]"'):
        to_inference_data(model, guide_of(), X)
