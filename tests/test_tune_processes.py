"""Processes share a search and are killed in it: every trial that was asked for is finished once, none is lost."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from searcher import search, study_at

from pyro_sam.tuning import workers
from pyro_sam.tuning.workers import Worker

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture(autouse=True)
def processes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["searcher"])  # imported once, not by each process
    return found


def wait_for(what: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def in_study(path: Path) -> list[Any]:
    try:
        return list(study_at(path).get_trials(deepcopy=False))
    except KeyError:  # not begun yet
        return []


def check(path: Path, num_trials: int) -> tuple[list[Any], list[Any]]:
    """Check that all that counts is finished once; return the trials that count and those that do not."""
    trials = in_study(path)
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    good = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    void = [trial for trial in trials if "void" in trial.user_attrs]
    assert len(good) == num_trials
    assert len(good) + len(void) == len(trials)
    for trial in void:
        if "tried again" not in trial.user_attrs["void"]:
            continue
        heirs = [each for each in trials if each.user_attrs.get("again") == trial.number]
        assert len([each for each in heirs if each.user_attrs.get("void") != "queued twice"]) == 1
        for heir in heirs:
            for name in heir.params.keys() & trial.params.keys():  # one may have been killed before it had them all
                assert heir.params[name] == trial.params[name]
    settings = [tuple(sorted(trial.params.items())) for trial in good]
    assert len(set(settings)) == num_trials  # nothing ran twice
    return good, void


def test_of_two_processes_one_is_killed_and_the_other_completes_the_search(tmp_path: Path, processes: Any) -> None:
    path = tmp_path / "search.log"
    a, b = (processes.Process(target=search, args=(path, 8), kwargs={"pause": 0.3}) for _ in range(2))
    a.start()
    b.start()  # at once: on a busy machine a would be done before b had begun
    wait_for(lambda: len({trial.user_attrs.get("worker") for trial in in_study(path)} - {None}) == 2)
    mine = [trial for trial in in_study(path) if _pid(trial) == a.pid and trial.state == TrialState.RUNNING]
    wait_for(lambda: any(trial.intermediate_values for trial in in_study(path) if _pid(trial) == a.pid))
    os.kill(a.pid, signal.SIGKILL)
    a.join()
    assert a.exitcode == -signal.SIGKILL
    b.join(120)
    assert b.exitcode == 0
    good, void = check(path, 8)
    assert mine
    assert {trial.number for trial in void} == {trial.number for trial in in_study(path) if _pid(trial) == a.pid} - {
        trial.number for trial in good
    }
    assert any("its process died" in trial.user_attrs["void"] for trial in void)
    # the first trial is plain mean-field variational inference, whoever ran it
    assert [trial.params for trial in good if trial.params["kl_weight"] == 1.0] == [{"kl_weight": 1.0, "alpha": 0.0}]


def _pid(trial: Any) -> int:
    name = trial.user_attrs.get("worker")
    return -1 if name is None else int(json.loads(name)[2])


def test_a_search_that_is_killed_again_and_again_is_completed_in_the_end(tmp_path: Path, processes: Any) -> None:
    path, clock, kills = tmp_path / "search.log", random.Random(3), 0
    for _ in range(6):
        ends = [{"pause": 0.1, "dies": clock.uniform(0.1, 1.0)} for _ in range(2)]
        pair = [processes.Process(target=search, args=(path, 60), kwargs=each) for each in ends]
        for process in pair:
            process.start()
        for process in pair:
            process.join(60)
            kills += process.exitcode == -signal.SIGKILL
    assert kills == 12
    unfinished = [trial for trial in in_study(path) if not trial.state.is_finished()]
    assert unfinished, [trial.state for trial in in_study(path)]
    tuned = search(path, 60, patience=3.0)
    good, void = check(path, 60)
    assert void
    assert [row["trial"] for row in tuned.table] == [t.number for t in sorted(good, key=lambda t: (t.value, t.number))]
    assert tuned.best == good[[t.number for t in good].index(tuned.table[0]["trial"])].params


def test_processes_that_begin_together_do_not_run_too_many(tmp_path: Path, processes: Any) -> None:
    path = tmp_path / "search.log"
    group = [processes.Process(target=search, args=(path, 5), kwargs={"max_replicas": 4}) for _ in range(3)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
        assert process.exitcode == 0
    check(path, 5)


# Who is alive


class Study:
    def __init__(self) -> None:
        self.user_attrs: dict[str, Any] = {}

    def set_user_attr(self, name: str, value: Any) -> None:
        self.user_attrs[name] = value


def test_of_a_process_elsewhere_a_counter_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    study, now = Study(), [0.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    me = Worker(study, patience=10.0)
    other = json.dumps(["token", "another machine", 1, "1"])
    key = f"pyro_sam beat of {other}"
    study.set_user_attr(key, 1)
    assert not me.is_dead(other)
    now[0] = 9.0
    assert not me.is_dead(other)
    study.set_user_attr(key, 2)
    now[0] = 18.0
    assert not me.is_dead(other)
    now[0] = 27.0
    assert not me.is_dead(other)
    now[0] = 28.5
    assert me.is_dead(other)


@pytest.mark.parametrize("name", ["trial 3", json.dumps(["token", None, 1, None])])
def test_one_that_gives_no_sign_is_given_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    me = Worker(Study(), patience=10.0)
    assert not me.is_dead(name)
    now[0] = 11.0
    assert me.is_dead(name)


def test_in_the_same_place_the_process_is_looked_up(processes: Any) -> None:
    me, child = Worker(Study(), patience=1e9), processes.Process(target=time.sleep, args=(60,))
    child.start()
    token, place, _, _ = json.loads(me.name)
    assert place is not None
    name = json.dumps([token, place, child.pid, workers._started(child.pid)])
    assert not me.is_dead(name)
    assert me.is_dead(json.dumps([token, place, child.pid, "another time"]))  # a later process of that number
    child.kill()
    child.join()
    assert me.is_dead(name)


def test_a_search_of_this_process_that_has_ended_is_dead_and_one_under_way_is_not() -> None:
    study = Study()
    me, earlier = Worker(study, patience=1e9), Worker(study, patience=0.2)
    with earlier.alive():
        assert not me.is_dead(earlier.name)
        wait_for(lambda: study.user_attrs.get(f"pyro_sam beat of {earlier.name}", 0) > 3)
    assert me.is_dead(earlier.name)
