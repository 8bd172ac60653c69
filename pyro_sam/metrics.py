"""How good a posterior predictive is: single numbers, from a :class:`~pyro_sam.Prediction` or from plain tensors.

Accuracy, calibration error, AUROC and squared error are torchmetrics' (``pip install "pyro-sam[metrics]"``).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from pyro_sam._base.arguments import finite, positive_int
from pyro_sam._base.cures import value_range
from pyro_sam._step.sites import unwrap
from pyro_sam.predictive.prediction import Prediction

__all__ = ["accuracy", "auroc_ood", "brier", "ece", "interval_coverage", "nll", "rmse"]


def accuracy(prediction: Prediction | Tensor, y: Tensor) -> float:
    """Return the share of data points whose most probable class is the right one.

    Args:
        prediction: Prediction, or class probabilities ``(N, classes)``, or ``(N,)`` of class 1.
        y: Labels ``(N,)``.
    Returns:
        A number from 0 to 1.
    Raises:
        ValueError: If the probabilities are none, or the labels do not fit them.
    """
    probs, y = _classes(prediction, y)
    accuracy = _torchmetrics().classification.multiclass_accuracy
    return float(accuracy(probs.argmax(-1), y, max(2, probs.shape[-1]), average="micro"))


def nll(prediction: Prediction | Tensor, y: Tensor) -> float:
    r"""Return the mean negative log-likelihood, :math:`-\frac1N \sum_n \log p(y_n \mid x_n)`, in nats.

    Args:
        prediction: Prediction of any likelihood, or class probabilities ``(N, classes)``, or ``(N,)`` of class 1.
        y: Observations; for probabilities, labels ``(N,)``.
    Returns:
        The mean over data points.
    Raises:
        ValueError: If the probabilities are none, or ``y`` does not fit.
    """
    if isinstance(prediction, Prediction):
        return float(-prediction.log_prob(y).mean())
    probs, y = _classes(prediction, y)
    return float(-probs.gather(-1, y[:, None]).log().mean())


def brier(prediction: Prediction | Tensor, y: Tensor) -> float:
    r"""Return the Brier score :math:`\frac1N \sum_n \sum_k (p_{nk} - [y_n = k])^2`, from 0 to 2.

    The sum runs over all classes, so for two of them it is twice the mean of :math:`(p_n - y_n)^2`.

    Args:
        prediction: Prediction, or class probabilities ``(N, classes)``, or ``(N,)`` of class 1.
        y: Labels ``(N,)``.
    Returns:
        The score; smaller is better.
    Raises:
        ValueError: If the probabilities are none, or the labels do not fit them.
    References:
        Brier (1950), Verification of forecasts expressed in terms of probability.
    """
    probs, y = _classes(prediction, y)
    one_hot = torch.nn.functional.one_hot(y, probs.shape[-1])
    return float((probs - one_hot).square().sum(-1).mean())


def ece(prediction: Prediction | Tensor, y: Tensor, *, num_bins: int = 15) -> float:
    r"""Return the expected calibration error of the most probable class.

    .. math:: \sum_b \frac{n_b}{N} \, | \mathrm{accuracy}_b - \mathrm{confidence}_b |

    Args:
        prediction: Prediction, or class probabilities ``(N, classes)``, or ``(N,)`` of class 1.
        y: Labels ``(N,)``.
        num_bins: Number of equally wide bins of confidence from 0 to 1.
    Returns:
        A number from 0 to 1; smaller is better.
    Raises:
        ValueError: If ``num_bins`` is not positive, the probabilities are none, or the labels do not fit them.
    References:
        Guo et al. (2017), arXiv:1706.04599, Eq. 3.
    """
    confidence, correct = top_class(prediction, y)
    # torchmetrics gives a confidence of exactly 1 a bin of its own
    below_one = confidence.clamp(max=1 - torch.finfo(confidence.dtype).eps)
    bins = positive_int("num_bins", num_bins)
    return float(_torchmetrics().classification.binary_calibration_error(below_one, correct, n_bins=bins))


def auroc_ood(inside: Prediction | Tensor, outside: Prediction | Tensor) -> float:
    """Return how well the predictive's uncertainty tells foreign data from the data's own kind.

    It is the probability that a foreign point is more uncertain than one of the data's own.

    Args:
        inside: Predictions at data like the training data, or class probabilities ``(N, classes)``: their entropy is
            the uncertainty. A tensor ``(N,)`` is taken for the uncertainty itself.
        outside: Likewise at foreign data.
    Returns:
        Area under the ROC curve: 1 for perfect separation, 0.5 for none.
    Raises:
        ValueError: If a tensor is empty, not finite or of another shape, or rows of classes are no probabilities.
    References:
        Hendrycks & Gimpel (2017), arXiv:1610.02136.
    """
    scores = [_uncertainty(name, given) for name, given in (("inside", inside), ("outside", outside))]
    score = torch.cat([scores[0].double(), scores[1].to(scores[0].device).double()])
    is_outside = torch.arange(len(score), device=score.device) >= len(scores[0])
    # ranks: torchmetrics takes scores outside of [0, 1] for logits, whose sigmoid would make ties
    rank = torch.unique(score, return_inverse=True)[1].to(torch.float64) / len(score)
    return float(_torchmetrics().classification.binary_auroc(rank, is_outside.long()))


def rmse(prediction: Prediction | Tensor, y: Tensor) -> float:
    """Return the root of the mean squared error of the predictive mean, in the units of ``y``.

    Args:
        prediction: Prediction, or means shaped like ``y``.
        y: Observations.
    Returns:
        The error over all elements of ``y``.
    Raises:
        ValueError: If the shapes differ.
    """
    mean = prediction.mean if isinstance(prediction, Prediction) else prediction
    if not _is_real(y) or not _is_real(mean) or mean.shape != y.shape or not y.numel():
        raise ValueError(f"y must be real numbers, one for each of prediction, {_shape(mean)}, got {_shape(y)}.")
    mean, y = mean.detach().double().reshape(-1), y.to(mean.device).double().reshape(-1)
    return float(_torchmetrics().mean_squared_error(mean, y, squared=False))


def interval_coverage(prediction: Prediction | Tensor, y: Tensor, *, level: float = 0.95) -> float:
    r"""Return the share of observations inside of the central predictive interval of a probability.

    Inside is :math:`\frac{1 - \mathrm{level}}2 \le P(y \le y_n) \le \frac{1 + \mathrm{level}}2`.

    Args:
        prediction: Prediction of a likelihood with a distribution function, or draws ``(S, *y.shape)`` of the
            predictive such as ``prediction.samples()``.
        y: Observations.
        level: Probability of the interval, between 0 and 1.
    Returns:
        A number from 0 to 1, near ``level`` where the predictive is calibrated.
    Raises:
        ValueError: If ``level`` is out of range, shapes differ, there is NaN, or the likelihood has no distribution
            function.
    """
    if not 0 < finite("level", level) < 1:
        raise ValueError(f"level must be between 0 and 1, got level={level!r}.")
    if _is_real(y) and (not y.numel() or y.isnan().any()):
        raise ValueError(f"y must be observations, none of them NaN, got {_shape(y)}{value_range(y)}.")
    if isinstance(prediction, Prediction):
        tail = prediction.cdf(y)
    elif _is_real(y) and _is_real(prediction) and prediction.dim() and prediction.shape[1:] == y.shape:
        tail = (prediction <= y).double().mean(0).where(~prediction.isnan().any(0), math.nan)
    else:
        raise ValueError(f"prediction must be real draws (S, *y.shape) for y of {_shape(y)}, got {_shape(prediction)}.")
    if tail.isnan().any():
        raise ValueError("prediction has NaN: its parameters are lost, train it anew.")
    inside = (tail >= (1 - level) / 2) & (tail <= (1 + level) / 2)
    return float(inside.double().mean())


def top_class(prediction: Prediction | Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability of each point's most probable class, and 1 where that is the right one, else 0.

    Args:
        prediction: Prediction, or class probabilities ``(N, classes)``, or ``(N,)`` of class 1.
        y: Labels ``(N,)``.
    Returns:
        Two tensors of shape ``(N,)``.
    Raises:
        ValueError: If the probabilities are none, or the labels do not fit them.
    """
    probs, y = _classes(prediction, y)
    confidence, label = probs.max(-1)
    return confidence, (label == y).long()


