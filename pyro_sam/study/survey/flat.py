"""How flat the loss is at the means of trained replicas."""

from collections.abc import Sequence
from typing import Any

import pyro_sam as ps
from pyro_sam.study.survey.problems import Problem

_ROWS, _RUNS = 512, 3


def flatness(svi: Any, problems: Sequence[Problem], members: int) -> list[dict[str, float]]:
    r"""Return :math:`\lambda_{\max}` and trace of the Hessian of the loss per training row, of the first runs.

    Args:
        svi: Model and guide, trained.
        problems: Problem of each run.
        members: Replicas of a run.
    Returns:
        A dict for each run, empty beyond the first few: what they cost is a good part of a training.
    """
    return [_flatness(svi, k * members, each) if k < _RUNS else {} for k, each in enumerate(problems)]


def _flatness(svi: Any, r: int, problem: Problem) -> dict[str, float]:
    guide, x, y = svi.guide.replica(r), problem.x[:_ROWS], problem.y[:_ROWS]
    try:
        largest = float(ps.flatness.hessian_eigenvalues(svi.model, guide, x, y, tol=1e-2)[0])
        trace = ps.flatness.hessian_trace(svi.model, guide, x, y, num_probes=30)
        worst = ps.flatness.sharpness(svi.model, guide, x, y, rho=0.1, num_steps=10)
        average = ps.flatness.average_sharpness(svi.model, guide, x, y, rho=1.0, num_directions=20)
    except (ValueError, RuntimeError):  # of a replica that ended in NaN
        return {}
    found = {"lambda_max": largest, "trace": trace, "sharpness": worst, "average_sharpness": average}
    return {name: value / len(problem.x) for name, value in found.items()}
