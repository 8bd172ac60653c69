"""What alpha alone changes: all other settings are those that were chosen for the baseline."""

from typing import Any

from pyro_sam.study.survey.methods import METHODS
from pyro_sam.study.survey.problems import SOURCES, Draws
from pyro_sam.study.survey.statistics import BASELINE, Rows
from pyro_sam.study.survey.training import Task, train

ALPHAS = (-3.0, 0.0, 1.0, 3.0, 10.0)


def at_alphas(rows: Rows, draws: Draws, seeds: int) -> list[dict[str, Any]]:
    """Train the ascended samples at each alpha and seed, all side by side, with the baseline's settings and gradients.

    Args:
        rows: Runs of the study, those of the baseline on this data set among them.
        draws: The data set.
        seeds: Number of runs of each.
    Returns:
        The records, a run each, with the alpha in the method's name; none without runs of the baseline.
    """
    data, found = draws.source.name, []
    base = [row for row in rows if (row["data"], row["method"]) == (data, BASELINE)]
    pairs = [(alpha, seed) for alpha in ALPHAS for seed in range(seeds)]
    problems = draws.final(seeds)
    for name in ("ascended", "ascended-previous") if base else ():
        task = Task(METHODS[name], SOURCES[data], base[0]["gradients"])
        settings = [{**base[0]["settings"], "alpha": alpha} for alpha, _ in pairs]
        outcomes = train(task, settings, [problems[seed] for _, seed in pairs], num_samples=64, seed=3)
        found += [
            {"data": data, "method": name, "alpha": alpha, "seed": seed, "metrics": outcome.metrics}
            for (alpha, seed), outcome in zip(pairs, outcomes, strict=True)
        ]
    return found
