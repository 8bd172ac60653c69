"""A search to be shared by processes that may be killed."""

import os
import signal
import threading
import time
from typing import Any

import optuna
import pyro
import pyro.distributions as dist
import torch
from optuna.distributions import FloatDistribution
from pyro.infer import SVI
from torch import Tensor

import pyro_sam as ps
from pyro_sam.tuning.journal import journal

X = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)
TRAIN, VALIDATION = [(X, 0.5 * X)], (X, 0.4 * X)
SPACE = {"kl_weight": FloatDistribution(1e-3, 1.0, log=True), "alpha": FloatDistribution(0.0, 3.0)}


def model(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(w * x, 0.5), obs=y)


def build(settings: Any) -> SVI:
    guide = ps.MeanFieldNormal(model, num_replicas=len(settings["alpha"]))
    elbo = ps.SAM_ELBO(ps.AscendedSample(settings["alpha"]), kl_weight=settings["kl_weight"])
    return SVI(model, guide, ps.optim.JointOptim(torch.optim.Adam, {"lr": 0.05}), elbo)


def search(
    path: Any, num_trials: int, *, pause: float = 0.0, max_replicas: int = 2, patience: float = 60.0, dies: Any = None
) -> Any:
    """Search, with a pause in every epoch; it may be killed so many seconds after training has begun."""
    return ps.tune(
        build,
        SPACE,
        Paused(pause, dies),
        VALIDATION,
        num_trials=num_trials,
        num_epochs=3,
        study=path,
        max_replicas=max_replicas,
        patience=patience,
        progress=False,
    )


class Paused:
    """The training batches, after a pause; the first time they are asked for, SIGKILL may be set to come later."""

    def __init__(self, pause: float, dies: float | None) -> None:
        self._pause, self._dies = pause, dies

    def __iter__(self) -> Any:
        if self._dies is not None:
            threading.Timer(self._dies, os.kill, (os.getpid(), signal.SIGKILL)).start()
            self._dies = None
        time.sleep(self._pause)
        return iter(TRAIN)


def study_at(path: Any) -> Any:
    return optuna.load_study(study_name="tune", storage=journal(str(path)))
