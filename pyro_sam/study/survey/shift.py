"""How a classifier of images does on images unlike those it learnt from."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import pyro_sam as ps
from pyro_sam.study.survey.problems import Problem, Source

Predict = Callable[[Tensor], ps.Prediction]
Shape = tuple[int, int, int]
_DEGREES, _NOISES = (15, 30, 45), (0.5, 1.0)
_ROWS = 500  # of the rows held out


def under_shift(predict: Predict, source: Source, problem: Problem) -> dict[str, float]:
    """Return metrics on the first 500 rows held out under each shift, and how well outliers are told from them.

    A metric's name ends in that of the shift, as in ``nll_rotated_15``: images rotated by 15, 30 and 45 degrees, and
    with pixel noise of 0.5 and 1 standard deviations of the training pixels. ``auroc_`` is the AUROC of the
    predictive's entropy for outliers: ``permuted``, the same images with their pixels in another order, and those of
    ``problem.outliers``: Fashion-MNIST's test images for MNIST and the other way round, where files hold them, and
    ``classes``, test images of the classes left out.

    Args:
        predict: Returns the prediction at inputs ``(n, d)``.
        source: Tells the shape of the images.
        problem: Rows held out, and outliers.
    Returns:
        Values by name; none unless the inputs are images.
    Raises:
        ValueError: If a prediction is not finite.
    """
    if source.image is None:
        return {}
    x, y, found = problem.x_out[:_ROWS], problem.y_out[:_ROWS], dict[str, float]()
    for name, shifted in _shifts(x, source.image, float(problem.x.min())):
        prediction = predict(shifted)
        for score in (ps.metrics.nll, ps.metrics.accuracy, ps.metrics.ece):
            found[f"{score.__name__}_{name}"] = score(prediction, y)
    inside = predict(x)
    for name, outliers in {"permuted": permuted(x, source.image), **problem.outliers}.items():
        found[f"auroc_{name}"] = ps.metrics.auroc_ood(inside, predict(outliers[:_ROWS]))
    return found


def _shifts(x: Tensor, shape: Shape, background: float) -> Iterator[tuple[str, Tensor]]:
    for degrees in _DEGREES:
        yield f"rotated_{degrees}", rotated(x, shape, degrees, background)
    for scale in _NOISES:
        yield f"noise_{scale:g}", noisy(x, scale)


def rotated(x: Tensor, shape: Shape, degrees: float, background: float) -> Tensor:
    """Return images rotated counter-clockwise around their centre, pixels interpolated linearly.

    Args:
        x: Images ``(n, height * width * channels)``, channels last.
        shape: Height, width and channels; height and width are equal.
        degrees: Angle.
        background: Value of what comes in from outside.
    """
    images = x.unflatten(-1, shape).movedim(-1, -3) - background
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = x.new_tensor([[c, -s, 0], [s, c, 0]]).expand(len(x), 2, 3)
    grid = torch.nn.functional.affine_grid(matrix, list(images.shape), align_corners=False)
    turned = torch.nn.functional.grid_sample(images, grid, align_corners=False) + background
    return turned.movedim(-3, -1).flatten(1)


def noisy(x: Tensor, scale: float) -> Tensor:
    """Return inputs with Gaussian noise of a standard deviation, the same at each call."""
    return x + scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)


def permuted(x: Tensor, shape: Shape) -> Tensor:
    """Return images whose pixels are in another order, the same for all images and at each call."""
    order = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(0))
    return x.unflatten(-1, (-1, shape[2]))[:, order].flatten(1)
