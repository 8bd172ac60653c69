"""Metrics against cases worked by hand and against scikit-learn."""

import math
import sys
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score, root_mean_squared_error
from torch import Tensor

import pyro_sam as ps
from pyro_sam import metrics

PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1]])
Y = torch.tensor([0, 1, 1, 1])


def random_case(n: int = 400, classes: int = 5) -> tuple[Tensor, Tensor]:
    probs = torch.randn(n, classes).mul(2).softmax(-1)
    y = torch.distributions.Categorical(0.7 * probs + 0.3 / classes).sample()
    return probs, y


def predicted(likelihood: Any, y: Tensor, num_samples: int = 50) -> ps.Prediction:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", likelihood(w, x), obs=y)

    pyro.clear_param_store()
    x = torch.linspace(-2, 2, len(y))
    return ps.predict(model, ps.MeanFieldNormal(model, init_scale=0.3).initialize(x, y), x, num_samples=num_samples)


def test_by_hand() -> None:
    assert metrics.accuracy(PROBS, Y) == 0.5
    assert metrics.nll(PROBS, Y) == pytest.approx(-math.log(0.7 * 0.3 * 0.4 * 0.7) / 4)
    assert metrics.brier(PROBS, Y) == pytest.approx((0.14 + 0.86 + 0.62 + 0.14) / 4)
    # two bins: all confidences are in the upper one, mean 0.625, accuracy 0.5
    assert metrics.ece(PROBS, Y, num_bins=2) == pytest.approx(0.125)
    # ten bins: (0.5: 0), (0.6: 0), (0.7: 1, 1)
    assert metrics.ece(PROBS, Y, num_bins=10) == pytest.approx((0.5 + 0.6 + 2 * 0.3) / 4)
    assert metrics.rmse(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 6.0])) == pytest.approx(math.sqrt(12.5))
    assert metrics.auroc_ood(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.5, 9.0])) == pytest.approx(5 / 6)
    draws = torch.linspace(0, 1, 101)[:, None].expand(101, 4)
    assert metrics.interval_coverage(draws, torch.tensor([0.5, 0.24, 0.26, 0.76]), level=0.5) == 0.5


def test_certain_predictions_share_the_last_bin() -> None:
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.95, 0.05], [0.95, 0.05]])
    y = torch.tensor([0, 1, 0, 0])
    assert metrics.ece(probs, y, num_bins=10) == pytest.approx(abs(0.75 - 0.975))


def test_against_scikit_learn() -> None:
    probs, y = random_case()
    assert metrics.accuracy(probs, y) == pytest.approx(accuracy_score(y, probs.argmax(-1)))
    assert metrics.nll(probs, y) == pytest.approx(log_loss(y, probs))
    assert metrics.brier(probs, y) == pytest.approx(brier_score_loss(y, probs, scale_by_half=False))
    confidence, correct = probs.max(-1).values, (probs.argmax(-1) == y).double()
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=15)
    shares = np.histogram(confidence, bins=15, range=(0, 1))[0] / len(y)
    expected = (shares[shares > 0] * abs(accuracy - mean_confidence)).sum()
    assert metrics.ece(probs, y) == pytest.approx(expected)
    mean = torch.randn(30, 2)
    assert metrics.rmse(mean, mean + 1) == pytest.approx(root_mean_squared_error(mean, mean + 1))


def test_one_column_is_the_probability_of_class_one() -> None:
    probs, y = random_case(classes=2)
    both = (metrics.accuracy, metrics.nll, metrics.brier, metrics.ece)
    for metric in both:
        assert metric(probs[:, 1], y) == pytest.approx(metric(probs, y))
    assert metrics.brier(probs[:, 1], y) == pytest.approx(2 * brier_score_loss(y, probs[:, 1]))


@pytest.mark.parametrize("shift", [0.0, 100.0, -1e4])
def test_auroc_is_scikit_learns_at_any_offset_of_the_scores(shift: float) -> None:
    # rounded, for ties
    inside, outside = torch.randn(200).round(decimals=1) + shift, torch.randn(100).round(decimals=1) + 0.5 + shift
    expected = roc_auc_score([0] * 200 + [1] * 100, torch.cat([inside, outside]))
    assert metrics.auroc_ood(inside, outside) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float32])
