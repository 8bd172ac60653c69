"""The study's tables, in Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

from tabulate import tabulate

from pyro_sam.study.survey.methods import METHODS
from pyro_sam.study.survey.problems import SOURCES
from pyro_sam.study.survey.statistics import BASELINE, Rows, differences, mean_and_error, passes, values, verdicts

_METRICS = {"classification": ("accuracy", "brier", "ece"), "regression": ("rmse", "coverage")}
_MARKS = {-1: "better", 0: "-", 1: "worse"}


def data_of(rows: Rows) -> list[str]:
    """Return the data sets of runs, in the study's order."""
    present = {row["data"] for row in rows}
    return [name for name in SOURCES if name in present]


def methods_of(rows: Rows) -> list[str]:
    """Return the methods of runs, in the study's order."""
    present = {row["method"] for row in rows}
    return [name for name in METHODS if name in present]


def _title(name: str) -> str:
    """Return the name of a method in a table."""
    return f"{name} (outside)" if METHODS[name].outside else name


def report(rows: Rows, equal: Rows = (), swept: Rows = ()) -> str:
    """Return all tables: of the runs, of flatness at equal settings, and of what one setting alone changes."""
    parts = [f"## {data}\n\n{results(rows, data)}\n\n{curves(rows, data)}" for data in data_of(rows)]
    parts += [f"## {data}: ELBO, and under shift\n\n{table}" for data in data_of(rows) if (table := shift(rows, data))]
    if rows:
        parts.append(f"## Surely better or worse than {BASELINE} in NLL\n\n{summary(rows)}")
        parts.append(f"## Flatness at the mean, per training row\n\n{flatness(rows)}")
    if equal:
        parts.append(f"## Flatness at the same kl_weight, learning rate and number of steps\n\n{flatness(equal)}")
    for setting in dict.fromkeys(row["setting"] for row in swept):
        parts.append(
            f"## Test NLL by {setting}, all other settings as they were chosen\n\n{sensitivity(swept, setting)}"
        )
    return "\n\n".join(parts) + "\n"


def results(rows: Rows, data: str) -> str:
    """Return the table of a data set: test metrics, paired differences to the baseline, and the chosen settings."""
    metrics, found = _METRICS[SOURCES[data].task], differences(rows, data)
    heads = [
        "method",
        "NLL",
        f"minus {BASELINE}",
        "p (Holm)",
        "NLL at the mean",
        *metrics,
        "settings",
        "validation NLL",
    ]
    lines = []
    for name in methods_of([row for row in rows if row["data"] == data]):
        first = next(row for row in rows if (row["data"], row["method"]) == (data, name))
        if "failed" in first:
            lines.append([_title(name), "failed"])
            continue
        difference = found.get(name)
        lines.append(
            [
                _title(name),
                _mean(rows, data, name, "nll"),
                _signed(difference),
                "" if difference is None else f"{difference.holm:.3f}",
                _mean(rows, data, name, "nll", "at_mean"),
                *(_mean(rows, data, name, metric) for metric in metrics),
                ", ".join(f"{key} {value:.2g}" for key, value in first["settings"].items()),
                f"{first['validation']:.3f}",
            ]
        )
    return _table(lines, heads)


