"""A study that several processes share: every trial that counts is finished once, whoever dies."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pyro_sam.tuning.space import Space, optuna, plain, suggest
from pyro_sam.tuning.trials import Outcome
from pyro_sam.tuning.workers import Worker

_KEY = "pyro_sam"


class Ledger:
    """Takes trials from a study and tells it how they ended.

    A trial counts unless it is void: one that a dead process held (its settings are waiting again, as another trial),
    one that was queued twice, one too many. A void trial is a failed one with the reason in its attribute ``void``.

    Args:
        study: The study.
        space: What is searched.
        num_trials: Number of trials that are to count.
        patience: Seconds without a sign of life after which a process elsewhere is taken for dead.
    """

    def __init__(self, study: Any, space: Space, num_trials: int, patience: float) -> None:
        self.study, self.space, self.num_trials = study, space, num_trials
        self.worker = Worker(study, patience)
        self._mine: dict[int, Any] = {}  # trials that this process runs
        self._states = optuna().trial.TrialState

    def open(self, numbers: Mapping[str, int]) -> None:
        """Begin, or go on with, a study.

        Args:
            numbers: What must be equal for its trials to compare.
        Raises:
            ValueError: If the study is not for this search; it is as it was.
        """
        write = optuna().distributions.distribution_to_json
        mine = {"space": {name: write(each) for name, each in sorted(self.space.items())}, **numbers}
        self._check(mine)
        self.study.set_user_attr(_KEY, mine)
        if not any(trial.user_attrs.get("again") == "first" for trial in self._trials()):
            self._queue(plain(self.space), "first")

    def _check(self, mine: dict[str, Any]) -> None:
        if len(self.study.directions) != 1 or self.study.directions[0].name != "MINIMIZE":
            raise ValueError("study must minimise one number, the NLL: optuna.create_study(direction='minimize').")
        kept = self.study.user_attrs.get(_KEY)
        if kept is None:
            other = {
                name for trial in self._trials() for name in trial.params.keys() ^ self.space.keys() if trial.params
            }
            if other:
                raise ValueError(_OTHER.format(f"its trials and space differ in {', '.join(sorted(other))}"))
            return
        names = kept["space"].keys() | mine["space"].keys()
        there, here = kept["space"], mine["space"]
        changed = sorted(name for name in names if there.get(name) != here.get(name))
        if changed:
            what = (
                f"{changed[0]} is {there.get(changed[0], 'not in it')} there, {here.get(changed[0], 'not in it')} here"
            )
            raise ValueError(_OTHER.format(what))
        for name in mine.keys() - {"space"}:
            if kept.get(name) != mine[name]:
                raise ValueError(
                    f"study was made with {name}={kept.get(name)}, and its trials do not compare with those of "
                    f"{name}={mine[name]}; use that number, or another study."
                )

    # Taking trials

    def take(self, most: int) -> list[Any]:
        """Return up to so many trials that this process is to run; none where nothing is left to begin."""
        self._retry()
        taken: list[Any] = []
        while len(taken) < most and sum(map(self._is_begun, self._trials())) < self.num_trials:
            trial = self.study.ask()
            self._mine[trial.number] = trial
            with suppress(optuna().exceptions.UpdateFinishedTrialError):  # others took it for lost meanwhile
                trial.set_user_attr("worker", self.worker.name)
                void = self._is_void(trial)
                for name, distribution in self.space.items():
                    suggest(trial, name, distribution)
                if void:
                    self._drop(trial.number, void)
                else:
                    taken.append(trial)
        return taken

    def _is_void(self, trial: Any) -> str:
        again, before = trial.user_attrs.get("again"), [each for each in self._trials() if each.number < trial.number]
        if again is not None:
            return "queued twice" if any(each.user_attrs.get("again") == again for each in before) else ""
        # numbers are given one by one, so that of processes that ask at once all agree on who came too late
        return "one too many" if sum(map(self.counts, before)) >= self.num_trials else ""

    def _retry(self) -> None:
        """Queue the settings of trials whose process has died again."""
        trials = self._trials()
        for trial in trials:
            held = trial.state == self._states.RUNNING and trial.number not in self._mine
            if held and self.worker.is_dead(trial.user_attrs.get("worker", f"trial {trial.number}")):
                self._give_back(trial, trials, "its process died")

    def _give_back(self, trial: Any, trials: Sequence[Any], why: str) -> None:
        # queued first: whoever is killed between the two leaves a trial that the next one drops
        queued = "void" in trial.user_attrs or any(each.user_attrs.get("again") == trial.number for each in trials)
        if not queued:
            self._queue({**trial.system_attrs.get("fixed_params", {}), **trial.params}, trial.number)
        self._drop(trial.number, f"{why}; tried again")

    def _queue(self, params: dict[str, Any], again: Any) -> None:
        self.study.enqueue_trial(params, user_attrs={"again": again})

    def _drop(self, number: int, why: str) -> None:
        trial = self._trials()[number]
        with suppress(optuna().exceptions.UpdateFinishedTrialError):  # its process was not dead after all
            self.study._storage.set_trial_user_attr(trial._trial_id, "void", why)
            self.study.tell(number, state=self._states.FAIL, skip_if_finished=True)
        self._mine.pop(number, None)

    # Ending trials

    def finish(self, trial: Any, outcome: Outcome) -> bool:
        """Tell how a trial of this process ended, unless others took it for lost; return whether it counts."""
        failed, states = not math.isfinite(outcome.nll), self._states
        state = states.FAIL if failed else states.PRUNED if outcome.pruned else states.COMPLETE
        facts: dict[str, Any] = {"why": outcome.why} if failed else {"nll": outcome.nll, "epoch": outcome.epoch}
        try:
            for name, value in facts.items():
                trial.set_user_attr(name, value)
            nll = outcome.nll if state == states.COMPLETE else None
            told = self.study.tell(trial, nll, state=state, skip_if_finished=True)
        except optuna().exceptions.UpdateFinishedTrialError:
            return False
        finally:
            self._mine.pop(trial.number, None)
        return told.state == state and self.counts(told)

    def release(self) -> None:
        """Give back the trials that this process has not finished."""
        trials = self._trials()
        for number in list(self._mine):
            self._give_back(trials[number], trials, "interrupted")

    # Looking at trials

    def counts(self, trial: Any) -> bool:
        """Return whether a trial is one of those that are asked for."""
        return not (trial.state == self._states.FAIL and "void" in trial.user_attrs)

    def counted(self) -> list[Any]:
        """Return the trials that count and are finished."""
        return [trial for trial in self._trials() if trial.state.is_finished() and self.counts(trial)]

    def _is_begun(self, trial: Any) -> bool:
        return trial.state != self._states.WAITING and self.counts(trial)

    def _trials(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)


_OTHER = "study was made with another space: {}; give this search a study of its own."
