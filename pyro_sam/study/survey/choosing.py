"""Settings chosen on validation rows: trials side by side, then the best of them again on every tuning split.

A method whose own number may be zero, where it is plain variational inference or a network without a climb, has three
quarters of its trials there, the very ones that a method without such a number begins with; the others climb from the
best of these. It ends at another number only where that is ahead of the best zero by more than one standard error over
the tuning splits (the rule of one standard error, Breiman et al. 1984): what validation rows cannot tell apart is no
reason to leave the simpler method. A method that may mix gives half of its climbs to mixtures, and the rule holds for
these too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyro_sam as ps
from pyro_sam.study.begun import key, search
from pyro_sam.study.survey.problems import Problem
from pyro_sam.study.survey.sizes import Size
from pyro_sam.study.survey.training import Minibatches, Outcome, Task, apart, train

_SOBOL = 32  # trials that are no choice of the sampler
_BASES = 5  # settings at zero that the climbs go on from
_FASTER = 8.0  # largest factor of a mixture's learning rate
_AT_ZERO = 3 / 4  # share of the trials of a method with a zero


def choose(task: Task, problems: Sequence[Problem], size: Size, file: Path) -> tuple[dict[str, float], float]:
    """Return the chosen settings, and their mean validation NLL on the tuning splits.

    Args:
        task: Method, data set and budget.
        problems: The tuning splits; trials run on the first.
        size: Number of trials and of finalists.
        file: Optuna's journal, which a killed search goes on from, among its finalists too, and processes share.
    Returns:
        Settings and NLL; of equal number of trials and finalists whatever the method.
    Raises:
        ValueError: If no trial ended with a finite NLL.
        OutputError: If the file is of a search with other arguments, or on other data.
    """
    with apart(0):
        study = _study(task, problems[0], size, file)
        finalists = _search(task, problems[0], size, file, study)
    if not finalists:
        raise ValueError(f"no trial of {task.method.name} ended with a finite NLL.")
    alike = groupby(finalists, lambda each: each.get("members"))
    found = torch.cat([_again(task.of(part[0]), part, problems, study) for part in ([*each] for _, each in alike)])
    best = chosen(finalists, found.nan_to_num(math.inf, posinf=math.inf), task.method.zero)
    return finalists[best], float(found[best].mean())


def _again(task: Task, finalists: list[dict[str, float]], problems: Sequence[Problem], study: Any) -> Tensor:
    """Return the validation NLL of settings of one number of members, shape ``(finalists, splits)``.

    The study keeps what is done, and those that a kill left out are trained from the seeds that they would have had.
    """
    name = f"finalists of {task.method.members}"
    kept = study.user_attrs.get(name, {})
    nll: list[float] = kept["nll"] if kept.get("settings") == finalists else []

    def keep(first: int, outcomes: Sequence[Outcome]) -> None:
        nll.extend(outcome.metrics["nll"] for outcome in outcomes)
        study.set_user_attr(name, {"settings": finalists, "nll": nll})

    if left := [(settings, problem) for settings in finalists for problem in problems][len(nll) :]:
        train(task, *zip(*left, strict=True), num_samples=64, seed=1 + len(nll), keep=keep)
    return torch.tensor(nll).view(len(finalists), -1)


def chosen(finalists: Sequence[Mapping[str, float]], nll: Tensor, zero: str | None) -> int:
    """Return the place of the finalist with the smallest mean, or of the best zero where that is not clear of it.

    Args:
        finalists: Their settings.
        nll: Validation NLL, shape ``(finalists, splits)``.
        zero: The number that may be 0; None for a method without one.
    """
    means = nll.mean(1)
    best = int(means.argmin())
    zeros = [k for k, settings in enumerate(finalists) if zero and _is_plain(settings, zero)]
    if best in zeros or not zeros:
        return best
    plain = min(zeros, key=lambda k: float(means[k]))
    ahead = nll[plain] - nll[best]
    error = float(ahead.std()) / len(ahead) ** 0.5 if len(ahead) > 1 else 0.0
    return best if math.isinf(error) or math.isnan(error) or float(ahead.mean()) > error else plain


def _is_plain(settings: Mapping[str, float], zero: str) -> bool:
    return settings[zero] == 0 and settings.get("members", 1) == 1


def _search(task: Task, problem: Problem, size: Size, file: Path, study: Any) -> list[dict[str, float]]:
    """Return the settings of the best trials; five of eight are at zero where the method has one, four if it mixes."""
    from optuna.samplers import PartialFixedSampler

    space, zero = task.method.distributions(), task.method.zero
    run = _ask if task.method.own or task.method.members > 1 else _tune
    at_zero = round(size.trials * _AT_ZERO) if zero else size.trials
    free, sampler = {name: space[name] for name in space if name != zero}, study.sampler
    _once(study, "spread", lambda: _enqueue(study, free, [{zero: 0.0} if zero else {}], at_zero))
    study.sampler = PartialFixedSampler({zero: 0.0}, sampler) if zero else sampler
    run(task, problem, size, study, at_zero)
    if not zero:
        return _best(study.trials)[: size.finalists]
    study.sampler, bases = sampler, _best(study.trials[:at_zero])[:_BASES] or [{}]
    mixtures = (size.trials - at_zero) // 2 if task.method.mixes > 1 else 0
    climbs = size.trials - at_zero - mixtures
    _once(study, "climbs", lambda: _enqueue(study, {zero: space[zero]}, bases, climbs, skip=0))
    run(task, problem, size, study, at_zero + climbs)
    found, most = _best(study.trials), math.ceil(size.finalists * 5 / 8)
    zeros, others = ([each for each in found if (each[zero] == 0) is is_zero] for is_zero in (True, False))
    if not mixtures or not bases[0]:
        return (zeros[:most] + others)[: size.finalists]
    mixed = _mixed(task, problem, size, file.with_suffix(".mixed.log"), bases, mixtures)
    few = math.ceil(size.finalists / 4)
    return (zeros[: max(1, size.finalists - 2 * few)] + others[:few] + mixed[:few])[: size.finalists]


def _mixed(
    task: Task, problem: Problem, size: Size, file: Path, bases: Sequence[dict[str, float]], number: int
) -> list[dict[str, float]]:
    """Return the settings of mixtures, the best first: bases with a learning rate up to eight times as large.

    Each member has but a share of the gradients.
    """
    from scipy.stats.qmc import Sobol

    task = task.of({"members": task.method.mixes})
    study, largest = _study(task, problem, size, file), task.method.distributions()["lr"].high

    def enqueue() -> None:
        for k, (u,) in enumerate(Sobol(1, seed=0).random(number)):
            base = bases[k % len(bases)]
            study.enqueue_trial({**base, "lr": min(base["lr"] * _FASTER**u, largest)})

    _once(study, "mixtures", enqueue)
    _ask(task, problem, size, study, number)
    return [{**each, "members": task.method.members} for each in _best(study.trials)]


def _once(study: Any, phase: str, do: Callable[[], None]) -> None:
    """Do something at a search's first look at a phase, by whichever process that is."""
    if phase not in study.user_attrs:
        study.set_user_attr(phase, True)
        do()


