"""Whatever a user changes between two steps, every back end gives the numbers of ordinary steps."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import pyro_sam as ps
from pyro_sam._graph import lowering
from tests.scenarios import (
    SCENARIOS,
    Scenario,
    World,
    by_hand,
    difference,
    dropout,
    fresh_start,
    hidden_weights,
    layers,
    norm,
    plain_network,
    simple,
    tied,
)

BACK_ENDS: dict[str, dict[str, Any]] = {
    "lean": {},
    "compiled": {"compile": True},
    "vectorised": {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 1},
    "previous": {"ascent": "previous"},
    "particles": {"num_particles": 3},
}
CASES = [(scenario, name) for scenario in SCENARIOS for name in BACK_ENDS if name not in scenario.not_for]
IDS = [f"{scenario.name}-{name}" for scenario, name in CASES]
NAMES = [scenario.name for scenario in SCENARIOS]


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay graphs operation by operation, which takes no seconds of a C++ compiler."""
    monkeypatch.setattr(lowering, "compiled", lambda graph, inputs: graph)


def ordinary(*args: Any, compile: bool = False, **settings: Any) -> ps.SAM_ELBO:
    """Return the estimator that takes ordinary steps only."""
    return ps.SAM_ELBO(*args, fast=False, **settings)


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect the texts of users' warnings, and fail on none."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(each.message).splitlines()[0] for each in caught if each.category is UserWarning]


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize(("scenario", "back_end"), CASES, ids=IDS)
def test_the_numbers_are_those_of_ordinary_steps(scenario: Scenario, back_end: str) -> None:
    settings = BACK_ENDS[back_end]
    with heard():
        want = scenario.run(ordinary, ordinary=True, **settings)
        got = scenario.run(ps.SAM_ELBO, **settings)
    assert (why := difference(got, want, scenario.rtol)) is None, why
    assert scenario.fails == any("error" in entry for entry in want)


@pytest.mark.watched
@pytest.mark.parametrize("scenario", SCENARIOS, ids=NAMES)
def test_nothing_is_said_about_a_difference_that_is_not_there(scenario: Scenario) -> None:
    with heard() as expected:
        scenario.run(ordinary, ordinary=True)
    with heard() as found:
        scenario.run(ps.SAM_ELBO)
    assert set(found) <= set(expected)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=NAMES)
def test_a_scenario_changes_what_it_says(scenario: Scenario) -> None:
    with heard():
        changed, unchanged = (scenario.run(ordinary, ordinary=True, changed=changed) for changed in (True, False))
    assert (difference(changed, unchanged, 1e-7) is not None) == scenario.tells


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize(
    "build",
    [simple, by_hand(), layers(), layers(norm, dropout), tied, hidden_weights, plain_network],
    ids=["simple", "by hand", "network", "batch norm and dropout", "tied", "hidden weights", "plain network"],
)
def test_usual_worlds_do_take_shortened_steps(build: Callable[[], World], caplog: pytest.LogCaptureFixture) -> None:
    with fresh_start(), heard(), caplog.at_level(logging.WARNING):
        world = build().start(ps.SAM_ELBO, compile=True)
        world.step()
        world.step()
        assert world.guide.can_be_flat()
    assert not caplog.messages


def test_scenarios_are_named_apart() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 60
