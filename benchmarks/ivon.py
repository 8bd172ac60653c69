r"""IVON, by the package ``ivon-opt``, among the methods of the study: a natural gradient for a mean-field posterior.

The package is under the GPL, so that the library itself does not import it: ``python -m benchmarks.ivon`` is
``pyro-sam study`` with one method more, ``ivon``.

It minimises :math:`\mathrm{ess} \cdot E_q[\text{loss per row}] + \mathrm{KL}(q \| N(0, 1 / (\mathrm{ess} \cdot
\delta)))`, so that with :math:`\mathrm{ess} = N / \mathrm{kl\_weight}` and the weight decay :math:`\delta =
\text{precision of the prior} / \mathrm{ess}` the objective is that of ``mfvi`` over ``kl_weight``.

References:
    Shen et al. (2024), "Variational learning is effective for large deep networks", arXiv:2402.17641.
"""

import dataclasses
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from pyro_sam.study import cli
from pyro_sam.study.survey.methods import METHODS
from pyro_sam.study.survey.outside.running import RUNS
from pyro_sam.study.survey.outside.start import Start

# the package's own, 0.99999, would leave the variances of a run of some thousand steps where they began
_BETA_2 = 0.999


class Ivon:
    """A run of IVON.

    Args:
        start: Network, rows and settings.

    Attributes:
        optim: The package's optimiser.
    """

    def __init__(self, start: Start) -> None:
        from ivon import IVON

        self._plain, numbers = start.plain, start.numbers
        ess = start.num_rows / numbers["kl_weight"]
        groups = [{"params": [each], "weight_decay": tau / ess} for each, tau in start.plain.precisions().items()]
        self.optim: Any = IVON(groups, numbers["lr"], ess, hess_init=numbers["hess_init"], beta2=_BETA_2)
        self._scheduler = LambdaLR(self.optim, start.share)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take a step, the gradient at one sample."""
        with self.optim.sampled_params(train=True):
            self.optim.zero_grad()
            self._plain.nll(x, y).backward()
        self.optim.step()
        self._scheduler.step()

    def sampled(self) -> AbstractContextManager[None]:
        """Place a sample of the posterior."""
        placed: AbstractContextManager[None] = self.optim.sampled_params()
        return placed

    def centred(self) -> AbstractContextManager[None]:
        """Leave the network at the posterior's mean, where it is but for samples."""
        return nullcontext()


METHOD = dataclasses.replace(
    METHODS["dropout"],
    name="ivon",
    summary="IVON, a natural gradient for a mean-field posterior",
    space={"lr": (1e-2, 1.0, True), "hess_init": (1e-3, 1.0, True)},
    zero=None,
    needs="ivon",
)


def main() -> int:
    """Run the study with IVON among its methods."""
    METHODS["ivon"], RUNS["ivon"] = METHOD, Ivon
    return cli.main(["study", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