def _best(trials: Sequence[Any]) -> list[dict[str, float]]:
    good = sorted((trial for trial in trials if trial.values), key=lambda trial: trial.value)
    return [dict(trial.params) for trial in good]


def _tune(task: Task, problem: Problem, size: Size, study: Any, trials: int) -> None:
    with task.precision(problem.x.device):
        ps.tune(
            lambda numbers: task.svi(numbers, problem),
            task.method.distributions(),
            Minibatches(problem, task.source.batch_size, task.steps, seed=0),
            ps.Validation((problem.x_out, problem.y_out), num_samples=32, samples_at_once=min(32, task.source.at_once)),
            num_trials=trials,
            num_epochs=1,  # the NLL at the end is what counts
            study=study,
            max_replicas=min(size.max_replicas, task.source.side_by_side),
            progress=False,
        )


def _ask(task: Task, problem: Problem, size: Size, study: Any, trials: int) -> None:
    """Do what :func:`_tune` does for a method that Pyro's SVI does not train, or of which several are mixed."""
    space = task.method.distributions()
    while left := trials - sum(trial.state.is_finished() for trial in study.trials):
        together = 1 if task.method.plain else max(1, size.max_replicas // task.method.members)  # a kill takes few
        asked = [study.ask(space) for _ in range(min(left, together))]
        outcomes = train(task, [trial.params for trial in asked], [problem] * len(asked), num_samples=32)
        for trial, outcome in zip(asked, outcomes, strict=True):
            nll = outcome.metrics["nll"]
            study.tell(trial, nll if math.isfinite(nll) else None, state=_state(nll))


def _state(nll: float) -> Any:
    from optuna.trial import TrialState

    return TrialState.COMPLETE if math.isfinite(nll) else TrialState.FAIL


def _study(task: Task, problem: Problem, size: Size, file: Path) -> Any:
    from optuna.samplers import TPESampler

    here = {name: getattr(size, name) for name in ("trials", "max_replicas", "autocast")}
    here = key(problem.checksum(), {**here, "gradients": task.gradients, "members": task.method.members})
    return search(file, here, TPESampler(seed=0, constant_liar=True))


def _enqueue(study: Any, space: dict[str, Any], bases: list[dict[str, float]], number: int, skip: int = 1) -> None:
    """Enqueue settings: each of the bases in turn, and what it lacks from a Sobol' sequence, which spreads evenly."""
    from scipy.stats.qmc import Sobol

    for k, point in enumerate(Sobol(len(space), seed=0).random(min(number, _SOBOL))[skip:]):
        drawn = {name: _at(each, u) for (name, each), u in zip(space.items(), point, strict=True)}
        study.enqueue_trial({**bases[k % len(bases)], **drawn})


def _at(distribution: Any, u: float) -> float:
    """Return the value at a share of a range."""
    low, high = distribution.low, distribution.high
    if distribution.log:
        return float(low * (high / low) ** u)
    return float(low + (high - low) * u)
