"""Test metrics of a trained guide, from its posterior predictive."""

import math
from collections.abc import Callable
from typing import Any

import torch

import pyro_sam as ps
from pyro_sam.study.datasets import Dataset

_BATCH = 2000
_ECE_BINS = 15
_COVERAGE = 0.95

# metric: whether more is better
METRICS: dict[str, dict[str, bool]] = {
    "classification": {"accuracy": True, "nll": False, "ece": False, "brier": False},
    "regression": {"rmse": False, "log_likelihood": True, "coverage": True},
}


def evaluate(
    model: Callable[..., Any], guide: Callable[..., Any], dataset: Dataset, num_samples: int
) -> dict[str, float]:
    """Return the metrics of the posterior predictive on the test rows.

    Classification: accuracy, nll (mean minus log probability of the label), ece (expected calibration error, 15 bins),
    brier (squared error of the probabilities, summed over classes). Regression, in the target's own units: rmse,
    log_likelihood (per point), coverage (share of targets inside the central 95 % interval of a Normal with the
    predictive's mean and variance).

    Args:
        model: The model, trained.
        guide: Its guide.
        dataset: Data on the model's device.
        num_samples: Weight samples.
    Returns:
        Value of each metric in :data:`METRICS`.
    """
    predictive = ps.predict(model, guide, dataset.x_test, num_samples=num_samples, batch_size=_BATCH)
    log_prob = predictive.log_prob(dataset.y_test).mean().item()
    if dataset.task == "classification":
        return {**_classification(predictive.probs, dataset), "nll": -log_prob}
    error = predictive.mean - dataset.y_test
    width = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + _COVERAGE) / 2)).item()
    return {
        "rmse": dataset.y_scale * error.square().mean().sqrt().item(),
        "log_likelihood": log_prob - math.log(dataset.y_scale),
        "coverage": (error.abs() <= width * predictive.variance.sqrt()).float().mean().item(),
    }


def _classification(probs: torch.Tensor, dataset: Dataset) -> dict[str, float]:
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    classes, y = dataset.num_classes or 0, dataset.y_test
    one_hot = torch.nn.functional.one_hot(y, classes)
    return {
        "accuracy": multiclass_accuracy(probs, y, classes, average="micro").item(),
        "ece": multiclass_calibration_error(probs, y, classes, n_bins=_ECE_BINS).item(),
        "brier": (probs - one_hot).square().sum(-1).mean().item(),
    }