def test_numbers_of_unequal_precision_are_compared_as_they_are(dtype: torch.dtype) -> None:
    rough, fine = torch.tensor([1, 2, 3]).to(dtype), torch.tensor([1.00001, 2.4, 2.99999])
    assert metrics.rmse(rough, fine) == pytest.approx(root_mean_squared_error(rough.double(), fine), rel=1e-12)
    expected = roc_auc_score([0] * 3 + [1] * 3, torch.cat([rough.double(), fine]))
    assert metrics.auroc_ood(rough, fine) == pytest.approx(expected)
    assert metrics.auroc_ood(fine, rough) == pytest.approx(1 - expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_of_half_precision_are_those_of_their_exact_values(dtype: torch.dtype) -> None:
    probs, y = random_case()
    rounded = probs.to(dtype)
    exact = rounded.double() / rounded.double().sum(-1, keepdim=True)
    for metric in (metrics.accuracy, metrics.nll, metrics.brier, metrics.ece):
        assert metric(rounded, y) == pytest.approx(metric(exact, y), abs=5e-3)
    assert metrics.auroc_ood(rounded, probs) == pytest.approx(0.5, abs=5e-3)


def test_a_single_class_is_always_right() -> None:
    probs, y = torch.ones(3, 1), torch.zeros(3)
    assert metrics.accuracy(probs, y) == 1.0
    assert metrics.nll(probs, y) == metrics.brier(probs, y) == 0.0
    assert metrics.ece(probs, y) == pytest.approx(0.0, abs=1e-12)


def test_entropy_tells_the_foreign_from_the_own() -> None:
    sure, unsure = torch.tensor([[0.98, 0.01, 0.01], [0.9, 0.05, 0.05]]), torch.tensor([[0.4, 0.3, 0.3]])
    assert metrics.auroc_ood(sure, unsure) == 1.0
    assert metrics.auroc_ood(unsure, sure) == 0.0
    assert metrics.auroc_ood(sure, sure) == 0.5


def test_predictions_count_by_their_own_probabilities() -> None:
    y = torch.tensor([0, 1, 1, 0, 1, 1])
    coin = predicted(lambda w, x: dist.Bernoulli(logits=w + x), y.double())
    for metric in (metrics.accuracy, metrics.nll, metrics.brier, metrics.ece):
        assert metric(coin, y.double()) == pytest.approx(metric(coin.probs, y))
    assert metrics.auroc_ood(coin, coin) == 0.5

    def logits(w: Tensor, x: Tensor) -> Tensor:
        return torch.stack([w + x, w - x, x], -1)

    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    one_hot = torch.nn.functional.one_hot(labels).double()
    pyro.set_rng_seed(2)
    plain = predicted(lambda w, x: dist.Categorical(logits=logits(w, x)), labels)
    pyro.set_rng_seed(2)
    hot = predicted(lambda w, x: dist.OneHotCategorical(logits=logits(w, x)), one_hot)
    assert metrics.accuracy(hot, one_hot) == metrics.accuracy(plain, labels)
    assert metrics.nll(hot, one_hot) == pytest.approx(metrics.nll(plain, labels))


def test_coverage_of_a_regression_is_the_level_for_its_own_draws() -> None:
    y = torch.randn(4000)
    prediction = predicted(lambda w, x: dist.Normal(w * x, 1.0), y)
    y = prediction.samples()[torch.randint(50, (4000,)), torch.arange(4000)]
    for level in (0.5, 0.9):
        error = 4 * (level * (1 - level) / 4000) ** 0.5
        assert abs(metrics.interval_coverage(prediction, y, level=level) - level) < error
        assert abs(metrics.interval_coverage(prediction.samples(), y, level=level) - level) < error + 0.03
    assert metrics.rmse(prediction, y) == pytest.approx(float((prediction.mean - y).square().mean().sqrt()))


def test_coverage_counts_points_between_exact_quantiles() -> None:
    y = torch.tensor([-1.97, -1.95, 0.0, 1.95, 1.97])
    prediction = predicted(lambda w, x: dist.Normal(0 * w * x, 1.0), y)
    assert metrics.interval_coverage(prediction, y) == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.accuracy(torch.randn(4, 3), Y),
            r"sum 1 over the classes, got torch.float64, values .*logits.softmax\(-1\)",
        ),
        (
            lambda: metrics.accuracy(PROBS, Y[:3]),
            r"one row per data point of prediction, shape \(4,\), got sha",
        ),
        (lambda: metrics.nll(PROBS, Y[:, None]), r"shape \(4,\), got shape \(4, 1\)"),
        (
            lambda: metrics.brier(PROBS, Y + 2),
            r"from 0 to 2, as prediction has 3 classes, got torch.int64, values from 2 to 3",
        ),
        (
            lambda: metrics.ece(PROBS, Y.double() / 2),
            r"y must be whole numbers from 0 to 2, as .* values from 0 to 0.5",
        ),
        (lambda: metrics.ece(PROBS, Y, num_bins=0), r"num_bins must be a whole number of at least 1"),
        (
            lambda: metrics.accuracy(PROBS.tolist(), Y),
            r"prediction must be a Prediction or probabilities .* got a list",
        ),
        (lambda: metrics.accuracy(PROBS[:0], Y[:0]), r"y must be labels"),
        (
            lambda: metrics.rmse(PROBS, Y),
            r"y must be real numbers, one for each of prediction, shape \(4, 3\), got shape",
        ),
        (lambda: metrics.auroc_ood(PROBS, PROBS[:0]), r"outside must be a Prediction, probabilities"),
        (lambda: metrics.auroc_ood(PROBS * math.nan, PROBS), r"inside must be a Prediction, probabilities"),
        (lambda: metrics.auroc_ood(PROBS, PROBS.log()), r"outside must be probabilities, .*logits.softmax\(-1\)"),
        (lambda: metrics.auroc_ood(100 * PROBS, PROBS), r"inside must be probabilities, from 0 to 1"),
        (lambda: metrics.interval_coverage(PROBS * math.nan, PROBS[0]), r"prediction has NaN"),
        (lambda: metrics.interval_coverage(PROBS, PROBS[0] * math.nan), r"y must be observations, none of them NaN"),
        (lambda: metrics.interval_coverage(PROBS[:, :0], PROBS[0, :0]), r"y must be observations"),
        (
            lambda: metrics.interval_coverage(PROBS, Y),
            r"must be real draws \(S, \*y.shape\) for y of shape \(4,\), got",
        ),
        (lambda: metrics.interval_coverage(PROBS, Y, level=1.0), r"level must be between 0 and 1, got level=1.0"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_without_torchmetrics_its_metrics_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    with pytest.raises(ImportError, match=r'pip install "pyro-sam\[metrics\]"'):
        metrics.accuracy(PROBS, Y)
    assert metrics.brier(PROBS, Y) > 0