def curves(rows: Rows, data: str) -> str:
    """Return the learning curves: the mean NLL at shares of the budget, those of a longer or shorter one aside."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        if row["data"] == data and "curve" in row and METHODS[row["method"]].budget == 1:
            found.setdefault(row["method"], []).append(row["curve"])
    points = max(([gradients for gradients, _ in curves[0]] for curves in found.values()), key=len, default=[])
    lines = []
    for name in filter(found.get, METHODS):
        cells = dict.fromkeys(points, "")
        for point in zip(*found[name], strict=True):
            nearest = min(points, key=lambda each: abs(each - point[0][0]))
            cells[nearest] = f"{mean_and_error([nll for _, nll in point])[0]:.3f}"
        lines.append([_title(name), *cells.values()])
    return _table(lines, ["NLL after", *map(str, points)])


def shift(rows: Rows, data: str) -> str:
    """Return the ELBO at kl_weight 1 per row, selective accuracy, NLL under shift and outlier AUROC; "" if none."""
    measured = [row for row in rows if row["data"] == data and row.get("shift") is not None]
    groups = {name: "metrics" for row in measured for name in ("elbo", "selective_accuracy") if name in row["metrics"]}
    groups |= {name: "shift" for row in measured for name in row["shift"] if name.startswith(("nll", "auroc"))}
    lines = [
        [_title(name), *(_mean(rows, data, name, *each) for each in groups.items())] for name in methods_of(measured)
    ]
    return _table(lines, ["method", *(name.replace("_", " ") for name in groups)]) if measured else ""


def summary(rows: Rows) -> str:
    """Return which method is surely better or worse than the baseline where, and which law passes as a default."""
    data, found = data_of(rows), verdicts(rows)
    lines = [
        [
            _title(name),
            *(_MARKS[verdict[each]] if each in verdict else "" for each in data),
            _default(name, verdict, data),
            ", ".join(each for each in data if _is_less_accurate(rows, each, name)),
        ]
        for name, verdict in ((name, found[name]) for name in METHODS if name in found)
    ]
    return _table(lines, ["method", *data, "passes", "surely less accurate than sam"])


def _is_less_accurate(rows: Rows, data: str, method: str) -> bool:
    difference = differences(rows, data, "accuracy", baseline="sam").get(method)
    return difference is not None and difference.sure < 0


def _default(name: str, verdict: dict[str, int], data: Sequence[str]) -> str:
    """Return whether a law of a learnt posterior, at equal gradients, passes."""
    method = METHODS[name]
    if method.guide != "learnt" or method.budget != 1 or method.own:
        return ""
    return "yes" if passes(verdict, data) else "no"


def flatness(rows: Rows) -> str:
    """Return means and standard errors of the flatness measures."""
    measures = ("lambda_max", "trace", "sharpness", "average_sharpness")
    lines = []
    for data in data_of(rows):
        for name in methods_of([row for row in rows if row["data"] == data]):
            cells = [_mean(rows, data, name, measure, "flat") for measure in measures]
            lines += [[data, _title(name), _mean(rows, data, name, "nll"), *cells]] if any(cells) else []
    return _table(lines, ["data", "method", "NLL", *measures])


def sensitivity(swept: Rows, setting: str) -> str:
    """Return the mean NLL at the 0 of a setting, or at its best value, and the paired differences of others to it."""
    chosen = [row for row in swept if row["setting"] == setting]
    tried = sorted({row["value"] for row in chosen})
    heads, lines = ["data", "method", *(f"{value:g}" for value in tried)], []
    for data, name in dict.fromkeys((row["data"], row["method"]) for row in chosen):
        found = [row for row in chosen if (row["data"], row["method"]) == (data, name)]
        # each value as if it were a method, one of them the baseline
        named = [{**row, "method": f"{row['value']:g}"} for row in found]
        means = {value: mean_and_error([*values(named, data, f"{value:g}", "nll").values()])[0] for value in tried}
        base = 0.0 if 0.0 in means else min(tried, key=lambda value: (means[value] != means[value], means[value]))
        paired = differences(named, data, baseline=f"{base:g}")
        cells = {value: _signed(paired.get(f"{value:g}")) for value in tried}
        lines.append([data, name, *({**cells, base: _mean(named, data, f"{base:g}", "nll")}.values())])
    return _table(lines, heads)


def _mean(rows: Rows, data: str, method: str, metric: str, group: str = "metrics") -> str:
    found = [each for each in values(rows, data, method, metric, group).values() if each == each]
    if not found:
        return ""
    mean, error = mean_and_error(found)
    left, right = (f"{mean:.3g}", f"{error:.1g}") if group == "flat" else (f"{mean:.3f}", f"{error:.3f}")
    return left if len(found) == 1 else f"{left} ± {right}"


def _signed(difference: Any) -> str:
    return "" if difference is None else f"{difference.mean:+.3f} ± {difference.error:.3f}"


def _table(lines: Sequence[Sequence[Any]], heads: Sequence[str]) -> str:
    make: Callable[..., str] = tabulate
    return make(lines, heads, tablefmt="github", disable_numparse=True)