def _classes(prediction: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Return probabilities ``(N, classes)`` and labels as whole numbers, checked."""
    probs = prediction.probs if isinstance(prediction, Prediction) else prediction
    if not isinstance(probs, Tensor) or probs.dim() not in (1, 2) or not probs.is_floating_point():
        raise ValueError(f"prediction must be a Prediction or probabilities (N, classes) or (N,), got {_shape(probs)}.")
    if isinstance(prediction, Prediction) and isinstance(unwrap(prediction.batches[0][0].fn), td.OneHotCategorical):
        y = y.argmax(-1) if isinstance(y, Tensor) and y.shape == probs.shape else y
    if probs.dim() == 1:
        probs = torch.stack([1 - probs, probs], -1)
    probs = _checked("prediction", probs)
    if not isinstance(y, Tensor) or y.shape != probs.shape[:1] or not len(probs):
        raise ValueError(
            f"y must be labels with one row per data point of prediction, shape ({len(probs)},), got {_shape(y)}."
        )
    if y.is_complex() or not ((y >= 0) & (y < probs.shape[-1]) & (y == y.long())).all():
        raise ValueError(
            f"y must be whole numbers from 0 to {probs.shape[-1] - 1}, as prediction has {probs.shape[-1]} classes, "
            f"got {y.dtype}{value_range(y)}."
        )
    return probs, y.long()


def _checked(name: str, probs: Tensor) -> Tensor:
    """Return class probabilities ``(N, classes)``, those of half precision in double, of which they were rounded."""
    eps = torch.finfo(probs.dtype).eps if probs.is_floating_point() else 0.0
    exact = probs.double() if eps > 1e-6 else probs
    sums = exact.sum(-1)
    if not (probs >= 0).all() or not torch.allclose(sums, torch.ones_like(sums), atol=max(1e-3, eps)):
        raise ValueError(
            f"{name} must be probabilities, from 0 to 1 and with sum 1 over the classes, got "
            f"{probs.dtype}{value_range(probs)}. Give it logits.softmax(-1)."
        )
    return exact


def _uncertainty(name: str, given: Any) -> Tensor:
    probs = given.probs if isinstance(given, Prediction) else given
    if not _is_real(probs) or probs.dim() not in (1, 2) or not probs.numel() or not probs.isfinite().all():
        raise ValueError(
            f"{name} must be a Prediction, probabilities (N, classes) or scores (N,), got {_shape(given)}."
        )
    if probs.dim() == 1 and isinstance(given, Prediction):
        probs = torch.stack([1 - probs, probs], -1)
    return probs if probs.dim() == 1 else torch.special.entr(_checked(name, probs)).sum(-1)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype != torch.bool and not value.is_complex()


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"shape {tuple(value.shape)}" + ("" if _is_real(value) else f" of {value.dtype}")


def _torchmetrics() -> Any:
    try:
        import torchmetrics.functional
    except ImportError as error:
        raise ImportError('this metric needs torchmetrics: pip install "pyro-sam[metrics]"') from error
    return torchmetrics.functional
