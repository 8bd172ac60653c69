"""The data sets of the study: rows to train on and rows held out, drawn by a seed."""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pyro_sam.study.catalogue import CATALOGUE, Task
from pyro_sam.study.datasets import Dataset, load

HeldOut = Literal["validation", "test"]
TUNING_SEED = 100  # the first of the tuning splits
_IMAGES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "mnist-5k": (28, 28, 1), "fashion-mnist": (28, 28, 1)}
_PUBLISHED = 20  # splits of the UCI sets; the last ones are for tuning


@dataclass(frozen=True)
class Source:
    """A data set of the study.

    Args:
        name: Name on the command line.
        base: Name in the catalogue of data sets.
        gradients: Budget of a run.
        rows: Number of training rows, drawn by the seed; None for all of a split.
        validation: Number of training rows that a tuning split holds out; with ``rows`` None a share of them.
        batch_size: Rows in a minibatch.
        network: Name of the network, one of :data:`~pyro_sam.study.survey.networks.NETWORKS`.
        hidden: Widths of the hidden layers of an MLP.
    """

    name: str
    base: str
    gradients: int = 3000
    rows: int | None = None
    validation: float = 0.25
    batch_size: int = 32
    network: str = "mlp"
    hidden: tuple[int, ...] = (50, 50)

    @property
    def task(self) -> Task:
        """``"classification"`` or ``"regression"``."""
        return CATALOGUE[self.base].task

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for regression."""
        return CATALOGUE[self.base].num_classes

    @property
    def num_outputs(self) -> int:
        """Number of the network's outputs."""
        return self.num_classes or 1

    @property
    def image(self) -> tuple[int, int, int]:
        """Height, width and channels of the inputs, which lie flat in this order."""
        return _IMAGES[self.base]


_ALL = (
    Source("digits-120", "digits", rows=120, validation=400),
    Source("breast-cancer", "breast-cancer"),
    Source("diabetes", "diabetes"),
    Source("digits", "digits", gradients=6000, batch_size=64),
    Source("mnist-800", "mnist", rows=800, validation=2000),
    Source("fashion-800", "fashion-mnist", rows=800, validation=2000),
    Source("mnist-5k", "mnist-5k", gradients=8000, batch_size=64),
    *(Source(name, name, hidden=(50,)) for name in ("boston", "concrete", "energy", "power-plant", "wine", "yacht")),
)
SOURCES: dict[str, Source] = {source.name: source for source in _ALL}


@dataclass(frozen=True)
class Problem:
    """Rows to train on and rows held out.

    Args:
        x: Training inputs, shape ``(n, d)``.
        y: Labels or standardised targets, shape ``(n,)``.
        x_out: Inputs of the rows held out, shape ``(m, d)``.
        y_out: Their labels or targets.
        log_unit: Logarithm of the targets' unit, which turns a density of standardised targets into one of targets.
    """

    x: Tensor
    y: Tensor
    x_out: Tensor
    y_out: Tensor
    log_unit: float


@dataclass(frozen=True)
class Draws:
    """Problems by seed.

    Args:
        source: The data set.
        data_dir: Folder with data files.
        test_rows: Largest number of test rows.
    """

    source: Source
    data_dir: Path | None = None
    test_rows: int = 2000

    def tuning(self, number: int) -> list[Problem]:
        """Return so many tuning splits, which hold out validation rows; test rows have no part."""
        return [self._draw(TUNING_SEED + k, "validation") for k in range(number)]

    def final(self, number: int) -> list[Problem]:
        """Return the problems of so many seeds, which hold out test rows."""
        return [self._draw(seed, "test") for seed in range(number)]

    def _draw(self, seed: int, held_out: HeldOut) -> Problem:
        dataset, source = _dataset(self._split(seed), self.source.base, self.data_dir), self.source
        order = torch.randperm(len(dataset.x_train), generator=torch.Generator().manual_seed(seed))
        validation = int(source.validation if source.rows else source.validation * len(order))
        if held_out == "validation":
            out, order = order[:validation], order[validation:]
            x_out, y_out = dataset.x_train[out], dataset.y_train[out]
        else:
            x_out, y_out = dataset.x_test[: self.test_rows], dataset.y_test[: self.test_rows]
        rows = order[: source.rows]
        return Problem(dataset.x_train[rows], dataset.y_train[rows], x_out, y_out, math.log(dataset.y_scale))

    def _split(self, seed: int) -> int:
        """Return the split of a seed: subsets share one, so that no tuning split sees a test row."""
        if self.source.rows is not None:
            return 0
        spec = CATALOGUE[self.source.base]
        published = spec.task == "regression" and spec.bundled is None
        return _PUBLISHED - 1 - (seed - TUNING_SEED) if published and seed >= TUNING_SEED else seed


@cache
def _dataset(split: int, base: str, data_dir: Path | None) -> Dataset:
    return load(base, split, data_dir)
