import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pyro_sam.study.survey.statistics import differences, mean_and_error, passes, verdicts
from pyro_sam.study.survey.tables import curves, report, results, sensitivity, summary


def runs(data: str = "digits-120", **numbers: list[Any]) -> list[Any]:
    about = {"data": data, "settings": {"lr": 0.1}, "validation": 0.5}
    return [
        {**about, "method": method.replace("_", "-"), "seed": seed, "metrics": {"nll": value}}
        for method, values in numbers.items()
        for seed, value in enumerate(values)
    ]


MFVI, MAP, SAM = [0.30, 0.35, 0.28, 0.40, 0.33], [0.28, 0.36, 0.24, 0.35, 0.30], [0.5, 0.4, 0.6, 0.5, 0.7]


def test_a_difference_is_scipys_paired_test() -> None:
    found = differences(runs(mfvi=MFVI, map=MAP), "digits-120")["map"]
    paired = np.array(MAP) - np.array(MFVI)
    assert found.p == pytest.approx(stats.ttest_rel(MAP, MFVI).pvalue)
    # by hand: t of the differences with n - 1 degrees of freedom
    t = paired.mean() / (paired.std(ddof=1) / math.sqrt(5))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 4))
    assert (found.mean, found.error) == pytest.approx((paired.mean(), stats.sem(paired)))


def test_holm_multiplies_the_smallest_by_the_number_of_tests() -> None:
    found = differences(runs(mfvi=MFVI, map=MAP, sam=SAM), "digits-120")
    small, large = sorted(found.values(), key=lambda each: each.p)
    assert small.holm == pytest.approx(2 * small.p)
    assert large.holm == pytest.approx(max(2 * small.p, large.p))


def test_runs_are_paired_by_seed_not_by_order() -> None:
    rows = runs(mfvi=MFVI, map=MAP)
    assert differences(rows[::-1], "digits-120") == differences(rows, "digits-120")


def test_a_method_with_a_lost_run_is_left_out() -> None:
    rows = runs(mfvi=MFVI, map=[*MAP[:-1], None])
    assert differences(rows, "digits-120") == {}


def test_surely_means_two_standard_errors() -> None:
    rows = runs(mfvi=[0.0] * 4, map=[1.0, 1.1, 0.9, 1.0], sam=[-1.0, -1.1, -0.9, -1.0], asam=[1.0, -1.0, 1.0, -0.5])
    assert verdicts(rows) == {"map": {"digits-120": 1}, "sam": {"digits-120": -1}, "asam": {"digits-120": 0}}


@pytest.mark.parametrize(
    ("verdict", "answer"),
    [((-1, -1, 0, 0), True), ((-1, 0, 0, 0), False), ((-1, -1, -1, 1), False), ((-1, -1, -1), False)],
)
def test_a_default_is_nowhere_worse_and_on_half_better(verdict: tuple[int, ...], answer: bool) -> None:
    data = ["a", "b", "c", "d"]
    assert passes(dict(zip(data, verdict, strict=False)), data) is answer


def test_mean_and_standard_error() -> None:
    assert mean_and_error(MFVI) == pytest.approx((np.mean(MFVI), stats.sem(MFVI)))
    assert math.isnan(mean_and_error([1.0])[1])


def test_a_failed_method_is_in_the_table() -> None:
    rows = [*runs(mfvi=MFVI), {"data": "digits-120", "method": "map", "seed": 0, "failed": "no trial"}]
    assert "| map" in report(rows)
    assert "failed" in report(rows)


def test_a_method_that_is_less_accurate_than_sam_is_named() -> None:
    rows = runs(mfvi=MFVI, map=MAP, sam=SAM)
    for row in rows:
        row["metrics"]["accuracy"] = {"map": 0.8, "sam": 0.9, "mfvi": 0.9}[row["method"]] + 0.01 * row["seed"]
    line = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in summary(rows).splitlines()}
    assert (line["map"], line["sam"]) == ("digits-120", "")


@pytest.mark.parametrize(("setting", "base", "other"), [("alpha", 0.0, 3.0), ("lr", 0.1, 0.01)])
def test_values_of_a_setting_are_paired_with_zero_or_the_best(setting: str, base: float, other: float) -> None:
    # of alpha the zero is worse, and the base all the same; of the learning rate the better one is the base
    good, bad = (MAP, MFVI) if np.mean(MAP) < np.mean(MFVI) else (MFVI, MAP)
    numbers = {base: bad, other: good} if setting == "alpha" else {base: good, other: bad}
    about = {"data": "digits-120", "method": "ascended", "setting": setting}
    rows = [
        {**about, "value": value, "seed": seed, "metrics": {"nll": nll}}
        for value, each in numbers.items()
        for seed, nll in enumerate(each)
    ]
    paired = np.array(numbers[other]) - np.array(numbers[base])
    elsewhere = [{**row, "setting": "kappa", "metrics": {"nll": 9.0}} for row in rows]
    head, _, line = sensitivity([*elsewhere, *rows], setting).splitlines()
    cells = dict(zip(*([cell.strip() for cell in each.split("|")[3:-1]] for each in (head, line)), strict=True))
    assert cells[f"{other:g}"] == f"{paired.mean():+.3f} ± {stats.sem(paired):.3f}"
    assert cells[f"{base:g}"].startswith(f"{np.mean(numbers[base]):.3f} ±")


def test_curves_are_aligned_by_gradients() -> None:
    # two gradients a step: half as many points, and one of them rounded
    rows = [
        {"data": "digits-120", "method": "mfvi", "seed": 0, "curve": [[1, 0.9], [2, 0.8], [3, 0.7], [4, 0.6]]},
        {"data": "digits-120", "method": "mfvi", "seed": 1, "curve": [[1, 0.7], [2, 0.6], [3, 0.5], [4, None]]},
        {"data": "digits-120", "method": "ascended", "seed": 0, "curve": [[2, 0.3], [5, 0.2]]},
        {"data": "digits-120", "method": "mfvi-twice", "seed": 0, "curve": [[8, 0.1]]},
    ]
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in curves(rows, "digits-120").splitlines()]
    assert found[0] == ["NLL after", "1", "2", "3", "4"]
    assert found[2:] == [["mfvi", "0.800", "0.700", "0.600", "nan"], ["ascended", "", "0.300", "", "0.200"]]


def test_a_single_run_has_no_error() -> None:
    line = results(runs(mfvi=MFVI[:1]), "digits-120").splitlines()[2]
    assert line.split("|")[2].strip() == "0.300"
