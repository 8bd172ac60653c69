"""What one setting alone changes: all others are those that were chosen for the method, or for the baseline."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, product
from typing import Any, NamedTuple

from pyro_sam.study.begun import BEGUN, key
from pyro_sam.study.survey.methods import METHODS
from pyro_sam.study.survey.problems import Draws, Source
from pyro_sam.study.survey.records import SENSITIVITY, Records
from pyro_sam.study.survey.sizes import Size
from pyro_sam.study.survey.statistics import BASELINE, Rows
from pyro_sam.study.survey.training import Outcome, Task, train


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
    size: Size,
    say: Callable[[str], None],
    at: Mapping[str, float] | None = None,
) -> None:
    """Do what is left of the sweeps on a data set: each value with each seed, side by side, gradients as in the study.

    Args:
        records: Runs of the study, whose chosen settings are taken, and where those of the sweeps are kept.
        draws: The data set.
        sweeps: The sweeps by setting.
        size: Number of runs of each value, and their gradients where those of the study are not to be taken.
        say: Called with a line for each sweep that is done, or cannot be.
        at: Other settings, in the place of those that the study chose.
    Raises:
        OutputError: If there are runs with other arguments, or on other data.
    """
    data, checksum = draws.source.name, draws.checksum()
    for setting, sweep in sweeps.items():
        for name in sweep.methods:
            with records.claim(data, f"{name}.{setting}") as mine:
                pairs = list(product(sweep.values, range(size.seeds)))
                base = _base(records.read(), draws, name, setting, at, size)
                if base is None:
                    say(f"{data}, {name}: no settings of {name} or {BASELINE} to begin from; run the study first")
                    continue
                begun_with = key(checksum, _arguments(size, setting, *base))
                left = _left(records, {"data": data, "method": name, "setting": setting}, pairs, begun_with)
                if not mine or not left:
                    continue
                for part, source, first in _together(draws, setting, left, pairs.index(left[0])):
                    task = Task(METHODS[name], source, base[1], size.autocast)
                    _sweep(draws, task, setting, part, first, base[0], begun_with, records, say)
                say(f"{data}, {name}: {setting}")


def _left(
    records: Records, task: Mapping[str, str], pairs: Sequence[tuple[float, int]], begun_with: Mapping[str, Any]
) -> list[tuple[float, int]]:
    """Return the values and seeds that have not run."""
    done = {(row["value"], row["seed"]) for row in records.of(task, begun_with, SENSITIVITY)}
    return [pair for pair in pairs if pair not in done]


def _arguments(size: Size, setting: str, settings: Mapping[str, float], gradients: int) -> dict[str, Any]:
    """Return the arguments of a run of a sweep, but for its value and its seed."""
    others = {name: value for name, value in settings.items() if name != setting}
    about = {name: getattr(size, name) for name in ("num_samples", "test_rows", "autocast")}
    return {**others, "gradients": gradients, **about}


def _base(
    rows: Rows, draws: Draws, method: str, setting: str, at: Mapping[str, float] | None, size: Size
) -> tuple[dict[str, float], int] | None:
    """Return the settings chosen for a method, or the baseline's with numbers of our own, and the gradients.

    The number that makes the method the baseline where it is 0 is varied at the baseline's settings.
    """
    if at is not None:
        others = {name: value for name, value in at.items() if name not in _NUMBERS or name in METHODS[method].space}
        return {**{number: _NUMBERS[number] for number in METHODS[method].space}, **others}, size.budget(draws.source)
    for name in (BASELINE, method) if setting == METHODS[method].zero else (method, BASELINE):
        found = next(
            (row for row in rows if (row["data"], row["method"]) == (draws.source.name, name) and "settings" in row),
            None,
        )
        if found:
            own = {number: _NUMBERS[number] for number in METHODS[method].space}
            return {**own, **found["settings"]}, size.equal_budget or found["gradients"]
    return None


def _sweep(
    draws: Draws,
    task: Task,
    setting: str,
    pairs: Sequence[tuple[float, int]],
    first: int,
    settings: dict[str, float],
    begun_with: Mapping[str, Any],
    records: Records,
    say: Callable[[str], None],
) -> None:
    """Train at each value with the seed beside it, and record the runs as they are done."""
    problems = draws.final(1 + max(seed for _, seed in pairs))
    each = [settings if setting == "batch_size" else {**settings, setting: value} for value, _ in pairs]
    about = {"data": draws.source.name, "method": task.method.name, "setting": setting, BEGUN: begun_with}

    def keep(start: int, outcomes: Sequence[Outcome]) -> None:
        done = start + len(outcomes)
        records.add(
            [
                {**about, "value": value, "seed": seed, "settings": mine, "metrics": outcome.metrics}
                for (value, seed), mine, outcome in zip(pairs[start:done], each[start:done], outcomes, strict=True)
            ],
            SENSITIVITY,
        )
        if done < len(pairs):
            say(f"{about['data']}, {about['method']}: {setting}, {done} of {len(pairs)} runs")

    chosen, num_samples = [problems[seed] for _, seed in pairs], begun_with["num_samples"]
    train(task, each, chosen, num_samples=num_samples, seed=3 + first, keep=keep)


def _together(
    draws: Draws, setting: str, left: Sequence[tuple[float, int]], first: int
) -> list[tuple[Sequence[tuple[float, int]], Source, int]]:
    """Return the values and seeds that run side by side, the data set with its minibatches, and the first's number."""
    if setting != "batch_size":
        return [(left, draws.source, first)]
    groups = [(value, list(part)) for value, part in groupby(left, lambda pair: pair[0])]
    return [(part, dataclasses.replace(draws.source, batch_size=int(value)), part[0][1]) for value, part in groups]
