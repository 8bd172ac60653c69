"""The data sets of the study: rows to train on and rows held out, drawn by a seed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pyro_sam.study.begun import checksum
from pyro_sam.study.catalogue import Task
from pyro_sam.study.datasets import Dataset
from pyro_sam.study.survey.rows import SPECS, foreign, of_classes, rows, with_wrong_labels

HeldOut = Literal["validation", "test"]
TUNING_SEED = 100  # the first of the tuning splits
_PUBLISHED = 20  # splits of the UCI sets; the last ones are for tuning
_IMAGES = {"digits": (8, 8, 1), **dict.fromkeys(("mnist", "mnist-5k", "fashion-mnist"), (28, 28, 1)),
           **dict.fromkeys(("cifar10", "cifar10-subset"), (32, 32, 3))}  # fmt: skip
_AT_ONCE, _WIDE = {"lenet": 1, "resnet20": 1, "resnet18": 1, "transformer": 8}, 100
_SIDE_BY_SIDE = {"lenet": 16, "resnet20": 4, "resnet18": 2, "transformer": 32}
_FOREIGN = {"mnist": "fashion-mnist", "mnist-5k": "fashion-mnist", "fashion-mnist": "mnist"}


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
        label_noise: Share of the labels that are wrong, of training and validation rows; those of test rows are right.
        classes: Classes that are kept, numbered anew; None for all.
        own_noise: Whether the network gives a second output, the logarithm of a regression's noise.
    """

    name: str
    base: str
    gradients: int = 3000
    rows: int | None = None
    validation: float = 0.25
    batch_size: int = 32
    network: str = "mlp"
    hidden: tuple[int, ...] = (50, 50)
    label_noise: float = 0.0
    classes: tuple[int, ...] | None = None
    own_noise: bool = False

    @property
    def task(self) -> Task:
        """``"classification"`` or ``"regression"``."""
        return SPECS[self.base].task

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for regression."""
        return len(self.classes) if self.classes else SPECS[self.base].num_classes

    @property
    def num_outputs(self) -> int:
        """Number of the network's outputs."""
        return self.num_classes or 1 + self.own_noise

    @property
    def image(self) -> tuple[int, int, int] | None:
        """Height, width and channels of the inputs, which lie flat in this order; None if they are no images."""
        return _IMAGES.get(self.base)

    @property
    def side_by_side(self) -> int:
        """Largest number of runs that are trained together."""
        return _SIDE_BY_SIDE.get(self.network, 64)

    @property
    def at_once(self) -> int:
        """Largest number of weight samples that run together: large networks gain nothing, and need the memory."""
        return 1 if max(self.hidden) > _WIDE else _AT_ONCE.get(self.network, 64)


