"""The study's pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyro_sam.study.survey.records import SENSITIVITY, Records
from pyro_sam.study.survey.statistics import BASELINE, Rows, differences, mean_and_error, values
from pyro_sam.study.survey.tables import data_of, methods_of

_LINEAR = 0.02  # differences up to this are drawn to scale, larger ones on a logarithmic one
_CURVES = ("mfvi", "map", "ascended", "ascended-previous", "variational-sam", "mix-sam", "sam", "bsam")


def draw(records: Records) -> list[Path]:
    """Draw learning curves, paired differences, trials, critical differences of three data sets, and sweeps."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows, out = records.read(), records.out
    with mpl.rc_context({"font.size": 8}):
        paths = []
        if rows:
            paths += [_curves(rows, out / "curves.png", Figure), _differences(rows, out / "differences.png", Figure)]
        if records.trials():
            paths.append(_trials(records, out / "trials.png", Figure))
        ranks = mean_nll(rows)
        if len(ranks) >= 3 and len(ranks.columns) >= 3:
            paths.append(_critical(ranks, out / "critical.png", Figure))
        swept = records.read(SENSITIVITY)
        for setting in dict.fromkeys(row["setting"] for row in swept):
            paths.append(_sensitivity(swept, setting, out / f"sensitivity_{setting}.png", Figure))
    return paths


def mean_nll(rows: Rows) -> Any:
    """Return a frame of mean NLL, data sets by methods; methods that are not everywhere are left out."""
    import pandas as pd

    data, methods = data_of(rows), methods_of(rows)
    table = [[np.mean([*values(rows, d, m, "nll").values()] or [np.nan]) for m in methods] for d in data]
    return pd.DataFrame(table, data, methods).dropna(axis="columns")


