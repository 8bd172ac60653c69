"""Pictures of training and of a posterior predictive. All take a matplotlib ``ax`` to draw on, and return it.

They need matplotlib: ``pip install "pyro-sam[plots]"``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pyro_sam._base.arguments import finite, positive, positive_int
from pyro_sam.metrics import top_class
from pyro_sam.perturbation import unit
from pyro_sam.predictive.landscape import Landscape
from pyro_sam.predictive.prediction import Prediction

__all__ = ["loss_slice", "regression_bands", "reliability_diagram", "training_curves", "tuning"]

_LIGHT = (1.0, 0.8, 0.5)  # of orange


def training_curves(history: Mapping[str, Sequence[Any]], keys: Sequence[str] = ("loss",), *, ax: Any = None) -> Any:
    """Draw what :func:`pyro_sam.fit` wrote down, over the course of training.

    Args:
        history: Values by name, one for each epoch; with replicas a list for each epoch, which give a line each.
        keys: Names of the curves to draw.
        ax: Axes to draw on; None for new ones.
    Returns:
        The axes.
    Raises:
        ValueError: If the history lacks a key.
        ImportError: If matplotlib is missing.
    """
    keys = [keys] if isinstance(keys, str) else keys
    if not isinstance(history, Mapping):
        raise ValueError(f"history must be a mapping from names to values, such as fit returns, got {history!r}.")
    if not isinstance(keys, Sequence):
        raise ValueError(f"keys must be names of curves such as ('loss',), got keys={keys!r}.")
    unknown = [key for key in keys if key not in history]
    if unknown or not keys:
        raise ValueError(f"keys must name parts of the history, {', '.join(map(str, history))}, got {keys}.")
    ax = _axes(ax)
    for k, key in enumerate(keys):
        values = list(history[key])
        # few points would hide between the line's ends
        marker = "o" if len(values) <= 20 else None
        first, *_ = ax.plot(range(1, len(values) + 1), values, marker=marker, markersize=3, color=f"C{k}")
        first.set_label(key)
    ax.set(xlabel="epoch", ylabel=", ".join(keys))
    ax.locator_params(axis="x", integer=True)
    if len(keys) > 1:
        ax.legend(frameon=False)
    return ax


def tuning(
    tables: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]],
    x: str = "kl_weight",
    *,
    by: str = "law",
    ax: Any = None,
) -> Any:
    """Draw the validation NLL of the trials of :func:`pyro_sam.tune` against a setting, on a log scale.

    A dot is a trial; the line is the least of all trials so far from the left and of all from the right, whichever is
    larger: the lower envelope of a curve with one valley.

    Args:
        tables: A table of ``tune``, or several by the name of their law.
        x: Name of a positive setting.
        by: Name of a setting whose values have colours of their own in a single table; it need not be there.
        ax: Axes to draw on; None for new ones.
    Returns:
        The axes.
    Raises:
        ValueError: If a table lacks the setting, or has no finite NLL.
        ImportError: If matplotlib is missing.
    """
    named = dict(tables) if isinstance(tables, Mapping) else _by(tables, by)
    curves = {}
    for name, rows in named.items():
        if any(x not in row for row in rows):
            raise ValueError(f"x must be a setting in the table, such as 'kl_weight', got x={x!r}.")
        if any(not isinstance(row[x], (int, float)) for row in rows):
            raise ValueError(f"x must be a setting with numbers, such as 'kl_weight', got x={x!r}; pass by={x!r}.")
        pairs = sorted((row[x], row["nll"]) for row in rows if math.isfinite(row["nll"]) and row[x] > 0)
        if pairs:
            curves[name] = pairs
    if not curves:
        raise ValueError("tables must hold a trial with a finite nll, as those that tune returns, got none.")
    ax = _axes(ax)
    for name, pairs in curves.items():
        values, nlls = zip(*pairs, strict=True)
        (dots,) = ax.plot(values, nlls, "o", markersize=4, alpha=0.6)
        left, right = list(accumulate(nlls, min)), list(accumulate(reversed(nlls), min))[::-1]
        ax.plot(values, list(map(max, left, right)), color=dots.get_color(), label=name or None)
    ax.set(xscale="log", yscale="log", xlabel=x, ylabel="validation NLL (nats)")
    if len(curves) > 1 or any(curves):
        ax.legend(frameon=False)
    return ax


def _by(rows: Sequence[Mapping[str, Any]], by: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(str(row.get(by, "")), []).append(row)
    return found


def reliability_diagram(prediction: Prediction | Tensor, y: Tensor, *, num_bins: int = 15, ax: Any = None) -> Any:
    """Draw how often the most probable class is right, against how probable it was said to be.

    Bars show the accuracy in each bin of confidence, and lighter ones the gap to the bin's mean confidence: its size,
    weighted by the bins' shares of the data (the narrow bars), is the expected calibration error.

    Args:
        prediction: Prediction, or class probabilities ``(N, classes)``, or ``(N,)`` of class 1.
        y: Labels ``(N,)``.
        num_bins: Number of equally wide bins from 0 to 1.
        ax: Axes to draw on; None for new ones.
    Returns:
        The axes.
    Raises:
        ValueError: If ``num_bins`` is not positive, the probabilities are none, or the labels do not fit them.
        ImportError: If matplotlib is missing.
    """
    positive_int("num_bins", num_bins)
    confidence, correct = (tensor.detach().cpu().double() for tensor in top_class(prediction, y))
    number = (confidence * num_bins).long().clamp(max=num_bins - 1)
    count = number.bincount(minlength=num_bins).double()
    seen = count > 0
    accuracy = number.bincount(correct, minlength=num_bins)[seen] / count[seen]
    claimed = number.bincount(confidence, minlength=num_bins)[seen] / count[seen]
    share = count[seen] / len(confidence)
    ece = (share * (accuracy - claimed).abs()).sum().item()
    right, said = _array(accuracy), _array(claimed)
    ax = _axes(ax)
    middle, width = ((torch.arange(num_bins)[seen] + 0.5) / num_bins).numpy(), 1 / num_bins
    # dark, light and black: three shades on paper too
    ax.bar(middle, right, width, color="C0", alpha=0.8, edgecolor="white", label="accuracy")
    gap = {"facecolor": (*_LIGHT, 0.6), "edgecolor": "C1", "linewidth": 0.8}
    ax.bar(middle, said - right, 0.8 * width, bottom=right, label=f"gap (ECE {ece:.3f})", **gap)
    ax.bar(middle, _array(share), 0.25 * width, color="black", edgecolor="white", label="share of the data")
    ax.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return ax


def loss_slice(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    radius: float = 3.0,
    num_points: int = 31,
    ax: Any = None,
) -> Any:
    """Draw the data loss along two lines through the guide's mean: up its gradient, and in a random direction.

    Args:
        model: Pyro model.
        guide: Its guide, trained.
        *args: Arguments of both, with the observations.
        radius: Half the length of the lines, in posterior standard deviations.
        num_points: Number of losses on each line.
        ax: Axes to draw on; None for new ones.
    Returns:
        The axes.
    Raises:
        ValueError: If a number is not positive, or the guide has no Gaussian site.
        ImportError: If matplotlib is missing.
    """
    positive_int("num_points", num_points)
    positive("radius", radius)
    loss = Landscape(model, guide, args, "noise")
    ax = _axes(ax)
    steps = torch.linspace(-radius, radius, num_points).tolist()
    lines = {"adversary": unit(loss.gradient(loss.zero)), "random direction": unit(torch.randn_like(loss.zero))}
    for label, direction in lines.items():
        ax.plot(steps, [loss.value(step * direction) for step in steps], label=label)
    ax.axvline(0, color="0.4", linestyle="--", linewidth=1)
    ax.set(xlabel="distance from the mean (posterior standard deviations)", ylabel="loss (nats)")
    ax.legend(frameon=False)
    return ax


def regression_bands(
    prediction: Prediction, x: Tensor, *, levels: Sequence[float] = (0.5, 0.95), data: Any = None, ax: Any = None
) -> Any:
    """Draw the predictive mean over one input, with central predictive intervals.

    Args:
        prediction: Prediction at ``x`` of a real observation.
        x: Inputs that were predicted at, shape ``(N,)`` or ``(N, 1)``, in any order.
        levels: Probabilities of the intervals. Where the likelihood has no quantile function they are those of
            draws, so take many posterior samples.
        data: Pair of inputs and observations to draw as dots; None for no dots.
        ax: Axes to draw on; None for new ones.
    Returns:
        The axes.
    Raises:
        ValueError: If shapes differ, or a level is not between 0 and 1.
        ImportError: If matplotlib is missing.
    """
    if not isinstance(prediction, Prediction):
        raise ValueError(
            f"prediction, which comes first, must be a Prediction, of predict at x, got a {type(prediction).__name__}."
        )
    mean = prediction.mean
    if not isinstance(x, Tensor) or mean.dim() != 1 or x.numel() != len(mean):
        given = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(
            f"x must have one number for each prediction, which must be of one number too, got {given} and predictions "
            f"of shape {tuple(mean.shape)}."
        )
    levels = [levels] if isinstance(levels, float) else levels
    if not isinstance(levels, Sequence) or not all(0 < finite("levels", level) < 1 for level in levels):
        raise ValueError(f"levels must be between 0 and 1, got levels={levels}.")
    dots = _dots(data)
    ax, order = _axes(ax), _array(x).argsort()
    inputs = _array(x)[order]
    inner: Any = None
    for depth, level in enumerate(sorted(levels)):
        lower, upper = (_array(_quantile(prediction, (1 + sign * level) / 2))[order] for sign in (-1, 1))
        # each level its own strips, none on top of another: the legend shows the shade that the picture has
        strips = [(lower, upper)] if inner is None else [(lower, inner[0]), (inner[1], upper)]
        look = {"color": "C0", "alpha": 1 - 0.75 ** (len(levels) - depth), "linewidth": 0}
        for k, strip in enumerate(strips):
            ax.fill_between(inputs, *strip, **look, label="" if k else f"{100 * level:g} % interval")
        inner = lower, upper
    ax.plot(inputs, _array(mean)[order], color="C0", label="mean")
    if dots:
        ax.plot(*dots, "k.", markersize=4, label="data")
    ax.legend(frameon=False)
    return ax


def _quantile(prediction: Prediction, q: float) -> Tensor:
    try:
        return prediction.quantile(q)
    except ValueError:
        draws = torch.cat([prediction.samples() for _ in range(20)])
        return draws.quantile(q, dim=0)


def _dots(data: Any) -> list[Any]:
    if data is None:
        return []
    try:
        inputs, observations = (_array(torch.as_tensor(part).double()) for part in data)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"data must be a pair of inputs and observations, got a {type(data).__name__}.") from error
    if len(inputs) != len(observations):
        raise ValueError(f"data must have as many inputs as observations, got {len(inputs)} and {len(observations)}.")
    return [inputs, observations]


def _array(values: Tensor) -> Any:
    # matplotlib's arithmetic on tensors goes through a protocol of NumPy's that torch has only in part
    return values.detach().cpu().reshape(-1).numpy()


def _axes(ax: Any) -> Any:
    if ax is not None:
        if not hasattr(ax, "plot"):
            raise ValueError(f"ax must be matplotlib axes, got {ax!r}.")
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "pyro-sam[plots]"') from error
    return plt.subplots(layout="constrained")[1]
