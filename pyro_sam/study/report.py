"""The comparison for a reader: a table and a figure."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_sam import plots
from pyro_sam.study.datasets import Dataset
from pyro_sam.study.evaluate import METRICS
from pyro_sam.study.output import write
from pyro_sam.study.results import FIGURE, TUNED, TUNED_FIGURE, Moments, Results, finite
from pyro_sam.study.train import train
from pyro_sam.study.tuning import Choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {
    "accuracy": "test accuracy",
    "nll": "test NLL per image",
    "rmse": "test RMSE",
    "log_likelihood": "test log likelihood per point",
}
_SHOWN = {"classification": ("accuracy", "nll"), "regression": ("rmse", "log_likelihood")}
_SPREAD = 0.6  # of the room between two methods, for the dots of one
_CURVE = {"classification": "nll", "regression": "log_likelihood"}


def table(results: Results) -> str:
    """Return the table: one line per method, mean ± standard deviation over seeds."""
    from tabulate import tabulate

    metrics, summary = METRICS[results.task], results.summary()
    better = {True: "higher is better", False: "lower is better"}
    rows = []
    for method, cells in summary.items():
        runs = [run for run in results.runs if run.method == method]
        seconds = sum(run.seconds for run in runs) / len(runs)
        values = [_cell(cells[metric]) for metric in metrics]
        rows.append([method, *values, runs[0].steps, runs[0].gradients, f"{seconds:.1f}"])
    headers = ["method", *metrics, "steps", "gradients", "seconds"]
    text = tabulate(rows, headers, tablefmt="simple", disable_numparse=True, stralign="right", colalign=("left",))
    notes = "; ".join(f"{metric}: {better[more]}" for metric, more in metrics.items() if metric != "coverage")
    return f"{text}\n{notes}"


def tuning(dataset: Dataset, choices: Mapping[str, Choice], out: Path) -> str:
    """Write what was chosen, with test metrics of a run on all training rows, and the picture; return the report."""
    from tabulate import tabulate

    metrics = METRICS[dataset.task]
    found, rows = {}, []
    for name, choice in choices.items():
        run = train(dataset, name, choice.settings, seed=0)
        found[name] = {"best": choice.best, "test": run.metrics, "trials": choice.table}
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in choice.best.items())
        rows.append([name, numbers, f"{choice.table[0]['nll']:.4f}", *(f"{run.metrics[each]:.4f}" for each in metrics)])
    content = {"dataset": dataset.name, "source": dataset.source, "methods": found}
    write(out / TUNED, f"{json.dumps(finite(content), indent=2, allow_nan=False)}\n".encode())
    figure = plots.tuning({name: choice.table for name, choice in choices.items()}, ax=_canvas()).figure
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    picture = write(out / TUNED_FIGURE, image.getvalue())
    text = tabulate(rows, ["method", "chosen", "validation NLL", *metrics], disable_numparse=True, tablefmt="simple")
    return f"{text}\nTest metrics are of one run on all training rows.\nresults: {out / TUNED}\nfigure:  {picture}"


def _canvas() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(7, 4.5), layout="constrained")).figure.subplots()


def _cell(moments: Moments) -> str:
    mean, std = moments["mean"], moments["std"]
    return f"{mean:.4f}" if std is None else f"{mean:.4f} ± {std:.4f}"


def figure(results: Results, out: Path) -> Path:
    """Draw test metrics per method (a dot per seed at its own height, a bar at the mean) and learning curves.

    Returns:
        The file.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = list(results.summary())
    palette = matplotlib.colormaps["tab10"]
    colors = {method: palette(k % 10) for k, method in enumerate(methods)}
    canvas = FigureCanvasAgg(Figure(figsize=(12, 1.8 + 0.42 * max(len(methods), 5)), layout="constrained"))
    left, middle, right = canvas.figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    for axes, metric in zip((left, middle), _SHOWN[results.task], strict=True):
        _dots(axes, results, metric, colors)
    middle.tick_params(labelleft=False)
    _curves(right, results, colors)
    canvas.figure.suptitle(f"{results.name}: {results.runs[0].gradients} gradients a run, {_count(results)}")
    image = io.BytesIO()
    canvas.figure.savefig(image, dpi=120, format="png")
    return write(out / FIGURE, image.getvalue())


def _count(results: Results) -> str:
    seeds = len({run.seed for run in results.runs})
    return "1 seed" if seeds == 1 else f"{seeds} seeds (a dot each, the bar is their mean)"


def _dots(axes: "Axes", results: Results, metric: str, colors: dict[str, Any]) -> None:
    for row, (method, color) in enumerate(colors.items()):
        values = results.values(method, metric)
        heights = [row + (k - (len(values) - 1) / 2) * _SPREAD / len(values) for k in range(len(values))]
        axes.plot(values, heights, "o", color=color, alpha=0.7, markersize=5)
        axes.plot(sum(values) / len(values), row, "|", color=color, markersize=20, markeredgewidth=2.5)
    axes.set_yticks(range(len(colors)), list(colors))
    axes.set_ylim(len(colors) - 0.4, -0.6)  # the first method on top
    axes.locator_params(axis="x", nbins=4)
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.3)
    arrow = "higher" if METRICS[results.task][metric] else "lower"
    axes.set_xlabel(f"{_TITLES[metric]}\n({arrow} is better)")


def _curves(axes: "Axes", results: Results, colors: dict[str, Any]) -> None:
    metric = _CURVE[results.task]
    for method, color in colors.items():
        runs = [run.curve for run in results.runs if run.method == method]
        gradients = [point["gradients"] for point in runs[0]]
        means = [sum(point[metric] for point in points) / len(points) for points in zip(*runs, strict=False)]
        for run in runs:
            axes.plot(gradients, [point[metric] for point in run], color=color, alpha=0.2, linewidth=0.8)
        axes.plot(gradients, means, color=color, label=method, linewidth=1.8)
    axes.set_xlabel("gradients")
    axes.set_ylabel(_TITLES[metric])
    if metric == "nll":
        _plain_log_scale(axes)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small", ncols=2)


def _plain_log_scale(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    # powers of ten alone leave a curve of less than a decade without two labels
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
