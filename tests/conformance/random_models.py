"""Models drawn at random: sites, shapes, plates, scales and masks; and the laws to run them under."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor

import pyro_sam as ps


@dataclass(frozen=True)
class Site:
    """A latent and the observation that holds it.

    Args:
        name: The latent's.
        event_shape: Of both.
        in_plate: Whether they are in the data plate.
        scale: Scale of the observation.
        mask: What of the observations counts: every one, every second one, or none.
    """

    name: str
    event_shape: tuple[int, ...]
    in_plate: bool
    scale: float
    mask: str

    def numbers(self, *batch: int) -> Tensor:
        """Return numbers of the site's own, of shape ``batch + event_shape``."""
        shape = torch.Size([*batch, *self.event_shape])
        return torch.sin(torch.arange(shape.numel()) + float(self.name[-1])).reshape(shape)

    def observed(self, rows: Tensor) -> Tensor:
        if self.mask == "half":
            return rows % 2 == 0 if self.in_plate else torch.tensor(True)
        return torch.tensor(self.mask == "all")


@dataclass(frozen=True)
class World:
    """A model and its mean-field guide.

    Args:
        sites: Latents, in the order of model and guide.
        size: Data points.
        subsample: Minibatch.
        coupling: Weight of a factor that all latents meet in.
        scale: Scale of all observations and the factor.
    """

    sites: tuple[Site, ...]
    size: int
    subsample: int
    coupling: float
    scale: float = 1.0

    def model(self) -> None:
        """Sample every latent from its prior and observe it."""
        plate = pyro.plate("data", self.size, subsample_size=self.subsample, dim=-1)
        total: Any = 0.0
        for site in self.sites:
            with self._inside(site, plate) as rows:
                event_dim = len(site.event_shape)
                value = pyro.sample(site.name, dist.Normal(torch.zeros(site.event_shape), 1.0).to_event(event_dim))
                target = site.numbers(self.size)[rows] if site.in_plate else site.numbers()
                with poutine.scale(scale=site.scale * self.scale), poutine.mask(mask=site.observed(rows)):
                    pyro.sample(f"obs_{site.name}", dist.Normal(value, 1.0).to_event(event_dim), obs=target)
            total = total + value.sum()
        if self.coupling:
            with poutine.scale(scale=self.scale):
                pyro.factor("coupling", -self.coupling * (total - 1.0) ** 2)

    def guide(self) -> None:
        """Sample every latent from a Normal."""
        plate = pyro.plate("data", self.size, subsample_size=self.subsample, dim=-1)
        for site in self.sites:
            with self._inside(site, plate) as rows:
                start = site.numbers(self.size) if site.in_plate else site.numbers()
                loc, scale = (
                    pyro.param(f"{site.name}_loc", 0.3 * start),
                    pyro.param(f"{site.name}_scale", 0.2 + start**2),
                )
                fn = dist.Normal(loc[rows], scale[rows]) if site.in_plate else dist.Normal(loc, scale)
                pyro.sample(site.name, fn.to_event(len(site.event_shape)))

    @contextmanager
    def _inside(self, site: Site, plate: Any) -> Iterator[Tensor]:
        with ExitStack() as stack:
            yield stack.enter_context(plate) if site.in_plate else torch.arange(self.size)


shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
details = st.tuples(shapes, st.booleans(), st.floats(0.1, 3.0), st.sampled_from(["all", "half", "none"]))


@st.composite
def worlds(draw: Any) -> World:
    """Draw a world of one to four latents, at least one of which the loss depends on."""
    sites = tuple(Site(f"site{k}", *detail) for k, detail in enumerate(draw(st.lists(details, min_size=1, max_size=4))))
    size = draw(st.integers(2, 6))
    return World(sites, size, draw(st.integers(1, size)), coupling=draw(st.floats(0.1, 2.0)))


radii = st.floats(0.05, 3.0)
adversarial = st.builds(ps.Adversarial, radii)
of_fixed_length = st.one_of(adversarial, st.builds(ps.MixSAM, radii, st.floats(0.0, 100.0)))
laws = st.one_of(
    of_fixed_length,
    st.builds(ps.Adversarial, radii, steps=st.integers(1, 3), ord=st.sampled_from([2, float("inf")])),
    st.builds(ps.Adversarial, radii, geometry=st.sampled_from(["euclidean", "adaptive"])),
    st.builds(ps.AscendedSample, st.floats(-2.0, 2.0)),
    st.builds(lambda p, rho: ps.Mixture([ps.Gaussian(), ps.Adversarial(rho)], [p, 1 - p]), st.floats(0.0, 1.0), radii),
    st.just(ps.Gaussian()),
    st.just(ps.Mean()),
)
scopes = st.sampled_from(["global", "site", "event"])
