"""Settings chosen on validation rows: trials side by side, then the best of them again on every tuning split."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import pyro_sam as ps
from pyro_sam.study.survey.problems import Problem
from pyro_sam.study.survey.sizes import Size
from pyro_sam.study.survey.training import Minibatches, Task, apart, train
from pyro_sam.tuning.journal import journal

_SOBOL = 32  # first trials that are no choice of the sampler


def choose(task: Task, problems: Sequence[Problem], size: Size, file: Path) -> tuple[dict[str, float], float]:
    """Return the chosen settings, and their mean validation NLL on the tuning splits.

    Args:
        task: Method, data set and budget.
        problems: The tuning splits; trials run on the first.
        size: Number of trials and of finalists.
        file: Optuna's journal, which a killed search goes on from and processes share.
    Returns:
        Settings and NLL; of equal number of trials and finalists whatever the method.
    Raises:
        ValueError: If no trial ended with a finite NLL.
    """
    with apart(0):
        finalists = (_search_own if task.method.own else _search)(task, problems[0], size, file)
    pairs = [(settings, problem) for settings in finalists for problem in problems]
    outcomes = train(task, *zip(*pairs, strict=True), num_samples=64, seed=1)
    found = torch.tensor([outcome.metrics["nll"] for outcome in outcomes]).view(len(finalists), -1).mean(1)
    best = int(found.nan_to_num(math.inf, posinf=math.inf).argmin())
    return finalists[best], float(found[best])


def _search(task: Task, problem: Problem, size: Size, file: Path) -> list[dict[str, float]]:
    """Return the settings of the best trials."""
    space = task.method.distributions()
    tuned = ps.tune(
        lambda numbers: task.svi(numbers, problem),
        space,
        Minibatches(problem, task.source.batch_size, task.steps, seed=0),
        ps.Validation((problem.x_out, problem.y_out), num_samples=32, samples_at_once=32),
        num_trials=size.trials,
        num_epochs=1,  # the NLL at the end is what counts
        study=_study(file, space, size.trials),
        max_replicas=size.max_replicas,
        progress=False,
    )
    good = [row for row in tuned.table if row["state"] == "complete"]
    return [{name: row[name] for name in space} for row in good[: size.finalists]]


def _search_own(task: Task, problem: Problem, size: Size, file: Path) -> list[dict[str, float]]:
    """Do what :func:`_search` does for a method that Pyro's SVI does not train."""
    space = task.method.distributions()
    study = _study(file, space, size.trials)
    while left := size.trials - sum(trial.state.is_finished() for trial in study.trials):
        trials = [study.ask(space) for _ in range(min(left, size.max_replicas))]
        outcomes = train(task, [trial.params for trial in trials], [problem] * len(trials), num_samples=32)
        for trial, outcome in zip(trials, outcomes, strict=True):
            nll = outcome.metrics["nll"]
            study.tell(trial, nll if math.isfinite(nll) else None, state=_state(nll))
    good = sorted((trial for trial in study.trials if trial.values), key=lambda trial: trial.value)
    return [dict(trial.params) for trial in good[: size.finalists]]


def _state(nll: float) -> Any:
    from optuna.trial import TrialState

    return TrialState.COMPLETE if math.isfinite(nll) else TrialState.FAIL


def _study(file: Path, space: dict[str, Any], trials: int) -> Any:
    """Return the study of a file, begun with the points of a Sobol' sequence: they cover the space more evenly."""
    import optuna
    from scipy.stats.qmc import Sobol

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=journal(str(file)),
        sampler=optuna.samplers.TPESampler(seed=0, constant_liar=True),
        study_name="tune",
        load_if_exists=True,
    )
    if not study.trials:
        # one fewer: tune adds plain variational inference, with kl_weight 1 and alpha 0
        for point in Sobol(len(space), seed=0).random(min(trials, _SOBOL))[1:]:
            study.enqueue_trial({name: _at(each, u) for (name, each), u in zip(space.items(), point, strict=True)})
    return study


def _at(distribution: Any, u: float) -> float:
    """Return the value at a share of a range."""
    low, high = distribution.low, distribution.high
    if distribution.log:
        return float(low * (high / low) ** u)
    return float(low + (high - low) * u)
