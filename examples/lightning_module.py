"""The SAM-ELBO inside a LightningModule, where Lightning owns the loop, the devices and the checkpoints.

    pip install "pyro-sam[lightning]"
    python examples/lightning_module.py

It fits a regression and prints the error on held-out points. Lightning splits the data over processes by itself with
``Trainer(devices=2, strategy="ddp")``: call ``initialize`` before, as here, so that DDP finds all parameters.
"""

import warnings

import lightning
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_sam as ps


class Regression(nn.Module):
    """A Bayesian network with Gaussian noise, as a Pyro model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.bnn = ps.BayesianModule(nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)))
        self.bnn.requires_grad_(False)  # the network's own weights only start the guide

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        """Sample the weights and the observations."""
        mean = self.bnn(x).squeeze(-1)
        with pyro.plate("data", self.size if y is not None else len(x), subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)


class Fit(lightning.LightningModule):
    """Minimises the SAM-ELBO with a torch optimiser."""

    def __init__(self, model: nn.Module, example: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        guide = ps.MeanFieldNormal(model, init_scale=0.02).initialize(*example)
        self.loss = ps.SAM_ELBO(ps.Adversarial(rho=0.5))(model, guide)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self.loss(*batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser of the guide's parameters."""
        return torch.optim.Adam(self.loss.guide.parameters(), lr=0.01)


def main(epochs: int = 60) -> float:
    """Fit, and return the root mean squared error on held-out points."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x = torch.linspace(-2, 2, 128)[:, None]
    y = torch.sin(2 * x[:, 0])
    data = TensorDataset(x[::2], y[::2] + 0.1 * torch.randn(64))
    module = Fit(Regression(len(data)), data[:8])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and loggers
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(data, batch_size=16, shuffle=True))
    mean = ps.predict(module.loss.model, module.loss.guide, x[1::2], num_samples=32).mean
    return float((mean - y[1::2]).square().mean().sqrt())


if __name__ == "__main__":
    print(f"root mean squared error on held-out points: {main():.3f}")  # noqa: T201  # an example talks
