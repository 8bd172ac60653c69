"""How large a study is, and on what it runs."""

from dataclasses import asdict, dataclass
from typing import Any

from pyro_sam.study.begun import key
from pyro_sam.study.survey.problems import Draws, Source


@dataclass(frozen=True)
class Size:
    """A size.

    Args:
        gradients: Share of a data set's budget of gradients.
        trials: Tuning trials of a method on a data set.
        max_replicas: Trials side by side.
        finalists: Settings that are trained again on every tuning split; the best mean validation NLL is chosen.
        tuning_seeds: Number of tuning splits.
        seeds: Number of runs after tuning, each on a split of its own.
        num_samples: Weight samples of a prediction.
        points: Points of a learning curve.
        test_rows: Largest number of test rows.
        data: Data sets, by default.
        equal_budget: Gradients of a run on every data set, in the place of the data set's own; None for those.
        device: Where it runs.
        autocast: Whether training runs in bfloat16 where torch knows that to be safe.
    """

    gradients: float = 1.0
    trials: int = 64
    max_replicas: int = 32
    finalists: int = 8
    tuning_seeds: int = 5
    seeds: int = 20
    num_samples: int = 64
    points: int = 6
    test_rows: int = 2000
    data: tuple[str, ...] = ("digits-120", "breast-cancer", "diabetes", "digits")
    equal_budget: int | None = None
    device: str = "cpu"
    autocast: bool = False

    def budget(self, source: Source) -> int:
        """Return the gradients of a run on a data set."""
        return self.equal_budget or max(1, round(source.gradients * self.gradients))

    def begun_with(self, draws: Draws) -> dict[str, Any]:
        """Return what decides a run on a data set, but for its seed; a device decides nothing."""
        other = {"gradients", "equal_budget", "data", "seeds", "device"}
        kept = {name: value for name, value in asdict(self).items() if name not in other}
        return key(draws.checksum(), {"gradients": self.budget(draws.source), **kept})


SIZES = {
    "quick": Size(gradients=0.2, trials=8, finalists=3, seeds=5, points=3, data=("digits-120",)),
    "normal": Size(),
    "paper": Size(
        gradients=5.0,
        trials=128,
        seeds=20,
        num_samples=256,
        points=20,
        test_rows=10_000,
        data=(
            "digits-120",
            "breast-cancer",
            "diabetes",
            "digits",
            "mnist-5k",
            "mnist-800",
            "yacht",
            "energy",
            "concrete",
            "mnist",
            "cifar-resnet18",
        ),
    ),
}
