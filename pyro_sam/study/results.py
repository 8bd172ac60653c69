"""What a comparison found: summarised, and kept on disk after every run."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from pyro_sam.study.datasets import Dataset
from pyro_sam.study.evaluate import METRICS
from pyro_sam.study.methods import METHODS
from pyro_sam.study.output import write
from pyro_sam.study.settings import Settings
from pyro_sam.study.train import Diverged, Run
from pyro_sam.training.checkpoint import versions

RESULTS = "results.json"
FIGURE = "compare.png"
TUNED = "tune.json"
TUNED_FIGURE = "tune.png"
_PACKAGES = ("scikit-learn", "mlxtend", "torchmetrics")


class Moments(TypedDict):
    """Mean and sample standard deviation (None for one run) over runs."""

    mean: float
    std: float | None
    runs: int


class Results:
    """The runs so far of one comparison.

    Args:
        datasets: The split of each seed.
        methods: Names of the methods, in the order of the table.
        settings: What they share.
        tuned: Settings of methods that have their own.
    """

    def __init__(
        self,
        datasets: Mapping[int, Dataset],
        methods: Sequence[str],
        settings: Settings,
        tuned: Mapping[str, Settings] | None = None,
    ) -> None:
        self._tuned = tuned or {}
        self.methods, self.settings = tuple(methods), settings
        self.runs: list[Run] = []
        self.stopped: dict[str, Any] | None = None
        self.seeds = tuple(datasets)
        first = next(iter(datasets.values()))
        self.name, self.task = first.name, first.task
        self._dataset = {
            "name": first.name,
            "task": first.task,
            "num_features": first.x_train.shape[1],
            "num_classes": first.num_classes,
            "splits": {
                str(seed): {"train": len(data.y_train), "test": len(data.y_test), "source": data.source}
                for seed, data in datasets.items()
            },
        }

    def settings_of(self, method: str) -> Settings:
        """Return a method's settings."""
        return self._tuned.get(method, self.settings)

    def stop(self, error: Diverged) -> None:
        """Note that a run was stopped."""
        keys = ("method", "seed", "step", "what", "last_finite_loss")
        self.stopped = {**{key: getattr(error, key) for key in keys}, "message": str(error)}

    def interrupt(self, method: str, seed: int) -> None:
        """Note that a run was interrupted."""
        what = "interrupted"
        self.stopped = {"method": method, "seed": seed, "what": what, "message": f"{method}, seed {seed}: {what}"}

    def values(self, method: str, metric: str) -> list[float]:
        """Return a metric of a method's finished runs, one value a seed."""
        return [run.metrics[metric] for run in self.runs if run.method == method]

    def summary(self) -> dict[str, dict[str, Moments]]:
        """Return mean and sample standard deviation over seeds (None for one seed) per method and metric."""
        return {
            method: {metric: _moments(self.values(method, metric)) for metric in METRICS[self.task]}
            for method in self.methods
            if any(run.method == method for run in self.runs)
        }

    def as_dict(self) -> dict[str, Any]:
        """Return all there is to know, ready for JSON."""
        shared = {**asdict(self.settings), "methods": self.methods, "seeds": self.seeds}
        return {
            "dataset": self._dataset,
            "settings": shared,
            "methods": {name: self._method(name) for name in self.methods},
            "versions": _versions(),
            "runs": [asdict(run) for run in self.runs],
            "summary": self.summary(),
            "stopped": self.stopped,
        }

    def save(self, out: Path) -> Path:
        """Write ``results.json`` whole or not at all.

        Returns:
            Its path.
        Raises:
            OutputError: If the folder cannot be written to any more; an earlier file is left as it was.
        """
        text = json.dumps(finite(self.as_dict()), indent=2, allow_nan=False)
        return write(out / RESULTS, f"{text}\n".encode())

    def _method(self, name: str) -> dict[str, Any]:
        method, settings = METHODS[name], self.settings_of(name)
        return {
            "summary": method.summary,
            "perturbation": repr(method.perturbation(settings)),
            "kl_weight": settings.kl_weight,
            "rho": method.radius(settings),
            "learn_scale": method.guide == "learnt",
            "gradients_per_step": method.cost(settings),
        }


def _moments(values: Sequence[float]) -> Moments:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "runs": len(values)}


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"platform": platform.platform(), **versions()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def finite(value: Any) -> Any:
    """Return ``value`` with None for every number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
