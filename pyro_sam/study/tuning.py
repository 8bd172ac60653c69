"""Settings chosen on rows held out of the training part: ``pyro-sam tune``, and ``pyro-sam compare --tune``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer import SVI
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import pyro_sam as ps
from pyro_sam.study.begun import checksum, key, search
from pyro_sam.study.datasets import Dataset
from pyro_sam.study.methods import METHODS, Method
from pyro_sam.study.network import bayesian_mlp
from pyro_sam.study.settings import Settings

HELD_OUT = 0.2  # share of the training rows
_SAMPLES_AT_ONCE = 8


@dataclass(frozen=True)
class Choice:
    """What was chosen for one method.

    Args:
        settings: The comparison's settings with the chosen numbers in their places.
        best: The chosen numbers by name.
        table: A row for each trial, the best first.
    """

    settings: Settings
    best: dict[str, float]
    table: list[dict[str, Any]]


def space(method: Method) -> dict[str, Any]:
    """Return what is searched: the KL's weight, and the law's number where it is no matter of the guide's scale."""
    from optuna.distributions import FloatDistribution

    found = {"kl_weight": FloatDistribution(1e-3, 1.0, log=True)}
    if method.name == "ascended":
        found["alpha"] = FloatDistribution(0.0, 20.0)
    elif method.rho is not None and method.guide != "radius":
        found["rho"] = FloatDistribution(method.rho / 10, 10 * method.rho, log=True)
    return found


def with_numbers(settings: Settings, method: str, numbers: Mapping[str, Any]) -> Settings:
    """Return settings with a trial's numbers, or with vectors of several trials' numbers, in their places."""
    named = dict(numbers)
    rho = {method: named.pop("rho")} if "rho" in named else {}
    return replace(settings, rho={**settings.rho, **rho}, **named)


def held_out(dataset: Dataset, seed: int) -> tuple[Dataset, tuple[torch.Tensor, torch.Tensor]]:
    """Return the data set with fewer training rows, and the rows that were taken; test rows have no part."""
    order = torch.randperm(len(dataset.x_train), generator=torch.Generator().manual_seed(seed))
    number = max(1, round(HELD_OUT * len(order)))
    out, kept = order[:number].to(dataset.x_train.device), order[number:].to(dataset.x_train.device)
    x, y = dataset.x_train, dataset.y_train
    return replace(dataset, x_train=x[kept], y_train=y[kept]), (x[out], y[out])


def choose(
    dataset: Dataset,
    method: str,
    settings: Settings,
    *,
    trials: int,
    journal: Path,
    seed: int = 0,
    progress: bool = True,
) -> Choice:
    """Choose a method's settings by validation NLL.

    Args:
        dataset: A split; a fifth of its training rows validates.
        method: Name of the method.
        settings: What is not searched, and the budget of a trial.
        trials: Number of trials in all.
        journal: File of the search, which a killed one goes on from, and which processes may share.
        seed: Picks the rows that validate.
        progress: Whether to show a bar.
    Raises:
        ValueError: If the file is of another search, or no trial ended with a finite NLL.
        OutputError: If it is of a search with other settings, or on other data.
    """
    dataset = dataset.to(torch.device(settings.device))
    rest, validation = held_out(dataset, seed)
    law, wanted = METHODS[method], space(METHODS[method])
    epochs = max(1, settings.epochs // law.cost(settings))
    search(journal, _begun_with(rest, validation, law, settings))
    tuned = ps.tune(
        partial(_build, rest, law, settings, epochs),
        wanted,
        DataLoader(TensorDataset(rest.x_train, rest.y_train), batch_size=settings.batch_size, shuffle=True),
        ps.Validation(validation, samples_at_once=_SAMPLES_AT_ONCE),
        num_trials=trials,
        num_epochs=epochs,
        study=journal,
        progress=progress,
    )
    return Choice(with_numbers(settings, method, tuned.best), tuned.best, tuned.table)


def _begun_with(
    dataset: Dataset, validation: tuple[torch.Tensor, torch.Tensor], method: Method, settings: Settings
) -> dict[str, Any]:
    """Return what decides a trial but for what is searched; the number of epochs is known to the search itself."""
    no_part = {"epochs", "rho", "num_samples", "curve_points", "device", "threads", *space(method)}
    no_part |= {name for name, owner in (("kappa", "mix-sam"), ("alpha", "ascended")) if method.name != owner}
    if method.guide != "learnt":
        no_part.add("init_scale")
    kept = {name: value for name, value in asdict(settings).items() if name not in no_part}
    if "rho" not in space(method):
        kept["rho"] = settings.rho.get(method.name)
    return key(checksum(dataset.x_train, dataset.y_train, *validation), kept)


def choose_all(
    dataset: Dataset, methods: Sequence[str], settings: Settings, trials: int, out: Path, say: Callable[[str], None]
) -> dict[str, Choice]:
    """Return what is chosen for each method, and tell of each."""
    found = {}
    for method in methods:
        choice = choose(dataset, method, settings, trials=trials, journal=out / f"tune-{method}.log")
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in choice.best.items())
        say(f"{method}: {numbers}; validation NLL {choice.table[0]['nll']:.4f} at epoch {choice.table[0]['epoch']}")
        found[method] = choice
    return found


def _build(dataset: Dataset, method: Method, settings: Settings, epochs: int, numbers: Mapping[str, Any]) -> SVI:
    settings = with_numbers(settings, method.name, numbers)
    model = bayesian_mlp(dataset, settings)
    guide = ps.MeanFieldNormal(
        model,
        init_scale=method.init_scale(settings),
        learn_scale=method.guide == "learnt",
        num_replicas=len(numbers["kl_weight"]),
    )
    optimiser = ps.optim.JointOptim(
        torch.optim.Adam,
        {"lr": settings.lr},
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, epochs, eta_min=settings.lr / 10),
    )
    elbo = ps.SAM_ELBO(method.perturbation(settings), kl_weight=settings.kl_weight)
    return SVI(model, guide, optimiser, loss=elbo)
