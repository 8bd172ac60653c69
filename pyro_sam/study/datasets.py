"""Data sets as tensors: split by the seed, and standardised by the training part."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_sam.study.catalogue import CATALOGUE, Spec, Task
from pyro_sam.study.sources import Tables, fetch
from pyro_sam.study.tables import Array, DataError, Table

_TEST_FRACTION = {"classification": 0.2, "regression": 0.1}


@dataclass(frozen=True)
class Dataset:
    """One split of one data set, ready to learn from.

    Args:
        name: Name on the command line.
        task: ``"classification"`` or ``"regression"``.
        x_train: Standardised inputs, shape ``(n, d)``.
        y_train: Labels (int64) or standardised targets, shape ``(n,)``.
        x_test: Inputs, standardised by the training part, shape ``(m, d)``.
        y_test: Labels, or targets in the standardised units of ``y_train``, shape ``(m,)``.
        num_classes: Number of classes; None for regression.
        y_loc: Mean of the training targets, in their own units; 0 for classification.
        y_scale: Standard deviation of the training targets, in their own units; 1 for classification.
        source: Where the rows came from.
    """

    name: str
    task: Task
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int | None
    y_loc: float
    y_scale: float
    source: str

    def to(self, device: torch.device) -> "Dataset":
        """Return the same data on ``device``."""
        tensors = {name: getattr(self, name).to(device) for name in ("x_train", "y_train", "x_test", "y_test")}
        return Dataset(**{**vars(self), **tensors})


def load_splits(name: str, seeds: Sequence[int], data_dir: Path | None = None) -> dict[int, Dataset]:
    """Return :func:`load` of each seed; a data set with one published split is read once.

    Raises:
        DataError: As :func:`load`.
    """
    splits: dict[int, Dataset] = {}
    for seed in seeds:
        once = splits and CATALOGUE[name].published_split
        splits[seed] = splits[seeds[0]] if once else load(name, seed, data_dir)
    return splits


def load(name: str, seed: int = 0, data_dir: Path | None = None) -> Dataset:
    """Return the split of a data set that belongs to a seed.

    Args:
        name: Name in the catalogue, for example ``"digits"``.
        seed: Non-negative; equal seeds give equal splits. MNIST and Fashion-MNIST have one split, the published one.
        data_dir: Folder to look for files in.
    Returns:
        The data, float32 on the CPU.
    Raises:
        DataError: If the name is unknown, or the data cannot be had or used.
    """
    if name not in CATALOGUE:
        raise DataError(f"the data set must be one of {', '.join(CATALOGUE)}, got {name!r}.")
    spec = CATALOGUE[name]
    return split(spec, *fetch(spec, seed, data_dir), seed)


def split(spec: Spec, tables: Tables, source: str, seed: int) -> Dataset:
    """Return tables as a data set: one is split by the seed, of two the second is for testing.

    Raises:
        DataError: If there are too few rows to split.
    """
    train, test = tables if len(tables) == 2 else _split(spec, tables[0], seed)
    x_loc, x_scale = _moments(train.x, common=spec.image)
    y_loc, y_scale = _moments(train.y, common=True) if spec.task == "regression" else (0.0, 1.0)

    def tensors(table: Table) -> tuple[Tensor, Tensor]:
        x = torch.tensor((table.x - x_loc) / x_scale, dtype=torch.float32)
        if spec.task == "classification":
            return x, torch.tensor(table.y, dtype=torch.int64)
        return x, torch.tensor((table.y - y_loc) / y_scale, dtype=torch.float32)

    parts = (*tensors(train), *tensors(test))
    return Dataset(spec.name, spec.task, *parts, spec.num_classes, float(y_loc), float(y_scale), source)


def _split(spec: Spec, table: Table, seed: int) -> tuple[Table, Table]:
    from sklearn.model_selection import train_test_split

    fraction = _TEST_FRACTION[spec.task]
    labels = table.y if spec.task == "classification" else None
    try:
        index = np.arange(len(table.x))
        train, test = train_test_split(index, test_size=fraction, random_state=seed, stratify=labels)
    except ValueError as error:
        raise DataError(f"{table.x_name} cannot be split into training and test rows: {error}") from error
    return table.rows(train), table.rows(test)


def _moments(values: Array, common: bool) -> tuple[Any, Any]:
    """Return mean and standard deviation, of each column or of all; a constant column keeps its unit."""
    axis = None if common else 0
    loc, scale = np.mean(values, axis), np.std(values, axis)
    return loc, np.where(scale > 0, scale, 1.0)
