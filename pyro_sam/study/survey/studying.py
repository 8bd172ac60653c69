"""The study itself: every method on every data set, each chosen and run once, by whichever process comes first."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_sam.study.begun import BEGUN
from pyro_sam.study.survey.choosing import choose
from pyro_sam.study.survey.flat import RUNS, flatness
from pyro_sam.study.survey.methods import METHODS, Method
from pyro_sam.study.survey.problems import SOURCES, Draws
from pyro_sam.study.survey.records import Records
from pyro_sam.study.survey.sizes import Size
from pyro_sam.study.survey.training import Outcome, Task, train

Say = Callable[[str], None]
_POLL = 1.0  # seconds between looks at what other processes do


def study(
    data: Sequence[str],
    methods: Sequence[str],
    size: Size,
    records: Records,
    data_dir: Path | None,
    say: Say,
    kept: Records | None = None,
) -> None:
    """Do what is left of a study; return when all of it is done, by whomever.

    Args:
        data: Names of the data sets.
        methods: Names of the methods.
        size: How large.
        records: Where the runs are kept.
        data_dir: Folder with data files.
        say: Called with a line for each task that is done.
        kept: A study whose chosen settings are taken; what it lacks is tuned.
    Raises:
        DataError: If a data set cannot be had.
        OutputError: If there are runs with other arguments, or on other data.
    """
    tasks = [(each, method) for each in data for method in _with_models(methods)]
    draws = {each: Draws(SOURCES[each], data_dir, size.test_rows, size.device) for each in data}
    begun_with = {each: size.begun_with(draws[each]) for each in data}
    while left := [task for task in tasks if _left(records, *task, size, begun_with[task[0]])]:
        worked = [_attempt(records, draws[each], method, size, begun_with[each], say, kept) for each, method in left]
        if not any(worked):
            time.sleep(_POLL)


def _with_models(methods: Sequence[str]) -> list[str]:
    """Return methods that are tuned before those that take their settings."""
    models = [METHODS[name].like for name in methods]
    names = dict.fromkeys([*(each for each in models if each), *methods])
    return sorted(names, key=lambda name: METHODS[name].like is not None)


def _left(records: Records, data: str, method: str, size: Size, begun_with: Mapping[str, Any]) -> list[int]:
    """Return the seeds that have no run."""
    done = {row["seed"] for row in records.of({"data": data, "method": method}, begun_with)}
    return [seed for seed in range(size.seeds) if seed not in done]


def _attempt(
    records: Records,
    draws: Draws,
    method: str,
    size: Size,
    begun_with: Mapping[str, Any],
    say: Say,
    kept: Records | None,
) -> bool:
    """Do a task, unless it is done or under way, or waits for another; return whether that was so."""
    data = draws.source.name
    with records.claim(data, method) as mine:
        left, began = _left(records, data, method, size, begun_with), time.monotonic()
        if not mine or not left:
            return False
        try:
            chosen = (
                _kept(records, data, method)  # of runs before it was killed
                or _kept(kept, data, METHODS[method].like or method)
                or _settings(records, draws, METHODS[method], size)
            )
            if chosen is None:
                return False
            _run(draws, METHODS[method], size, *chosen, left, begun_with, records, say)
        except ValueError as error:  # no settings of it can be trained here: that is a result too
            about = {"data": data, "method": method, BEGUN: begun_with, "failed": str(error)}
            records.add([{**about, "seed": seed} for seed in _left(records, data, method, size, begun_with)])
            say(f"{data}, {method}: failed: {error}")
            return True
        say(f"{data}, {method}: {time.monotonic() - began:.0f} s")
        return True


def _kept(kept: Records | None, data: str, method: str) -> tuple[dict[str, float], float] | None:
    rows = kept.read() if kept else []
    found = [row for row in rows if (row["data"], row["method"]) == (data, method)]
    return (found[0]["settings"], found[0]["validation"]) if found and "settings" in found[0] else None


def _settings(records: Records, draws: Draws, method: Method, size: Size) -> tuple[dict[str, float], float] | None:
    data = draws.source.name
    if method.like is None:
        task = Task(method, draws.source, _gradients(draws, size), size.autocast)
        return choose(task, draws.tuning(size.tuning_seeds), size, records.tuning(data, method.name))
    rows = [row for row in records.read() if (row["data"], row["method"]) == (data, method.like)]
    if rows and "settings" not in rows[0]:  # else it would be waited for without end
        raise ValueError(f"{method.like}, whose settings {method.name} takes, failed.")
    return (rows[0]["settings"], rows[0]["validation"]) if rows else None


def _gradients(draws: Draws, size: Size) -> int:
    return size.budget(draws.source)


def _run(
    draws: Draws,
    method: Method,
    size: Size,
    settings: dict[str, float],
    validation: float,
    left: Sequence[int],
    begun_with: Mapping[str, Any],
    records: Records,
    say: Say,
) -> None:
    """Train with each seed that is left, and record the runs as they are done."""
    method, problems = method.of(settings), draws.final(size.seeds)
    task = Task(method, draws.source, round(_gradients(draws, size) * method.budget), size.autocast)
    about = {"data": draws.source.name, "method": method.name, "settings": settings, "validation": validation}
    about |= {"gradients": task.gradients, BEGUN: begun_with}
    flat: list[dict[str, float]] = []

    def keep(first: int, outcomes: Sequence[Outcome]) -> None:
        done = enumerate(outcomes, first)
        records.add([{**about, "seed": left[k], **_fields(outcome), "flat": flat[k]} for k, outcome in done])
        if len(flat) < len(left):
            say(f"{draws.source.name}, {method.name}: {len(flat)} of {len(left)} runs")

    train(
        task,
        [settings] * len(left),
        [problems[k] for k in left],
        num_samples=size.num_samples,
        points=size.points,
        seed=2 + left[0],
        shift=True,
        look=lambda svi, part: flat.extend(flatness(svi, part, method.members, RUNS - left[0] - len(flat))),
        keep=keep,
    )


def _fields(outcome: Outcome) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in ("metrics", "at_mean", "curve", "seconds", "shift")}
