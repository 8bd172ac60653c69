"""Test metrics of a trained guide, from its posterior predictive."""

import math
from collections.abc import Callable
from typing import Any

import pyro_sam as ps
from pyro_sam.study.datasets import Dataset

_BATCH = 2000

# metric: whether more is better
METRICS: dict[str, dict[str, bool]] = {
    "classification": {"accuracy": True, "nll": False, "ece": False, "brier": False},
    "regression": {"rmse": False, "log_likelihood": True, "coverage": True},
}


def evaluate(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    dataset: Dataset,
    num_samples: int,
    replica: int | None = None,
) -> dict[str, float]:
    """Return the metrics of the posterior predictive on the test rows.

    Classification: accuracy, nll (mean minus log probability of the label), ece (expected calibration error, 15 bins),
    brier (squared error of the probabilities, summed over classes). Regression, in the target's own units: rmse,
    log_likelihood (per point), coverage (share of targets inside the predictive's central 95 % interval).

    Args:
        model: The model, trained.
        guide: Its guide.
        dataset: Data on the model's device.
        num_samples: Weight samples.
        replica: Which of the guide's replicas, if it has some.
    Returns:
        Value of each metric in :data:`METRICS`.
    """
    predictive = ps.predict(model, guide, dataset.x_test, num_samples=num_samples, batch_size=_BATCH, replica=replica)
    y = dataset.y_test
    if dataset.task == "classification":
        scores = (ps.metrics.accuracy, ps.metrics.nll, ps.metrics.ece, ps.metrics.brier)
        return {score.__name__: score(predictive, y) for score in scores}
    return {
        "rmse": dataset.y_scale * ps.metrics.rmse(predictive, y),
        "log_likelihood": -ps.metrics.nll(predictive, y) - math.log(dataset.y_scale),
        "coverage": ps.metrics.interval_coverage(predictive, y),
    }
