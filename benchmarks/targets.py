"""What the estimator should cost, as ratios of what was measured."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measure import Figures, Timing
from benchmarks.scaling import LOOPED, VECTORISED, Sweep

Results = Mapping[str, Mapping[str, tuple[Timing, Figures]]]  # by case and contender

MLPS = ("2x64", "784-400-400-10", "8x64")
ALL = ("2x64", "784-400-400-10", "LeNet-5", "8x64", "regression", "LSTM")
ADVERSARIAL, HAND = "Adversarial, JointOptim", "hand-written adversarial, flat"


@dataclass(frozen=True)
class Ratio:
    """A figure of one contender over that of another one.

    Args:
        name: What is compared.
        case: Where.
        target: Largest value wanted.
        measured: The value found.
    """

    name: str
    case: str
    target: float
    measured: float

    @property
    def met(self) -> bool:
        """Whether the value is as wanted."""
        return self.measured <= self.target


# time of the first over time of the second: largest value wanted, and where
TIMES: list[tuple[str, str, float, Sequence[str]]] = [
    (ADVERSARIAL, HAND, 1.15, ("784-400-400-10", "LeNet-5")),
    (ADVERSARIAL, HAND, 1.8, ("2x64", "8x64", "LSTM")),
    ("Adversarial, Pyro Adam", "Trace_ELBO, AutoNormal", 0.75, (*MLPS, "regression")),
    (ADVERSARIAL, "Trace_ELBO, AutoNormal", 0.75, (*MLPS, "regression")),
    ("Gaussian, Pyro Adam", "TraceMeanField_ELBO, MeanFieldNormal", 0.7, ALL),
    ("Gaussian, JointOptim", "TraceMeanField_ELBO, MeanFieldNormal", 0.7, ALL),
    ("MixSAM, JointOptim", ADVERSARIAL, 1.15, ALL),
    ("Adversarial previous, JointOptim", "Gaussian, JointOptim", 1.1, ALL),
    ("Adversarial compiled, JointOptim", HAND, 1.05, ALL),
]
PEAK, SYNCS, VECTORISATION = 1.15, 1.0, 0.15


def ratios(results: Results, sweeps: Sequence[Sweep]) -> Iterator[Ratio]:
    """Give every ratio whose two figures were measured."""
    for first, second, target, cases in TIMES:
        for case, found in ((case, results.get(case, {})) for case in cases):
            if first in found and second in found:
                measured = found[first][0].median / found[second][0].median
                yield Ratio(f"time: {first} / {second}", case, target, measured)
    yield from _of_figures(results)
    timings = {sweep.name: sweep.timings for sweep in sweeps}
    if LOOPED in timings and VECTORISED in timings:
        most = max(timings[LOOPED])
        measured = timings[VECTORISED][most].median / timings[LOOPED][most].median
        yield Ratio(f"time: {most} particles, vectorised / looped", "2x64", VECTORISATION, measured)


def _of_figures(results: Results) -> Iterator[Ratio]:
    for case, found in results.items():
        if ADVERSARIAL not in found:
            continue
        figures = found[ADVERSARIAL][1]
        if HAND in found:
            yield Ratio(f"peak memory: {ADVERSARIAL} / {HAND}", case, PEAK, figures.peak / found[HAND][1].peak)
        if figures.syncs is not None:
            yield Ratio(f"host synchronisations: {ADVERSARIAL}", case, SYNCS, figures.syncs)
