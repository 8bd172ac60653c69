r"""How flat the data loss is around a trained guide's mean.

The loss is :math:`L = -\log p(x \mid w)` in nats, summed over data and scaled as the model's plates say (for a scaled
plate, that of the whole data set; divide by its size for the loss per data point). Displacements are of the weights
(``space="weight"``, in their own units, the SAM literature's) or of the guide's noise (``space="noise"``, in
posterior standard deviations); constrained latents are displaced in their unconstrained values.

Eigenvalues are SciPy's (``pip install "pyro-sam[flatness]"``).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_sam._base.arguments import non_negative, positive_int
from pyro_sam._base.cures import explained
from pyro_sam.perturbation import unit
from pyro_sam.predictive.landscape import Landscape, Space

__all__ = ["average_sharpness", "hessian_eigenvalues", "hessian_trace", "sharpness"]


@explained
def sharpness(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    rho: float = 0.05,
    num_steps: int = 30,
    space: Space = "weight",
) -> float:
    r"""Return the worst rise of the loss in a ball, :math:`\max_{\lVert v \rVert \le \rho} L(v) - L(0)`.

    Found by projected gradient ascent, whose steps shrink to zero; a lower bound of the maximum.

    Args:
        model: Pyro model.
        guide: Its guide, trained.
        *args: Arguments of both, with the observations.
        rho: Radius of the ball, in units of the weights or in posterior standard deviations.
        num_steps: Number of gradients.
        space: ``"weight"`` or ``"noise"``.
    Returns:
        The rise in nats, not negative.
    Raises:
        ValueError: If a number is out of range, or the guide has no fitting Gaussian site.
    References:
        Foret et al. (2021), arXiv:2010.01412, Eq. 1; Keskar et al. (2017), arXiv:1609.04836.
    """
    rho, loss = non_negative("rho", rho), Landscape(model, guide, args, space)
    at_mean = best = loss.value(loss.zero)
    v = worst_step(loss, rho)
    for step in range(positive_int("num_steps", num_steps)):
        best = max(best, loss.value(v))
        v = v + 2 * rho * (1 - step / num_steps) * unit(loss.gradient(v))
        v = v * min(1.0, rho / max(v.norm().item(), torch.finfo(v.dtype).tiny))
    return max(best, loss.value(v)) - at_mean


@explained
def average_sharpness(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    rho: float = 0.05,
    num_directions: int = 50,
    space: Space = "weight",
) -> float:
    r"""Return the mean rise of the loss on a sphere, :math:`E_{\lVert v \rVert = \rho} L(v) - L(0)`.

    Estimated from random directions and their opposites, so that the loss's slope cancels out. Of a quadratic loss it
    is :math:`\rho^2 \operatorname{tr}(H) / 2d`.

    Args:
        model: Pyro model.
        guide: Its guide, trained.
        *args: Arguments of both, with the observations.
        rho: Radius of the sphere, in units of the weights or in posterior standard deviations.
        num_directions: Number of random directions; each costs two losses.
        space: ``"weight"`` or ``"noise"``.
    Returns:
        The mean rise in nats; negative where the loss is concave.
    Raises:
        ValueError: If a number is out of range, or the guide has no fitting Gaussian site.
    """
    rho, loss = non_negative("rho", rho), Landscape(model, guide, args, space)
    total = 0.0
    for _ in range(positive_int("num_directions", num_directions)):
        v = rho * unit(torch.randn_like(loss.zero))
        total += (loss.value(v) + loss.value(-v)) / 2
    return total / num_directions - loss.value(loss.zero)


@explained
def hessian_eigenvalues(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_eigenvalues: int = 1,
    tol: float = 1e-4,
    space: Space = "weight",
) -> Tensor:
    r"""Return the largest eigenvalues of the loss's Hessian at the guide's mean.

    Args:
        model: Pyro model.
        guide: Its guide, trained.
        *args: Arguments of both, with the observations.
        num_eigenvalues: How many, fewer than there are latent scalars.
        tol: Relative accuracy at which the Lanczos iteration stops; 0 for machine precision.
        space: ``"weight"``, in nats per squared unit of the weights, or ``"noise"``, in nats.
    Returns:
        Shape ``(num_eigenvalues,)``, largest first, on the CPU.
    Raises:
        ValueError: If a number is out of range, or the guide has no fitting Gaussian site.
        ImportError: If SciPy is missing.
    """
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError as error:
        raise ImportError('hessian_eigenvalues needs SciPy: pip install "pyro-sam[flatness]"') from error
    tol, loss = non_negative("tol", tol), Landscape(model, guide, args, space)
    d = len(loss.zero)
    if positive_int("num_eigenvalues", num_eigenvalues) >= d:
        raise ValueError(f"num_eigenvalues must be less than the number of latent scalars, {d}, got {num_eigenvalues}.")
    product = loss.hessian_product()

    def multiply(vector: Any) -> Any:
        return product(torch.as_tensor(vector).reshape(-1).to(loss.zero)).cpu().numpy()

    start = torch.randn_like(loss.zero).cpu().numpy()  # torch's, so that its seed decides
    if not multiply(start).any():  # a linear loss, which ARPACK has no answer for
        return torch.zeros(num_eigenvalues, dtype=loss.zero.dtype)
    hessian = LinearOperator((d, d), matvec=multiply, dtype=start.dtype)
    found = eigsh(hessian, k=num_eigenvalues, which="LA", v0=start, tol=tol, return_eigenvectors=False)
    return torch.as_tensor(found).sort(descending=True).values


@explained
def hessian_trace(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_probes: int = 50,
    space: Space = "weight",
) -> float:
    r"""Return an estimate of the trace of the loss's Hessian at the guide's mean.

    Hutchinson's, :math:`\frac1m \sum_i z_i^\top H z_i` with random signs :math:`z_i`: without error where the Hessian
    is diagonal, else of variance :math:`\frac2m \sum_{i \ne j} H_{ij}^2`.

    Args:
        model: Pyro model.
        guide: Its guide, trained.
        *args: Arguments of both, with the observations.
        num_probes: Number m of random vectors; each costs a Hessian-vector product.
        space: ``"weight"``, in nats per squared unit of the weights, or ``"noise"``, in nats.
    Returns:
        The estimate.
    Raises:
        ValueError: If a number is out of range, or the guide has no fitting Gaussian site.
    References:
        Hutchinson (1989), A stochastic estimator of the trace of the influence matrix.
    """
    loss = Landscape(model, guide, args, space)
    product, total = loss.hessian_product(), 0.0
    for _ in range(positive_int("num_probes", num_probes)):
        z = torch.randint_like(loss.zero, 2) * 2 - 1
        total += (z @ product(z)).item()
    return total / num_probes


def worst_step(loss: Landscape, rho: float) -> Tensor:
    """Return the step of length ``rho`` up the loss's gradient at the mean; a random one where that is zero."""
    gradient = loss.gradient(loss.zero)
    return rho * unit(gradient if gradient.any() else torch.randn_like(gradient))
