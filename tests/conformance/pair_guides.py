"""The hand-written guides of the conformance table."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pair_models import Y
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide, easy_guide
from pyro.infer.autoguide import AutoGuideList
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn

import pyro_sam as ps

Guide = Callable[..., Any]
positive = dist.constraints.positive


def loc_and_scale(name: str, *shape: int) -> tuple[Tensor, Tensor]:
    return (
        pyro.param(f"{name}_loc", torch.full(shape, 0.2)),
        pyro.param(f"{name}_scale", torch.full(shape, 0.3), constraint=positive),
    )


def normal(name: str, *shape: int) -> Tensor:
    return pyro.sample(name, dist.Normal(*loc_and_scale(name, *shape)).to_event(len(shape)))


def of_w(model: Guide) -> Guide:
    return lambda: normal("w", 3)


def of_w_and_b(model: Guide) -> Guide:
    def guide() -> None:
        normal("w", 3)
        normal("b")

    return guide


def full_covariance(model: Guide) -> Guide:
    def guide() -> None:
        loc = pyro.param("loc", torch.zeros(3))
        tril = pyro.param("tril", 0.3 * torch.eye(3), constraint=dist.constraints.lower_cholesky)
        pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=tril))

    return guide


def low_rank(model: Guide) -> Guide:
    def guide() -> None:
        factor = pyro.param("factor", torch.full((3, 2), 0.1))
        diagonal = pyro.param("diagonal", torch.full((3,), 0.1), constraint=positive)
        pyro.sample("w", dist.LowRankMultivariateNormal(pyro.param("loc", torch.zeros(3)), factor, diagonal))

    return guide


def auxiliary(model: Guide) -> Guide:
    """A joint Normal over two latents through an auxiliary site, and Deltas of its parts."""

    def guide() -> None:
        loc, scale = loc_and_scale("joint", 4)
        joint = pyro.sample("joint", dist.Normal(loc, scale).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Delta(joint[..., :3], event_dim=1))
        pyro.sample("b", dist.Delta(joint[..., 3]))

    return guide


def random_scale(model: Guide) -> Guide:
    """A hierarchical guide: the auxiliary draw widens the next site."""

    def guide() -> None:
        u = pyro.sample("u", dist.Normal(*loc_and_scale("u")), infer={"is_auxiliary": True})
        loc, scale = loc_and_scale("w", 3)
        pyro.sample("w", dist.Normal(loc + u[..., None], scale).to_event(1))

    return guide


def global_and_local(subsample_size: int | None) -> Callable[[Guide], Guide]:
    def make(model: Guide) -> Guide:
        def guide() -> None:
            normal("top")
            with pyro.plate("data", 12, subsample_size=subsample_size) as rows:
                loc, scale = loc_and_scale("z", 12)
                pyro.sample("z", dist.Normal(loc[rows], scale[rows]))

        return guide

    return make


def amortised(model: Guide) -> Guide:
    encoder = nn.Linear(1, 2).double()

    def guide() -> None:
        pyro.module("encoder", encoder)
        normal("top")
        with pyro.plate("data", 12, subsample_size=5) as rows:
            loc, log_scale = encoder(Y[rows, None]).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return guide


def mixed_families(model: Guide) -> Guide:
    """Gaussian where it is named so, the rest reparameterised in its own family."""

    def guide() -> None:
        sigma_rate = pyro.param("sigma_rate", torch.tensor(2.0), constraint=positive)
        pyro.sample("tau", dist.Gamma(sigma_rate, 1.0))
        normal("w", 3)

    return guide


def markov(model: Guide) -> Guide:
    def guide() -> None:
        normal("drift")
        z: Tensor = torch.tensor(0.0)
        weight = pyro.param("weight", torch.tensor(0.5))
        for t in pyro.markov(range(5)):
            loc, scale = loc_and_scale(f"z_{t}")
            z = pyro.sample(f"z_{t}", dist.Normal(loc + weight * z, scale))

    return guide


def sequential(model: Guide) -> Guide:
    def guide() -> None:
        normal("w")
        for i in pyro.plate("items", 3):
            normal(f"z_{i}")

    return guide


def data_dependent(with_sigma: bool) -> Callable[[Guide], Guide]:
    def make(model: Guide) -> Guide:
        def guide() -> None:
            normal("w")
            if with_sigma:
                pyro.sample("sigma", dist.LogNormal(*loc_and_scale("sigma")))

        return guide

    return make


class ModuleGuide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroParam(torch.zeros(3))
        self.scale = PyroParam(torch.full((3,), 0.3), constraint=positive)
        self.w = PyroSample(lambda self: dist.Normal(self.loc, self.scale).to_event(1))

    def forward(self) -> Tensor:
        return self.w


def auto_list(first: Any, second: Any) -> Callable[[Guide], Guide]:
    def make(model: Guide) -> Guide:
        guide = AutoGuideList(model)
        guide.append(first(poutine.block(model, expose=["w"])))
        guide.append(second(poutine.block(model, hide=["w"])))
        return guide

    return make


class Easy(EasyGuide):
    def guide(self) -> None:
        group = self.group(match="w|b")
        loc = pyro.param("easy_loc", torch.zeros(group.event_shape))
        scale = pyro.param("easy_scale", torch.full(group.event_shape, 0.3), constraint=positive)
        group.sample("joint", dist.Normal(loc, scale).to_event(1))


def easy_with_locals(model: Guide) -> Guide:
    @easy_guide(model)
    def guide(self: Any) -> None:
        self.map_estimate("top")
        group = self.group(match="z")
        with self.plate("data", 12, subsample_size=5):
            loc = pyro.param("easy_loc", torch.zeros(12, 1), event_dim=1)
            scale = pyro.param("easy_scale", torch.full((12, 1), 0.3), constraint=positive, event_dim=1)
            group.sample("joint", dist.Normal(loc, scale).to_event(1))

    return guide


def handled(handler: Callable[[Guide], Guide], make: Callable[[Guide], Guide]) -> Callable[[Guide], Guide]:
    return lambda model: handler(make(model))


def plates_of_data(*args: Any) -> Any:
    return pyro.plate("data", 12, subsample_size=5)


mean_field_with_plates = partial(ps.MeanFieldNormal, create_plates=plates_of_data)
