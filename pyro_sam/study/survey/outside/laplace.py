r"""Laplace's approximation on the last layer of a trained network, by the package ``laplace-torch``.

The network is that of ``map`` at its tuned settings, and the posterior belongs to the same objective:

.. math:: N(\hat w, (H / \mathrm{kl\_weight} + 1 / \sigma^2)^{-1})

H is the Gauss-Newton matrix of all rows in Kronecker factors, as the package does by default, ``kl_weight`` its
temperature, :math:`\sigma` the prior's standard deviation. (With temperature 1 and the prior's precision of the largest
marginal likelihood, the package's other choice, validation NLLs were worse on few images.)

References:
    Daxberger et al. (2021), "Laplace redux: effortless Bayesian deep learning", arXiv:2106.14806.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

from pyro_sam.study.survey.outside.descent import Descent
from pyro_sam.study.survey.outside.start import Plain, Start

_BATCH_SIZE = 512


class Laplace:
    """A run of Laplace's approximation.

    Args:
        start: Network, rows and settings.
    Raises:
        ValueError: If the network tells the noise of a regression.
    """

    def __init__(self, start: Start) -> None:
        if start.problem.y.is_floating_point() and start.plain.delta is None:
            raise ValueError("laplace needs a regression whose noise is one parameter: leave it out on this data set.")
        self._start, self._descent = start, Descent(start)
        self._fitted: Any = None
        self._last = last_layer(start.plain)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take a step of ``map``."""
        self._descent.step(x, y)
        self._fitted = None

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Place a sample of the last layer, whose posterior is fitted if it has not been since the last step."""
        if self._fitted is None:
            self._fitted = fit(self._start)
        kept = parameters_to_vector(self._last.parameters()).detach().clone()
        vector_to_parameters(self._fitted.sample(1)[0], self._last.parameters())
        try:
            yield
        finally:
            vector_to_parameters(kept, self._last.parameters())

    def centred(self) -> AbstractContextManager[None]:
        """Leave the network as it was trained."""
        return nullcontext()


def fit(start: Start) -> Any:
    """Return the package's posterior of the last layer, at the network as it is.

    Raises:
        ValueError: If the network has a weight that is not finite.
    """
    from laplace import Laplace as make

    plain, problem, precisions = start.plain, start.problem, start.plain.precisions()
    likelihood: dict[str, Any] = {"likelihood": "classification"}
    if problem.y.is_floating_point():
        likelihood = {"likelihood": "regression", "sigma_noise": plain.log_noise.exp().item()}
    if not parameters_to_vector(plain.parameters()).isfinite().all():
        raise ValueError("the network must have finite weights, and training has left it others: lower lr.")
    posterior = make(
        plain.net,
        **likelihood,
        subset_of_weights="last_layer",
        prior_precision=torch.tensor([precisions[each] for each in last_layer(plain).parameters()]),
        temperature=start.numbers["kl_weight"],
    )
    y = problem.y[:, None] if problem.y.is_floating_point() else problem.y
    posterior.fit(DataLoader(TensorDataset(problem.x, y), _BATCH_SIZE))
    return posterior


def last_layer(plain: Plain) -> torch.nn.Linear:
    """Return the last linear layer."""
    return [each for each in plain.net.modules() if isinstance(each, torch.nn.Linear)][-1]