def _grid(data: Sequence[str], height: float, path: Path, make: Any, draw: Callable[[Any, str], None]) -> Path:
    """Draw an axis for each data set, three in a row, and what they share in a legend."""
    columns = min(len(data), 3)
    rows = -(-len(data) // columns)
    figure = make(figsize=(10, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, name in zip(axes, data, strict=False):
        draw(axis, name)
        axis.set_title(name)
    for axis in axes[len(data) :]:
        axis.set_axis_off()
    shared = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if shared:
        figure.legend(shared.values(), shared, loc="outside lower center", ncols=len(_CURVES))
    figure.savefig(path, dpi=150)
    return path


def _curves(rows: Rows, path: Path, make: Any) -> Path:
    def draw(axis: Any, name: str) -> None:
        from matplotlib.ticker import NullFormatter

        for k, method in enumerate(_CURVES):
            curves = [row["curve"] for row in rows if (row["data"], row["method"]) == (name, method) and "curve" in row]
            if curves:
                array = np.array(curves, dtype=float)
                axis.plot(array[0, :, 0], array[:, :, 1].mean(0), marker=".", color=f"C{k}", label=method)
                points = array[0, :, 0]
                axis.set(xscale="log", xlabel="gradients", ylabel="test NLL")
                axis.set_xticks(
                    points[[0, len(points) // 3, -1]], [f"{x:g}" for x in points[[0, len(points) // 3, -1]]]
                )
                axis.xaxis.set_minor_formatter(NullFormatter())

    return _grid(data_of(rows), 3.2, path, make, draw)


def _differences(rows: Rows, path: Path, make: Any) -> Path:
    """Draw a row for each data set: the methods' paired differences to the baseline, with two standard errors."""
    from matplotlib.ticker import FuncFormatter

    data, methods = data_of(rows), [name for name in methods_of(rows) if name != BASELINE]
    found = {name: differences(rows, name) for name in data}
    figure = make(figsize=(7, 1.2 + (0.16 + 0.05 * len(methods)) * len(data)), layout="constrained")
    axis = figure.subplots()
    for k, method in enumerate(methods):
        places = [i for i, name in enumerate(data) if method in found[name]]
        drawn = [found[data[i]][method] for i in places]
        shift = 0.6 * ((k + 0.5) / len(methods) - 0.5)
        axis.errorbar(
            [each.mean for each in drawn],
            [i + shift for i in places],
            xerr=[2 * each.error for each in drawn],
            fmt="o",
            markersize=3,
            capsize=2,
            color=f"C{k}",
            label=method,
        )
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=_LINEAR)
    axis.set_xticks(
        [sign * _LINEAR * 10**power / each for sign in (-1, 1) for power in (0, 1) for each in (2, 1)] + [0]
    )
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}" if x else "0"))
    axis.set(xlabel=f"test NLL less that of {BASELINE}, mean and two standard errors: left is better")
    axis.set_yticks(range(len(data)), data)
    axis.set_ylim(len(data) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    if len(methods) > 1:
        figure.legend(loc="outside upper center", ncols=min(len(methods), 4))
    figure.savefig(path, dpi=150)
    return path


def _trials(records: Records, path: Path, make: Any) -> Path:
    """Draw each trial's validation NLL over its kl_weight: what the weight of the KL decides, and what the law does."""
    found = records.trials()

    def draw(axis: Any, name: str) -> None:
        for k, method in enumerate(_CURVES):
            trials = found.get((name, method), [])
            axis.plot(
                [w for w, _ in trials], [nll for _, nll in trials], ".", color=f"C{k}", markersize=3, label=method
            )
        lowest = sorted(nll for (each, _), trials in found.items() if each == name for _, nll in trials)
        axis.set(xlabel="kl_weight", ylabel="validation NLL", xscale="log")
        axis.set_ylim(lowest[0] - 0.05 * abs(lowest[0]), lowest[int(0.6 * len(lowest))])

    return _grid([*dict.fromkeys(name for name, _ in found)], 3.2, path, make, draw)


def _critical(frame: Any, path: Path, make: Any) -> Path:
    """Draw mean ranks, and bars over methods that Nemenyi's test does not tell apart."""
    import scikit_posthocs as sp

    figure = make(figsize=(9, 3.5), layout="constrained")
    ranks = frame.rank(axis=1).mean()
    sp.critical_difference_diagram(ranks, sp.posthoc_nemenyi_friedman(frame), ax=figure.subplots())
    figure.savefig(path, dpi=150)
    return path


def _sensitivity(swept: Rows, setting: str, path: Path, make: Any) -> Path:
    """Draw test NLL over the values of a setting, mean and standard error, with a line for each method."""
    from matplotlib.ticker import LogLocator

    chosen = [row for row in swept if row["setting"] == setting]

    def draw(axis: Any, name: str) -> None:
        found = [row for row in chosen if row["data"] == name]
        highest: list[float] = []
        for k, method in enumerate(dict.fromkeys(row["method"] for row in found)):
            tried = sorted({row["value"] for row in found if row["method"] == method})
            named = [{**row, "method": f"{row['value']:g}"} for row in found if row["method"] == method]
            points = [mean_and_error([*values(named, name, f"{value:g}", "nll").values()]) for value in tried]
            means, errors = zip(*points, strict=True)
            axis.errorbar(tried, means, yerr=errors, marker=".", capsize=2, color=f"C{k}", label=method)
            highest += means
        low, high = min(highest), np.percentile(highest, 75)
        axis.set(xlabel=setting, ylabel="test NLL")
        # a value that fails would hide the others
        if low > 0 and max(highest) > 3 * low:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        elif (high - low) * 4 < max(highest) - low:
            axis.set_ylim(low - 0.5 * (high - low), high + 2 * (high - low))
        if setting == "batch_size":
            axis.set_xscale("log", base=2)
        elif min(row["value"] for row in found) > 0:
            axis.set_xscale("log")

    return _grid(data_of(chosen), 3.0, path, make, draw)
