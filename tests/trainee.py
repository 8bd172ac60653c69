"""A training run to be killed and resumed: shuffling loader, dropout, BatchNorm and MixSAM's noise."""

import os
import signal
import threading
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import pyro_sam as ps
from pyro_sam.training.checkpoint import Checkpoint


class Jittered(Dataset[Any]):
    """Rows of data with numpy noise of each time's own."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x = torch.tensor([row / 24.0])
        return x + 0.01 * float(np.random.randn()), x.sin()[0]  # noqa: NPY002  # the global stream is meant


def joint(interval: Any) -> Any:
    """JointOptim with a scheduler."""
    return ps.optim.JointOptim(
        torch.optim.Adam,
        {"lr": 0.01},
        clip_norm=50.0,
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        scheduler_interval=interval,
    )


def pyros() -> Any:
    """Pyro's optimisers with a scheduler."""
    args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.9}
    return pyro.optim.ExponentialLR(args, {"clip_norm": 50.0})


def lbfgs() -> Any:
    """An optimiser that evaluates the loss three times in a step."""
    return ps.optim.JointOptim(torch.optim.LBFGS, {"lr": 0.01, "max_iter": 3})


OPTIMISERS = {
    "lbfgs": lbfgs,
    "step": lambda: joint("step"),
    "epoch": lambda: joint("epoch"),
    "pyro": pyros,
    "decaying": lambda: pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.9}),
}


def train(
    checkpoint: Any,
    epochs: int,
    *,
    every: int = 1,
    local: bool = False,
    optim: str = "step",
    ascent: Any = "fresh",
    split: Any = None,
    validate: bool = False,
    anneal: Any = None,
    after_step: Any = None,
    after_epoch: Any = None,
) -> dict[str, Tensor]:
    """Train from seed 0, or from the checkpoint on, and return parameters, buffers and the history's loss."""
    pyro.settings.set(module_local_params=local)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float64)
    net = nn.Sequential(nn.Linear(1, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 1))
    bnn = ps.BayesianModule(net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = bnn(x).squeeze(-1)
        with pyro.plate("data", 24, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)

    guide = ps.MeanFieldNormal(model, init_scale=0.05)
    svi = SVI(model, guide, OPTIMISERS[optim](), loss=Loss(after_step, ascent, split))
    keep = checkpoint and Checkpoint(checkpoint, every=every)
    loader = DataLoader(Jittered(), batch_size=5, shuffle=True)
    callbacks = [each for each in (anneal, after_epoch) if each]
    unseen = torch.linspace(-1, 2, 7)[:, None]
    batch = (unseen, unseen[:, 0].sin() / 3) if validate else None
    history = ps.fit(svi, loader, epochs, progress=False, checkpoint=keep, callbacks=callbacks, validation=batch)
    found = guide.named_parameters() if local else pyro.get_param_store().named_parameters()
    named = {name: param.detach() for name, param in found}
    named.update({name: buffer.detach() for name, buffer in net.named_buffers()})
    return {
        **named,
        "history": torch.tensor(history["loss"]),
        "data": torch.tensor(history["data"]),
        "kl": torch.tensor(history["kl"]),
        "grad_norm": torch.tensor(history["grad_norm"]),
        "lr": torch.tensor(history["lr"]),
        **({"validation": torch.tensor(history["validation"])} if validate else {}),
    }


class Loss(ps.SAM_ELBO):
    """MixSAM that calls a function in the middle of every step, and may tell shares of the loss as its terms."""

    def __init__(self, after_step: Any, ascent: Any, split: Any) -> None:
        super().__init__(ps.MixSAM(rho=0.5), ascent=ascent)
        self._after_step, self._split = after_step, split

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
        loss = super().loss_and_grads(*args, **kwargs)
        self._last_terms = self._split and tuple(torch.tensor(share * loss) for share in self._split)
        if self._after_step is not None:
            self._after_step()
        return loss


def killed(checkpoint: Any, epochs: int, steps: int, delay: float) -> None:
    """Train, and be killed ``delay`` seconds into a step: at a moment that no line of it chooses."""
    count = 0

    def start() -> None:
        nonlocal count
        count += 1
        if count == steps:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    train(checkpoint, epochs, after_step=start)
