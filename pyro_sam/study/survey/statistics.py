"""What runs of several seeds say together: means, paired differences, and which of them are sure."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]
BASELINE = "mfvi"


@dataclass(frozen=True)
class Difference:
    """A paired difference to the baseline.

    Args:
        mean: Mean over the seeds that both have.
        error: Its standard error.
        p: p-value of the paired t test of SciPy, two-sided.
        holm: The same after Holm's correction for all methods on the data set.
    """

    mean: float
    error: float
    p: float
    holm: float = float("nan")

    @property
    def sure(self) -> int:
        """-1 if it is below zero by more than two standard errors, 1 if above, 0 otherwise."""
        return int(np.sign(self.mean)) if abs(self.mean) > 2 * self.error else 0


def values(rows: Rows, data: str, method: str, metric: str, group: str = "metrics") -> dict[int, float]:
    """Return a metric of a method on a data set by seed; NaN where a run has none."""
    found = [row for row in rows if (row["data"], row["method"]) == (data, method)]
    numbers = {row["seed"]: (row.get(group) or {}).get(metric) for row in found}
    return {seed: float("nan") if value is None else float(value) for seed, value in numbers.items()}


def mean_and_error(numbers: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error; the latter is NaN of fewer than two numbers."""
    array = np.asarray(numbers, dtype=float)
    error = array.std(ddof=1) / len(array) ** 0.5 if len(array) > 1 else np.nan
    return float(array.mean()) if len(array) else float("nan"), float(error)


def differences(
    rows: Rows, data: str, metric: str = "nll", group: str = "metrics", baseline: str = BASELINE
) -> dict[str, Difference]:
    """Return the paired differences of all methods to the baseline, method minus baseline, with Holm's correction.

    A method with a run that has no finite number is left out.
    """
    base = values(rows, data, baseline, metric, group)
    names = dict.fromkeys(row["method"] for row in rows if row["data"] == data and row["method"] != baseline)
    raw: dict[str, Difference] = {}
    for name in names:
        found = values(rows, data, name, metric, group)
        seeds = sorted(base.keys() & found.keys())
        pairs = np.array([(found[seed], base[seed]) for seed in seeds], dtype=float)
        if len(seeds) > 1 and np.isfinite(pairs).all():
            raw[name] = _paired(pairs[:, 0], pairs[:, 1])
    return _corrected(raw)


def _paired(found: Any, base: Any) -> Difference:
    from scipy.stats import ttest_rel

    mean, error = mean_and_error(found - base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of differences that are all the same
        return Difference(mean, error, float(ttest_rel(found, base).pvalue))


def _corrected(raw: dict[str, Difference]) -> dict[str, Difference]:
    from statsmodels.stats.multitest import multipletests

    tested = [name for name, each in raw.items() if np.isfinite(each.p)]
    holm = multipletests([raw[name].p for name in tested], method="holm")[1] if tested else []
    corrected = dict(zip(tested, map(float, holm), strict=True))
    return {
        name: Difference(each.mean, each.error, each.p, corrected.get(name, float("nan"))) for name, each in raw.items()
    }


def verdicts(rows: Rows, metric: str = "nll") -> dict[str, dict[str, int]]:
    """Return by method and data set whether it is surely better than the baseline (-1), surely worse (1) or neither.

    ``metric`` is one where less is better.
    """
    found: dict[str, dict[str, int]] = {}
    for data in dict.fromkeys(row["data"] for row in rows):
        for name, difference in differences(rows, data, metric).items():
            found.setdefault(name, {})[data] = difference.sure
    return found


def passes(verdict: Mapping[str, int], data: Sequence[str]) -> bool:
    """Return whether a method is nowhere surely worse than the baseline, and on half of the data surely better."""
    complete = all(name in verdict for name in data)
    return complete and max(verdict.values()) <= 0 and 2 * sum(each < 0 for each in verdict.values()) >= len(data)
