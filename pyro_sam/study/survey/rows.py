"""The rows of a data set of the study, before a seed draws from them."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_sam.study.catalogue import CATALOGUE, Spec
from pyro_sam.study.datasets import Dataset, split
from pyro_sam.study.sources import fetch, local
from pyro_sam.study.tables import Table

_WAVE_ROWS, _FOREIGN_ROWS = 4000, 1000
_WRONG_LABELS = 1_000_000  # the first of the seeds of wrong labels
_URL = "https://www.cs.toronto.edu/~kriz/cifar.html"


def wave(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return mean and standard deviation of a curve whose noise grows along it.

    .. math:: \mu(x) = \sin 2x, \qquad \sigma(x) = e^{0.75 x - 2}
    """
    return torch.sin(2 * x), torch.exp(0.75 * x - 2)


def _wave() -> Table:
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(_WAVE_ROWS, generator=generator, dtype=torch.double) - 2
    mean, scale = wave(x)
    y = mean + scale * torch.randn(_WAVE_ROWS, generator=generator, dtype=torch.double)
    return Table(x[:, None].numpy(), y.numpy(), "the wave's inputs", "the wave's targets")


# fmt: off
def _cifar(name: str, summary: str, archive: str) -> Spec:
    return Spec(name, "classification", summary, num_classes=10, features=3072, image=True, npz=(archive, ""), url=_URL)


SPECS: dict[str, Spec] = CATALOGUE | {spec.name: spec for spec in (
    Spec("wave", "regression", "a curve made by a seed, its noise grows with x", features=1, bundled=_wave,
         package="pyro-sam"),
    _cifar("cifar10", "60000 photographs, 32x32 in colour, 10 classes", "cifar10.npz"),
    _cifar("cifar10-subset", "some photographs of CIFAR-10", "cifar10_subset.npz"),
)}
# fmt: on


@cache
def rows(base: str, seed: int, data_dir: Path | None) -> Dataset:
    """Return the split of a data set that belongs to a seed.

    Args:
        base: Name of the data set.
        seed: Picks the split.
        data_dir: Folder with data files.
    Raises:
        DataError: If the data cannot be had or used.
    """
    return split(SPECS[base], *fetch(SPECS[base], seed, data_dir), seed)


@cache  # the same tensors at each call
def of_classes(dataset: Dataset, classes: tuple[int, ...]) -> Dataset:
    """Return the rows of some classes; their labels are their places in ``classes``."""
    places = torch.full((int(max(dataset.num_classes or 0, *classes)) + 1,), -1)
    places[list(classes)] = torch.arange(len(classes))
    train, test = (places[labels] for labels in (dataset.y_train, dataset.y_test))
    return replace(
        dataset,
        x_train=dataset.x_train[train >= 0],
        y_train=train[train >= 0],
        x_test=dataset.x_test[test >= 0],
        y_test=test[test >= 0],
        num_classes=len(classes),
    )


def with_wrong_labels(dataset: Dataset, share: float, seed: int) -> Dataset:
    """Return the data set with a share of the training labels replaced by other classes, each equally likely.

    Args:
        dataset: A classification.
        share: Share of the training rows, rounded to whole ones.
        seed: Decides which rows, and their labels.
    """
    # not the seed itself: that draws the rows held out, which would then be the wrong ones
    generator, number = torch.Generator().manual_seed(_WRONG_LABELS + seed), dataset.num_classes or 0
    wrong = torch.randperm(len(dataset.y_train), generator=generator)[: round(share * len(dataset.y_train))]
    labels = dataset.y_train.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, number, wrong.shape, generator=generator)) % number
    return replace(dataset, y_train=labels)


@cache
def foreign(base: str, data_dir: Path | None) -> Tensor | None:
    """Return some test images of a data set, from 0 to 1, where files hold them; else None."""
    found = local(SPECS[base], 0, data_dir)
    if found is None:
        return None
    images = torch.tensor(np.asarray(found[0][-1].x[:_FOREIGN_ROWS]), dtype=torch.float32)
    return (images - images.min()) / (images.max() - images.min())
