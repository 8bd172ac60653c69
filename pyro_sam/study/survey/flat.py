"""How flat the loss is at the means of trained replicas."""

from collections.abc import Sequence
from typing import Any

import pyro_sam as ps
from pyro_sam.study.begun import BEGUN, key
from pyro_sam.study.survey.methods import METHODS
from pyro_sam.study.survey.problems import Draws, Problem
from pyro_sam.study.survey.records import FLATNESS, Records
from pyro_sam.study.survey.sizes import Size
from pyro_sam.study.survey.training import Task, train

RUNS = 3  # that are measured: what it costs is a good part of a training
_ROWS = 512
# what the methods are compared at where only the noise is to differ
_SHARED = {"kl_weight": 0.01, "lr": 0.001}
_OWN = {
    "map": {},
    "sam": {"rho": 0.2},
    "random-sam": {"rho": 1.0},
    "mfvi": {},
    "antithetic": {},
    "ascended": {"alpha": 5.0},
    "variational-sam": {"rho": 5.0},
}


def at_equal_settings(records: Records, draws: Draws, size: Size) -> None:
    """Train some methods at the same ``kl_weight`` and learning rate for the same number of steps, and record it.

    Tuned methods differ in more than their noise; these do not.

    Args:
        records: Where the runs are kept.
        draws: The data set.
        size: Twice the number of steps (a method that takes two gradients a step has all of its gradients), and the
            number of runs of each.
    Raises:
        OutputError: If there are runs with other arguments, or on other data.
    """
    data, steps, seeds = draws.source.name, size.budget(draws.source) // 2, size.seeds
    begun_with = key(draws.checksum(), {"steps": steps, "autocast": size.autocast})
    problems, rows = draws.final(seeds), []
    for name in _OWN:
        records.of({"data": data, "method": name}, begun_with, FLATNESS)
    for name, own in _OWN.items():
        task = Task(METHODS[name], draws.source, round(steps * METHODS[name].cost), size.autocast)
        settings, flat = {**_SHARED, **own}, list[dict[str, float]]()
        outcomes = train(
            task,
            [settings] * seeds,
            problems,
            num_samples=64,
            look=lambda svi, part, flat=flat: flat.extend(flatness(svi, part, 1, seeds)),  # type: ignore[misc]
        )
        about = {"data": data, "method": name, "settings": settings, BEGUN: begun_with}
        rows += [
            {**about, "seed": k, "metrics": outcome.metrics, "flat": flat[k]} for k, outcome in enumerate(outcomes)
        ]
    records.add(rows, FLATNESS)


def flatness(svi: Any, problems: Sequence[Problem], members: int, runs: int = RUNS) -> list[dict[str, float]]:
    r"""Return :math:`\lambda_{\max}` and trace of the Hessian of the loss per training row, of the first runs.

    Args:
        svi: Model and guide, trained.
        problems: Problem of each run.
        members: Replicas of a run.
        runs: Number of runs that are measured, the first ones.
    Returns:
        A dict for each run, empty for those that are not measured.
    """
    return [_flatness(svi, k * members, each) if k < runs else {} for k, each in enumerate(problems)]


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
