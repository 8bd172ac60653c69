"""What one setting alone changes: all others are those that were chosen for the method, or for the baseline."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pyro_sam.study.survey.methods import METHODS
from pyro_sam.study.survey.problems import Draws
from pyro_sam.study.survey.records import SENSITIVITY, Records
from pyro_sam.study.survey.statistics import BASELINE, Rows
from pyro_sam.study.survey.training import Task, train


class Sweep(NamedTuple):
    """A setting and what it is tried at.

    Args:
        methods: Names of the methods that it is tried with.
        values: Its values.
    """

    methods: tuple[str, ...]
    values: tuple[float, ...]


_BOTH = BASELINE, "ascended-previous"
SWEEPS: dict[str, Sweep] = {
    "alpha": Sweep(("ascended", "ascended-previous"), (-3.0, 0.0, 1.0, 3.0, 6.0, 10.0, 15.0)),
    "rho": Sweep(("variational-sam",), (0.0, 1.0, 3.0, 10.0, 30.0)),
    "kappa": Sweep(("mix-sam",), (0.0, 0.3, 1.0, 3.0, 10.0)),
    "kl_weight": Sweep(_BOTH, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)),
    "lr": Sweep(_BOTH, (0.0003, 0.001, 0.003, 0.01, 0.03)),
    "init_scale": Sweep(_BOTH, (0.002, 0.005, 0.02, 0.05, 0.1, 0.3)),
    "batch_size": Sweep(_BOTH, (8, 16, 32, 64)),
}
_NUMBERS = {"alpha": 3.0, "rho": 5.0, "kappa": 1.0}  # of a method that was not tuned


def sensitivity(
    records: Records,
    draws: Draws,
    sweeps: Mapping[str, Sweep],
    seeds: int,
    say: Callable[[str], None],
    at: tuple[Mapping[str, float], int] | None = None,
) -> None:
    """Do what is left of the sweeps on a data set: each value with each seed, side by side, gradients as in the study.

    Args:
        records: Runs of the study, whose chosen settings are taken, and where those of the sweeps are kept.
        draws: The data set.
        sweeps: The sweeps by setting.
        seeds: Number of runs of each value.
        say: Called with a line for each sweep that is done, or cannot be.
        at: Other settings, and the gradients of a run, in the place of those that the study chose.
    """
    data = draws.source.name
    for setting, sweep in sweeps.items():
        for name in sweep.methods:
            with records.claim(data, f"{name}.{setting}") as mine:
                left = sweep._replace(values=_left(records, data, name, setting, sweep.values, seeds))
                if not mine or not left.values:
                    continue
                base = _base(records.read(), data, name, setting, at)
                if base is None:
                    say(f"{data}, {name}: no settings of {name} or {BASELINE} to begin from; run the study first")
                    continue
                records.add(_sweep(draws, name, setting, left.values, base, seeds), SENSITIVITY)
                say(f"{data}, {name}: {setting}")


def _left(
    records: Records, data: str, method: str, setting: str, values: Sequence[float], seeds: int
) -> tuple[float, ...]:
    """Return the values that have not run with all seeds."""
    wanted = data, method, setting
    rows = [row for row in records.read(SENSITIVITY) if (row["data"], row["method"], row["setting"]) == wanted]
    done = {(row["value"], row["seed"]) for row in rows}
    return tuple(value for value in values if not done >= {(value, seed) for seed in range(seeds)})


def _base(
    rows: Rows, data: str, method: str, setting: str, at: tuple[Mapping[str, float], int] | None
) -> tuple[dict[str, float], int] | None:
    """Return the settings chosen for a method, or the baseline's with numbers of our own, and the gradients.

    The number that makes the method the baseline where it is 0 is varied at the baseline's settings.
    """
    if at is not None:
        others = {name: value for name, value in at[0].items() if name not in _NUMBERS or name in METHODS[method].space}
        return {**{number: _NUMBERS[number] for number in METHODS[method].space}, **others}, at[1]
    for name in (BASELINE, method) if setting == METHODS[method].zero else (method, BASELINE):
        found = next((row for row in rows if (row["data"], row["method"]) == (data, name) and "settings" in row), None)
        if found:
            own = {number: _NUMBERS[number] for number in METHODS[method].space}
            return {**own, **found["settings"]}, found["gradients"]
    return None


def _sweep(
    draws: Draws, name: str, setting: str, values: Sequence[float], base: tuple[dict[str, float], int], seeds: int
) -> list[dict[str, Any]]:
    settings, gradients = base
    problems, found = draws.final(seeds), []
    for together, source in _together(draws, setting, values):
        pairs = [(value, seed) for value in together for seed in range(seeds)]
        each = [settings if setting == "batch_size" else {**settings, setting: value} for value, _ in pairs]
        task = Task(METHODS[name], source, gradients)
        outcomes = train(task, each, [problems[seed] for _, seed in pairs], num_samples=64, seed=3)
        about = {"data": draws.source.name, "method": name, "setting": setting}
        found += [
            {**about, "value": value, "seed": seed, "settings": mine, "metrics": outcome.metrics}
            for (value, seed), mine, outcome in zip(pairs, each, outcomes, strict=True)
        ]
    return found


def _together(draws: Draws, setting: str, values: Sequence[float]) -> list[tuple[Sequence[float], Any]]:
    """Return the values that run side by side, and the data set with its minibatches."""
    if setting != "batch_size":
        return [(values, draws.source)]
    return [((value,), dataclasses.replace(draws.source, batch_size=int(value))) for value in values]
