"""The benchmark's output: tables, a JSON file and a plot."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks.measure import Figures, Timing
from benchmarks.scaling import Sweep
from benchmarks.targets import Ratio, Results

MIB = 2**20


def case_table(measured: Mapping[str, tuple[Timing, Figures]]) -> str:
    """Return one row per contender."""
    rows = [
        [
            *(name, 1e3 * time.median, f"{1e3 * time.low:.2f}-{1e3 * time.high:.2f}"),
            *(figures.peak / MIB, figures.held / MIB, figures.operations, figures.syncs),
        ]
        for name, (time, figures) in measured.items()
    ]
    headers = ["contender", "ms", "10-90 %", "peak MiB", "held MiB", "operations", "syncs"]
    return tabulate(rows, headers, floatfmt=".2f", missingval="-")


def scaling_table(sweeps: Sequence[Sweep]) -> str:
    """Return the time at every size, and the slope of log time against log size."""
    rows = [
        [sweep.name, "  ".join(f"{size}: {1e3 * t.median:.1f}" for size, t in sweep.timings.items()), sweep.slope]
        for sweep in sweeps
    ]
    return tabulate(rows, ["size", "ms", "slope"], floatfmt=".2f")


def ratio_table(ratios: Sequence[Ratio]) -> str:
    """Return targets beside what was measured."""
    rows = [[ratio.name, ratio.case, ratio.target, ratio.measured, "yes" if ratio.met else "no"] for ratio in ratios]
    return tabulate(rows, ["ratio", "case", "target", "measured", "met"], floatfmt=".2f")


def as_json(results: Results, sweeps: Sequence[Sweep], ratios: Sequence[Ratio]) -> dict[str, Any]:
    """Return all that was measured, in seconds and bytes, as plain values."""
    return {
        "cases": {
            case: {name: {"seconds": asdict(time), **asdict(figures)} for name, (time, figures) in measured.items()}
            for case, measured in results.items()
        },
        "scaling": {
            sweep.name: {
                "slope": sweep.slope,
                "seconds": {str(size): asdict(timing) for size, timing in sweep.timings.items()},
            }
            for sweep in sweeps
        },
        "ratios": [{**asdict(ratio), "met": ratio.met} for ratio in ratios],
    }


def save_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def plot(sweeps: Sequence[Sweep], path: Path) -> None:
    """Draw time against size for every sweep, both logarithmic, with the spread of the rounds."""
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(3 * len(sweeps), 3), layout="constrained")
        for axis, sweep in zip(figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0], sweeps, strict=True):
            sizes, timings = list(sweep.timings), list(sweep.timings.values())
            axis.loglog(sizes, [1e3 * t.median for t in timings], marker="o")
            axis.fill_between(sizes, [1e3 * t.low for t in timings], [1e3 * t.high for t in timings], alpha=0.3)
            axis.set(title=f"slope {sweep.slope:.2f}", xlabel=sweep.name)
        figure.supylabel("ms per step")
        figure.savefig(path, dpi=150)
