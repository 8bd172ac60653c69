"""An amortised guide, local latents in a subsampled plate: every data point has an adversary of its own."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_sam as ps

DATA = torch.linspace(0, 1, 60).reshape(20, 3).double()


class VAE(nn.Module):
    """A variational autoencoder that keeps what its decoder saw."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", 20, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            self.seen.append((z.detach(), *(t.detach() for t in self.q(x))))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x.round())

    def q(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        return loc, log_scale.exp()

    def guide(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", 20, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(*self.q(x)).to_event(1))


@pytest.mark.parametrize("law", [ps.Adversarial(0.7), ps.MixSAM(0.7, kappa=2.0)], ids=repr)
@pytest.mark.parametrize(("scope", "rows"), [("event", 1), ("site", 6), ("global", 6)])
def test_the_radius_is_that_of_a_data_point_or_of_the_minibatch(law: ps.Perturbation, scope: Any, rows: int) -> None:
    vae = VAE()
    ps.SAM_ELBO(law, scope=scope).loss_and_grads(vae.model, vae.guide, DATA[:6])
    z, loc, scale = vae.seen[1]  # ascent, descent, and a look whether other noise changes the KL
    e = (z - loc) / scale
    torch.testing.assert_close(e.reshape(6 // rows, -1).norm(dim=-1), torch.full((6 // rows,), 0.7))


def test_each_data_point_climbs_its_own_gradient() -> None:
    vae = VAE()
    x = DATA[:6]
    ps.SAM_ELBO(ps.Adversarial(0.7), scope="event").loss_and_grads(vae.model, vae.guide, x)
    z, loc, scale = vae.seen[1]
    at_mean = loc.clone().requires_grad_()
    loss = nn.functional.binary_cross_entropy_with_logits(vae.decoder(at_mean), x.round(), reduction="sum")
    u = scale * torch.autograd.grad(loss, at_mean)[0]
    torch.testing.assert_close((z - loc) / scale, 0.7 * u / u.norm(dim=-1, keepdim=True))
