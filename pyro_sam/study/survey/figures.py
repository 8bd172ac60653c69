"""The study's pictures."""

from pathlib import Path
from typing import Any

import numpy as np

from pyro_sam.study.survey.records import Records
from pyro_sam.study.survey.statistics import BASELINE, Rows, differences, values
from pyro_sam.study.survey.tables import data_of, methods_of

_CURVES = ("mfvi", "map", "ascended", "ascended-previous", "variational-sam", "mix-sam", "sam", "bsam")


def draw(records: Records) -> list[Path]:
    """Draw learning curves, paired differences, the trials' NLL and, of three data sets, the critical differences."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows, out = records.read(), records.out
    with mpl.rc_context({"font.size": 8}):
        paths = [_curves(rows, out / "curves.png", Figure), _differences(rows, out / "differences.png", Figure)]
        if records.trials():
            paths.append(_trials(records, out / "trials.png", Figure))
        ranks = mean_nll(rows)
        if len(ranks) >= 3 and len(ranks.columns) >= 3:
            paths.append(_critical(ranks, out / "critical.png", Figure))
    return paths


def mean_nll(rows: Rows) -> Any:
    """Return a frame of mean NLL, data sets by methods; methods that are not everywhere are left out."""
    import pandas as pd

    data, methods = data_of(rows), methods_of(rows)
    table = [[np.mean([*values(rows, d, m, "nll").values()] or [np.nan]) for m in methods] for d in data]
    return pd.DataFrame(table, data, methods).dropna(axis="columns")


def _axes(figure: Any, number: int) -> list[Any]:
    columns = min(number, 3)
    return list(figure.subplots(-(-number // columns), columns, squeeze=False).flat)


def _curves(rows: Rows, path: Path, make: Any) -> Path:
    data = data_of(rows)
    figure = make(figsize=(10, 3.2 * -(-len(data) // 3)), layout="constrained")
    axes = _axes(figure, len(data))
    for axis, name in zip(axes, data, strict=False):
        for k, method in enumerate(_CURVES):
            curves = [row["curve"] for row in rows if (row["data"], row["method"]) == (name, method) and "curve" in row]
            if curves:
                array = np.array(curves, dtype=float)
                axis.plot(array[0, :, 0], array[:, :, 1].mean(0), marker=".", color=f"C{k}", label=method)
        axis.set(title=name, xlabel="gradients", ylabel="test NLL", xscale="log")
    for axis in axes[len(data) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_CURVES))
    figure.savefig(path, dpi=150)
    return path


def _differences(rows: Rows, path: Path, make: Any) -> Path:
    data, methods = data_of(rows), [name for name in methods_of(rows) if name != BASELINE]
    figure = make(figsize=(10, 0.25 * len(methods) * -(-len(data) // 3) + 1.5), layout="constrained")
    axes = _axes(figure, len(data))
    for axis, name in zip(axes, data, strict=False):
        found = differences(rows, name)
        present = [method for method in methods if method in found]
        means, errors = [found[m].mean for m in present], [2 * found[m].error for m in present]
        axis.errorbar(means, range(len(present)), xerr=errors, fmt="o", markersize=3)
        axis.axvline(0, color="grey", linewidth=0.5)
        span = max(abs(np.percentile(means, [5, 80]))) * 3 if means else 1
        axis.set(title=name, xlabel=f"NLL minus {BASELINE}, two s.e.", xlim=(-span, span))
        axis.set_yticks(range(len(present)), present)
        axis.invert_yaxis()
    for axis in axes[len(data) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=150)
    return path


def _trials(records: Records, path: Path, make: Any) -> Path:
    """Draw each trial's validation NLL over its kl_weight: what the weight of the KL decides, and what the law does."""
    found = records.trials()
    data = [name for name in data_of(records.read()) if any(each == name for each, _ in found)]
    figure = make(figsize=(10, 3.2 * -(-len(data) // 3)), layout="constrained")
    axes = _axes(figure, len(data))
    for axis, name in zip(axes, data, strict=False):
        for k, method in enumerate(_CURVES):
            trials = found.get((name, method), [])
            axis.plot(
                [w for w, _ in trials], [nll for _, nll in trials], ".", color=f"C{k}", markersize=4, label=method
            )
        lowest = sorted(nll for (each, _), trials in found.items() if each == name for _, nll in trials)
        axis.set(title=name, xlabel="kl_weight", ylabel="validation NLL", xscale="log")
        axis.set_ylim(lowest[0] - 0.05 * abs(lowest[0]), lowest[int(0.6 * len(lowest))])
    for axis in axes[len(data) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_CURVES))
    figure.savefig(path, dpi=150)
    return path


def _critical(frame: Any, path: Path, make: Any) -> Path:
    """Draw mean ranks, and bars over methods that Nemenyi's test does not tell apart."""
    import scikit_posthocs as sp

    figure = make(figsize=(9, 3.5), layout="constrained")
    ranks = frame.rank(axis=1).mean()
    sp.critical_difference_diagram(ranks, sp.posthoc_nemenyi_friedman(frame), ax=figure.subplots())
    figure.savefig(path, dpi=150)
    return path