_ALL = (
    Source("digits-120", "digits", rows=120, validation=400),
    Source("breast-cancer", "breast-cancer"),
    Source("diabetes", "diabetes"),
    Source("digits", "digits", gradients=6000, batch_size=64),
    Source("digits-sequence", "digits", gradients=6000, batch_size=64, network="transformer"),
    Source("digits-noise-20", "digits", gradients=6000, batch_size=64, label_noise=0.2),
    Source("digits-noise-40", "digits", gradients=6000, batch_size=64, label_noise=0.4),
    Source("digits-tuned", "digits", rows=50, validation=200, batch_size=25, network="tuned_mlp",
           classes=(0, 1, 2, 3, 4)),
    Source("wave", "wave", rows=200, validation=1000, own_noise=True),
    Source("mnist-800", "mnist", rows=800, validation=2000),
    Source("mnist-1000", "mnist", rows=1000, validation=2000),
    Source("fashion-800", "fashion-mnist", rows=800, validation=2000),
    Source("mnist-5k", "mnist-5k", gradients=8000, batch_size=64),
    Source("fashion-5k", "fashion-mnist", gradients=8000, rows=5000, validation=2000, batch_size=64),
    Source("mnist", "mnist", gradients=20_000, validation=1 / 12, batch_size=128, hidden=(400, 400)),
    Source("mnist-2000-lenet", "mnist", gradients=4000, rows=2000, validation=2000, batch_size=64, network="lenet"),
    Source("mnist-5k-lenet", "mnist-5k", gradients=8000, batch_size=64, network="lenet"),
    Source("cifar-4000", "cifar10-subset", gradients=4000, network="resnet20"),
    Source("cifar", "cifar10", gradients=40_000, batch_size=128, network="resnet20"),
    Source("cifar-resnet18", "cifar10", gradients=16_000, batch_size=128, network="resnet18"),
    *(Source(name, name, hidden=(50,)) for name in ("boston", "concrete", "energy", "power-plant", "wine", "yacht")),
)  # fmt: skip
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
        outliers: Foreign inputs by name, shape ``(k, d)``.
        before: Inputs and labels of the classes left out, which a network may have been trained on before.
    """

    x: Tensor
    y: Tensor
    x_out: Tensor
    y_out: Tensor
    log_unit: float
    outliers: Mapping[str, Tensor] = field(default_factory=dict)
    before: tuple[Tensor, Tensor] | None = None

    def checksum(self) -> str:
        """Return a checksum of its rows."""
        return checksum(self.x, self.y, self.x_out, self.y_out)

    def to(self, device: str) -> "Problem":
        """Return it on a device."""
        outliers = {name: each.to(device) for name, each in self.outliers.items()}
        before = self.before and (self.before[0].to(device), self.before[1].to(device))
        x, y, x_out, y_out = (each.to(device) for each in (self.x, self.y, self.x_out, self.y_out))
        return Problem(x, y, x_out, y_out, self.log_unit, outliers, before)


@dataclass(frozen=True)
class Draws:
    """Problems by seed.

    Args:
        source: The data set.
        data_dir: Folder with data files.
        test_rows: Largest number of test rows.
        device: Where the problems are.
    """

    source: Source
    data_dir: Path | None = None
    test_rows: int = 2000
    device: str = "cpu"

    def tuning(self, number: int) -> list[Problem]:
        """Return so many tuning splits, which hold out validation rows; test rows have no part."""
        return [self._draw(TUNING_SEED + k, "validation") for k in range(number)]

    def final(self, number: int) -> list[Problem]:
        """Return the problems of so many seeds, which hold out test rows."""
        return [self._draw(seed, "test") for seed in range(number)]

    def checksum(self) -> str:
        """Return a checksum of the first seed's rows, by which data of one name are told apart."""
        return self.final(1)[0].checksum()

    def _draw(self, seed: int, held_out: HeldOut) -> Problem:
        whole, source = rows(self.source.base, self._split(seed), self.data_dir), self.source
        dataset = self._dataset(whole, self._split(seed))
        order = torch.randperm(len(dataset.x_train), generator=torch.Generator().manual_seed(seed))
        validation = int(source.validation if source.rows else source.validation * len(order))
        if held_out == "validation":
            out, order = order[:validation], order[validation:]
            x_out, y_out = dataset.x_train[out], dataset.y_train[out]
        else:
            x_out, y_out = dataset.x_test[: self.test_rows], dataset.y_test[: self.test_rows]
        x, y = (_taken(each, order[: source.rows]) for each in (dataset.x_train, dataset.y_train))
        others = self._left_out(whole)
        outliers = self._outliers(whole, others) if held_out == "test" else {}
        before = (others.x_train, others.y_train) if others else None
        return Problem(x, y, x_out, y_out, math.log(dataset.y_scale), outliers, before).to(self.device)

    def _dataset(self, whole: Dataset, split: int) -> Dataset:
        source = self.source
        dataset = of_classes(whole, source.classes) if source.classes else whole
        return with_wrong_labels(dataset, source.label_noise, split) if source.label_noise else dataset

    def _left_out(self, whole: Dataset) -> Dataset | None:
        """Return the rows of the classes left out."""
        kept = self.source.classes
        if kept is None:
            return None
        return of_classes(whole, tuple(k for k in range(whole.num_classes or 0) if k not in kept))

    def _outliers(self, whole: Dataset, others: Dataset | None) -> dict[str, Tensor]:
        """Return test images of the classes left out, or of another data set, put on the same range of values."""
        if others is not None:
            return {"classes": others.x_test}
        name = _FOREIGN.get(self.source.base)
        images = foreign(name, self.data_dir) if name else None
        if name is None or images is None:
            return {}
        low, high = whole.x_train.min(), whole.x_train.max()
        return {name: low + (high - low) * images}

    def _split(self, seed: int) -> int:
        """Return the split of a seed: subsets share one, so that no tuning split sees a test row."""
        spec = SPECS[self.source.base]
        if self.source.rows is not None or spec.published_split:
            return 0
        published = spec.task == "regression" and spec.bundled is None
        return _PUBLISHED - 1 - (seed - TUNING_SEED) if published and seed >= TUNING_SEED else seed


def _taken(values: Tensor, chosen: Tensor) -> Tensor:
    """Return rows; all of them are no copy, in whatever order they were asked for."""
    return values if len(chosen) == len(values) else values[chosen]
