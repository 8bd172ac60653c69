import collections
import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_sam as ps
from pyro_sam.study import begun, cli
from pyro_sam.study.begun import search
from pyro_sam.study.output import OutputError
from pyro_sam.study.survey import choosing, command, problems, studying, training
from pyro_sam.study.survey.bsam import BSAM
from pyro_sam.study.survey.choosing import choose, chosen
from pyro_sam.study.survey.flat import at_equal_settings
from pyro_sam.study.survey.laws import Antithetic
from pyro_sam.study.survey.methods import METHODS, Method
from pyro_sam.study.survey.problems import SOURCES, Draws
from pyro_sam.study.survey.records import FLATNESS, SENSITIVITY, Records
from pyro_sam.study.survey.sensitivity import SWEEPS, Sweep, sensitivity
from pyro_sam.study.survey.sizes import SIZES
from pyro_sam.study.survey.studying import study
from pyro_sam.study.survey.training import Task, apart, network, train
from pyro_sam.training.checkpoint import versions
from pyro_sam.tuning.journal import journal
from tests import survey_worker


def once_each(out: Path, methods: list[str] = survey_worker.METHODS) -> list[Any]:
    lines = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    found = collections.Counter((line["method"], line["seed"]) for line in lines)
    assert found == {(method, seed): 1 for method in methods for seed in range(survey_worker.SIZE.seeds)}
    return lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("study")
    survey_worker.work(out)
    return out


# The engine


def test_a_study_writes_a_line_for_each_run_at_equal_gradients(finished: Path) -> None:
    lines = once_each(finished)
    assert {line["gradients"] for line in lines} == {20}
    assert {line["curve"][-1][0] for line in lines} == {20}
    assert all(set(line["settings"]) == set(METHODS[line["method"]].distributions()) for line in lines)
    assert all(math.isfinite(line["metrics"]["nll"]) and line["curve"][-1][1] > 0 for line in lines)


def test_every_method_is_tuned_with_the_same_number_of_trials(finished: Path) -> None:
    for method in survey_worker.METHODS:
        log = [json.loads(line) for line in (finished / "tuning" / f"digits-60.{method}.log").read_text().splitlines()]
        told = [line for line in log if line.get("op_code") == 6 and line.get("state") == 1]
        assert len({line["trial_id"] for line in told}) == survey_worker.SIZE.trials


def test_a_finished_study_trains_nothing(finished: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(studying, "choose", lambda *_: pytest.fail("tuned again"))
    monkeypatch.setattr(studying, "train", lambda *_: pytest.fail("trained again"))
    assert survey_worker.work(finished) == []


def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.survey_worker", str(tmp_path)]
    for delay in ("0.8", "1.6"):
        subprocess.run([*command, delay], check=False, cwd=Path(__file__).parents[1])
    survey_worker.work(tmp_path)
    once_each(tmp_path)


def stop_before(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs side by side, and no more from a part of them on."""
    inner, calls = training._together, itertools.count()

    def together(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == part:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    monkeypatch.setattr(training, "_together", together)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_study_keeps_the_runs_that_are_done(
    stop: int, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    monkeypatch.setattr(problems.Source, "side_by_side", 2)
    size = dataclasses.replace(survey_worker.SIZE, seeds=5)

    def work(name: str) -> tuple[list[Any], list[str]]:
        said: list[str] = []
        records = Records(tmp_path / name)
        study(["digits-60"], ["mfvi"], size, records, None, said.append, Records(finished))
        rows = [{**row, "seconds": 0} for row in records.read()]
        assert len((tmp_path / name / "runs.jsonl").read_text().splitlines()) == len(rows) == 5
        return rows, said[:-1]

    whole, said = work("whole")
    assert said == ["digits-60, mfvi: 2 of 5 runs", "digits-60, mfvi: 4 of 5 runs"]
    assert [bool(row["flat"]) for row in whole] == [True, True, True, False, False]
    with monkeypatch.context() as patch:
        stop_before(stop, patch)
        with pytest.raises(KeyboardInterrupt):
            work("stopped")
    assert [row["seed"] for row in Records(tmp_path / "stopped").read()] == list(range(2 * stop))
    monkeypatch.setattr(studying, "choose", lambda *_: pytest.fail("tuned again"))
    assert work("stopped")[0] == whole


def test_a_study_of_more_seeds_runs_the_new_ones_at_the_settings_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    size = dataclasses.replace(survey_worker.SIZE, trials=2, finalists=1)
    study(["digits-60"], ["mfvi"], size, Records(tmp_path), None, lambda _: None)
    shutil.rmtree(tmp_path / "tuning")
    monkeypatch.setattr(studying, "choose", lambda *_: pytest.fail("tuned again"))
    size = dataclasses.replace(size, seeds=4)
    study(["digits-60"], ["mfvi"], size, Records(tmp_path), None, lambda _: None)
    rows = Records(tmp_path).read()
    assert [row["seed"] for row in rows] == [0, 1, 2, 3]
    assert len({json.dumps([row["settings"], row["validation"]]) for row in rows}) == 1
    assert len({row["metrics"]["nll"] for row in rows}) == 4


@pytest.mark.parametrize("setting", ["alpha", "batch_size"])
def test_a_stopped_sweep_keeps_the_runs_that_are_done(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problems.Source, "side_by_side", 2)
    draws, said = Draws(survey_worker.SOURCE, None), list[str]()
    sweeps = {setting: Sweep(("ascended-previous",), {"alpha": (0.0, 3.0), "batch_size": (8, 16)}[setting])}
    at, size = {"kl_weight": 0.1, "lr": 0.01}, dataclasses.replace(survey_worker.SIZE, seeds=3)

    def work(name: str) -> Any:
        sensitivity(Records(tmp_path / name), draws, sweeps, size, said.append, at)
        return Records(tmp_path / name).read(SENSITIVITY)

    whole = work("whole")
    assert len(said) == 3
    with monkeypatch.context() as patch:
        stop_before({"alpha": 2, "batch_size": 1}[setting], patch)
        with pytest.raises(KeyboardInterrupt):
            work("stopped")
    assert len(Records(tmp_path / "stopped").read(SENSITIVITY)) == {"alpha": 4, "batch_size": 2}[setting]
    assert work("stopped") == whole
    assert len({(row["value"], row["seed"]) for row in whole}) == len(whole) == 6


WITH_OTHERS: list[tuple[list[str], str]] = [
    (["--gradients", "30"], "gradients 20, not 30"),
    (["--trials", "3"], "trials 2, not 3"),
    (["--quick", "--gradients", "20"], "trials 2, not 8"),
    (["--autocast"], "autocast False, not True"),
]


@pytest.mark.parametrize(("words", "message"), WITH_OTHERS, ids=lambda value: str(value[0]))
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_study_goes_on_with_the_arguments_it_was_begun_with(
    words: list[str], message: str, is_finished: bool, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """The rest of it, whether runs or trials, would be mixed with others."""
    size = dataclasses.replace(survey_worker.SIZE, trials=2, equal_budget=20)
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    monkeypatch.setitem(SIZES, "normal", size)
    if is_finished:
        study(["digits-60"], ["mfvi"], size, Records(tmp_path), None, lambda _: None)
    else:
        task = Task(METHODS["mfvi"], survey_worker.SOURCE, 20)
        choose(task, Draws(survey_worker.SOURCE).tuning(1), size, Records(tmp_path).tuning("digits-60", "mfvi"))

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.parent.name != "busy"}

    before = files()
    again = ["study", "--data", "digits-60", "--methods", "mfvi", "--seeds", "3", "--out", str(tmp_path)]
    assert cli.main([*again, *words]) == 2
    err = capsys.readouterr().err
    assert f"was begun with {message}: give what" in err
    assert str(tmp_path) in err
    assert files() == before
    assert cli.main(again) == 0


def work(what: str, source: problems.Source, out: Path) -> None:
    draws, records, size = Draws(source), Records(out), survey_worker.SIZE
    if what == "study":
        study([source.name], ["map"], size, records, None, lambda _: None)
    elif what == "search":
        choose(Task(METHODS["map"], source, 20), draws.tuning(1), size, records.tuning(source.name, "map"))
    elif what == "sweep":
        at = {"kl_weight": 0.1, "lr": 0.01}
        sensitivity(records, draws, {"alpha": Sweep(("ascended",), (1.0,))}, size, lambda _: None, at)
    else:
        at_equal_settings(records, draws, dataclasses.replace(size, equal_budget=2, seeds=1))


@pytest.mark.parametrize("what", ["study", "search", "sweep", "flatness"])
def test_nothing_goes_on_with_other_data_of_the_same_name(what: str, tmp_path: Path, monkeypatch: Any) -> None:
    other = dataclasses.replace(survey_worker.SOURCE, label_noise=0.2)
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    work(what, survey_worker.SOURCE, tmp_path)
    monkeypatch.setitem(problems.SOURCES, "digits-60", other)
    with pytest.raises(OutputError, match=r"was begun with data [0-9a-f]{8}, not "):
        work(what, other, tmp_path)


@pytest.mark.parametrize("what", ["study", "search", "sweep", "flatness"])
def test_nothing_goes_on_with_other_versions(what: str, tmp_path: Path, monkeypatch: Any) -> None:
    installed = versions()
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    monkeypatch.setattr(begun, "versions", lambda: {**installed, "torch": "2.13.0+cu130"})
    work(what, survey_worker.SOURCE, tmp_path)
    monkeypatch.setattr(begun, "versions", lambda: {**installed, "torch": "2.13.0"})
    work(what, survey_worker.SOURCE, tmp_path)  # of another build
    monkeypatch.setattr(begun, "versions", lambda: {**installed, "torch": "2.14.1"})
    with pytest.raises(OutputError, match=r"was begun with torch 2\.13\.0, not 2\.14\.1: give what"):
        work(what, survey_worker.SOURCE, tmp_path)
    monkeypatch.setattr(begun, "versions", lambda: {**installed, "torch": "2.13.0", "pyro-sam": "9.9"})
    with pytest.raises(OutputError, match=r"was begun with pyro-sam .*, not 9\.9: give what"):
        work(what, survey_worker.SOURCE, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--at", "kl_weight=0.3", "lr=0.01"], "kl_weight 0.1, not 0.3"),
        (["--at", "kl_weight=0.1", "lr=0.01", "init_scale=0.1"], "init_scale None, not 0.1"),
        (["--gradients", "30"], "gradients 20, not 30"),
        (["--autocast"], "autocast False, not True"),
        ([], "gradients 20, not 4"),
    ],
    ids=str,
)
def test_a_sweep_goes_on_with_the_arguments_it_was_begun_with(
    words: list[str], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    begun = ["study", "--quick", "--data", "digits-60", "--seeds", "1", "--out", str(tmp_path)]
    begun += ["--sensitivity", "alpha"]
    at = ["--at", "kl_weight=0.1", "lr=0.01"]
    first = [*begun, *at, "--values", "0", "--gradients", "20"]
    assert cli.main(first) == 0
    before = (tmp_path / SENSITIVITY).read_bytes()
    given = first if words else [*begun, *at]
    assert cli.main([*given, "--values", "0", "3", *words]) == 2
    assert f"was begun with {message}: give what" in capsys.readouterr().err
    assert (tmp_path / SENSITIVITY).read_bytes() == before
    assert cli.main([*first, "--values", "0", "3"]) == 0


def test_flatness_goes_on_with_the_arguments_it_was_begun_with(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    words = ["study", "--quick", "--data", "digits-60", "--seeds", "1", "--flatness", "--out", str(tmp_path)]
    assert cli.main([*words, "--gradients", "4"]) == 0
    before = (tmp_path / FLATNESS).read_bytes()
    assert cli.main([*words, "--gradients", "8"]) == 2
    assert "was begun with steps 2, not 4" in capsys.readouterr().err
    assert (tmp_path / FLATNESS).read_bytes() == before


def test_runs_that_do_not_tell_what_they_were_begun_with_are_not_gone_on_from(tmp_path: Path) -> None:
    Records(tmp_path).add([{"data": "digits-60", "method": "mfvi", "seed": 0}])
    with pytest.raises(OutputError, match="does not tell what it was begun with"):
        survey_worker.work(tmp_path, ["mfvi"])
    optuna.create_study(study_name="tune", storage=journal(str(tmp_path / "s"))).enqueue_trial({"kl_weight": 1.0})
    with pytest.raises(OutputError, match="does not tell what it was begun with"):
        search(tmp_path / "s", {"gradients": 20})


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.survey_worker", str(tmp_path)]
    both = [subprocess.Popen(command, cwd=Path(__file__).parents[1]) for _ in range(2)]
    assert [each.wait(timeout=120) for each in both] == [0, 0]
    once_each(tmp_path)


@pytest.mark.slow
def test_processes_of_torchrun_share_a_study_and_the_first_makes_the_report(tmp_path: Path) -> None:
    words = ["study", "--quick", "--data", "digits-120", "--methods", "map", "mfvi", "--trials", "2", "--seeds", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python", sys.executable,
                "-c", "import sys; from pyro_sam.study.cli import main; sys.exit(main(sys.argv[1:]))"]  # fmt: skip
    ran = subprocess.run(
        [*launcher, *words, "--gradients", "20", "--out", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("## digits-120\n") == 1
    found = [(row["method"], row["seed"]) for row in Records(tmp_path).read()]
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert sorted(found) == [("map", 0), ("map", 1), ("mfvi", 0), ("mfvi", 1)]
    assert len(lines) == 4  # none was run twice


def test_a_device_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "--quick", "--device", "gpu", "--out", str(tmp_path)]) == 2
    assert "--device gpu cannot be used" in capsys.readouterr().err


def test_each_process_of_torchrun_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert command._device("cpu") == "cpu"
    assert command._device("meta") == "meta:3"
    assert command._device("meta:1") == "meta:1"


def test_data_sets_of_a_size_that_cannot_be_had_are_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    assert command._there(["digits-120", "cifar-resnet18"], tmp_path, said.append) == ["digits-120"]
    assert said[0].startswith("left out cifar-resnet18: ")


def test_a_task_is_claimed_once(tmp_path: Path) -> None:
    records = Records(tmp_path)
    with records.claim("a", "b") as first, records.claim("a", "b") as second, records.claim("a", "c") as other:
        assert (first, second, other) == (True, False, True)
    with records.claim("a", "b") as again:
        assert again


def test_a_torn_line_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    records, row = Records(tmp_path), {"data": "d", "method": "m", "seed": 0}
    (tmp_path / "runs.jsonl").write_text(json.dumps(row) + '\n{"data": "d", "met')
    records.add([{**row, "seed": 1, "nll": math.nan}])
    assert [each["seed"] for each in records.read()] == [0, 1]
    assert records.read()[1]["nll"] is None


def test_a_method_that_cannot_be_trained_is_recorded_as_failed(tmp_path: Path, monkeypatch: Any) -> None:
    def choose(*_: Any) -> None:
        raise ValueError("no trial ended well")

    monkeypatch.setattr(studying, "choose", choose)
    said = survey_worker.work(tmp_path, ["mfvi"])
    assert said == ["digits-60, mfvi: failed: no trial ended well"]
    assert {row["failed"] for row in Records(tmp_path).read()} == {"no trial ended well"}


# Data


def pixels(x: Any) -> list[Any]:
    """Return rows of digits in whole numbers, whatever they were standardised by."""
    return [tuple(row) for row in ((x - x.amin(1, keepdim=True)) * 6.02).round().tolist()]


def test_no_tuning_split_of_a_subset_holds_a_test_row() -> None:
    draws = Draws(SOURCES["digits-120"])
    tuning, final = draws.tuning(3), draws.final(3)
    tested = {row for each in final for row in pixels(each.x_out)}
    assert not any(row in tested for each in tuning for x in (each.x, each.x_out) for row in pixels(x))
    assert all(each.x.shape == (120, 64) for each in tuning + final)
    assert not torch.equal(final[0].x, final[1].x)


@pytest.mark.parametrize("name", ["digits-120", "breast-cancer"])
def test_training_rows_are_not_held_out(name: str) -> None:
    (tuning,), (final,) = Draws(SOURCES[name]).tuning(1), Draws(SOURCES[name]).final(1)
    for each in (tuning, final):
        held_out = {tuple(row) for row in each.x_out.tolist()}
        assert not any(tuple(row) in held_out for row in each.x.tolist())


# Methods


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_step_costs_what_the_method_says(method: Method) -> None:
    numbers = {name: torch.tensor([0.5, 0.5]) for name in method.distributions()}
    estimator = method.estimator(numbers)
    climbs = estimator.perturbation.uses_gradient and estimator.ascent == "fresh"
    cost = estimator.num_particles * (1 + climbs)
    assert method.cost == {"mixture": 1.5, "bsam": 2}.get(method.name, cost)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_plain_settings_are_in_every_space(method: Method) -> None:
    space = method.distributions()
    assert space["kl_weight"].high == 1
    assert all(space[name].low <= 0 <= space[name].high for name in method.space if not space[name].log)


def test_the_noise_of_random_sam_has_length_rho() -> None:
    problem = Draws(SOURCES["digits-120"]).final(1)[0]
    with apart(0):
        model, num_weights = network(SOURCES["digits-120"], problem)
        numbers = {"rho": torch.tensor([0.5, 2.0]), "kl_weight": torch.ones(2)}
        guide = METHODS["random-sam"].posterior(model, num_weights, numbers)
        guide.initialize(problem.x, problem.y)
        for r, rho in enumerate(numbers["rho"].tolist()):
            scales = dict(guide.replica(r).scales.named_buffers())
            assert sum(float(scale.square().sum()) for scale in scales.values()) == pytest.approx(rho**2, rel=1e-5)


def test_antithetic_pairs_cancel() -> None:
    pyro.clear_param_store()

    def model() -> None:
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("linear", pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1)).sum())

    guide = ps.MeanFieldNormal(model)
    guide.initialize()
    elbo = ps.SAM_ELBO(Antithetic(), num_particles=2, kl_weight=0.0)
    for _ in range(3):  # of a linear loss no noise is left
        assert elbo.differentiable_loss(model, guide).item() == pytest.approx(-guide.locs.v.sum().item(), abs=1e-6)


def test_bsam_ends_where_its_equations_hold_on_a_quadratic() -> None:
    h, m, rho, decay = torch.tensor([[3.0, 0.5]]).double(), torch.tensor([[1.0, -2.0]]).double(), 0.3, 0.2
    run = BSAM(torch.zeros(1, 2).double(), n=1e30, rho=rho, decay=decay)
    for _ in range(20_000):
        run.step(lambda w: h * (w - m), 0.03)
    # g (1 + rho h / s) + decay w = 0 and s = sqrt(s) |g| + 0.1 + decay, solved by bisection in w
    low, high = torch.minimum(m, torch.zeros(())), torch.maximum(m, torch.zeros(()))
    for _ in range(100):
        w = (low + high) / 2
        g = h * (w - m)
        s = ((g.abs() + (g**2 + 4 * (0.1 + decay)).sqrt()) / 2) ** 2
        above = g * (1 + rho * h / s) + decay * w > 0
        low, high = torch.where(above, low, w), torch.where(above, w, high)
    torch.testing.assert_close(run.w, w, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(run.s, s, rtol=1e-6, atol=1e-8)


def test_bsam_without_a_climb_ends_at_ridge_regression() -> None:
    h, m = torch.tensor([[3.0, 0.5]]).double(), torch.tensor([[1.0, -2.0]]).double()
    run = BSAM(torch.zeros(1, 2).double(), n=1e30, rho=0.0, decay=0.2)
    for _ in range(20_000):
        run.step(lambda w: h * (w - m), 0.01)
    torch.testing.assert_close(run.w, h * m / (h + 0.2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["ensemble", "mfvi-mixed"])
def test_predictions_of_members_are_mixed_and_share_the_weight_samples(name: str) -> None:
    source, problem = SOURCES["digits-120"], Draws(SOURCES["digits-120"]).final(1)[0]
    method, settings, found = METHODS[name], {"kl_weight": 0.01, "lr": 0.01}, []

    def look(svi: Any, _: Any) -> None:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            parts = [
                ps.predict(svi.model, svi.guide, problem.x_out, num_samples=3, samples_at_once=3, replica=r).probs
                for r in range(method.members)
            ]
        found.append(ps.metrics.nll(torch.stack(parts).mean(0), problem.y_out))

    num_samples = 3 * method.members
    (outcome,) = train(Task(method, source, 20), [settings], [problem], num_samples=num_samples, look=look)
    assert outcome.metrics["nll"] == pytest.approx(float(found[0]), rel=1e-5)


@pytest.mark.parametrize("name", ["mfvi-mixed", "ascended-previous-mixed"])
def test_members_share_the_gradients_of_a_run(name: str) -> None:
    problem, steps = Draws(survey_worker.SOURCE).final(1)[0], []
    task = Task(METHODS[name], survey_worker.SOURCE, 40)
    settings = {"kl_weight": 0.1, "lr": 0.01} | ({"alpha": 3.0} if METHODS[name].zero else {})

    def look(svi: Any, _: Any) -> None:
        (state,) = {int(each["step"]) for each in svi.optim.optimizer.state.values()}
        steps.append(state * svi.guide.num_replicas)

    (outcome,) = train(task, [settings], [problem], num_samples=8, points=2, look=look)
    assert steps == [40]
    assert [gradients for gradients, _ in outcome.curve] == [20, 40]


@pytest.mark.parametrize("name", ["mfvi", "dropout"])
def test_a_run_of_few_steps_is_looked_at_after_each(name: str) -> None:
    """Points that fall together would be predicted again and again, the first of them before any step."""
    problem, settings = Draws(survey_worker.SOURCE).final(1)[0], {"kl_weight": 0.1, "lr": 0.01, "rate": 0.1}
    (outcome,) = train(Task(METHODS[name], survey_worker.SOURCE, 3), [settings], [problem], num_samples=4, points=20)
    assert [gradients for gradients, _ in outcome.curve] == [1, 2, 3]
    assert outcome.curve[-1][1] == outcome.metrics["nll"]


def test_trials_of_members_are_judged_by_their_mixture(tmp_path: Path) -> None:
    draws, task = Draws(survey_worker.SOURCE), Task(METHODS["mfvi-mixed"], survey_worker.SOURCE, 40)
    choose(task, draws.tuning(1), survey_worker.SIZE, tmp_path / "log")
    trials = optuna.load_study(study_name="tune", storage=journal(str(tmp_path / "log"))).trials
    assert len(trials) == survey_worker.SIZE.trials
    for trial in trials:
        (outcome,) = train(task, [trial.params], draws.tuning(1), num_samples=32)
        assert trial.value == pytest.approx(outcome.metrics["nll"], rel=1e-6)


# The command


def test_the_command_makes_tables_and_figures(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    words = ["study", "--quick", "--data", "digits-60", "--methods", "mfvi,map", "--seeds", "2", "--trials", "2"]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    assert "| map" in (tmp_path / "study.md").read_text()
    assert (tmp_path / "curves.png").is_file()
    before = (tmp_path / "runs.jsonl").read_text()
    assert cli.main(["study", "--report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "runs.jsonl").read_text() == before
    assert "| map" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--autocast"]], ids=str)
def test_the_paper_size_runs_to_its_end(words: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    small = ["--data", "digits-60", "--gradients", "8", "--trials", "2", "--seeds", "2", "--methods", "mfvi", "sam"]
    assert cli.main(["study", "--paper", *small, "--out", str(tmp_path), *words]) == 0
    rows = Records(tmp_path).read()
    assert {(row["method"], row["seed"]) for row in rows} == set(itertools.product(("mfvi", "sam"), (0, 1)))
    assert {row["begun_with"]["num_samples"] for row in rows} == {256}
    assert {len(row["curve"]) for row in rows if row["method"] == "mfvi"} == {8}
    assert "| mfvi " in capsys.readouterr().out


def test_a_report_of_a_sweep_draws_searches_that_came_to_no_run(
    finished: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    shutil.copytree(finished / "tuning", tmp_path / "tuning")
    optuna.create_study(study_name="tune", storage=journal(str(tmp_path / "tuning" / "digits.mfvi.log")))
    words = [
        "--quick",
        "--data",
        "digits-60",
        "--sensitivity",
        "alpha",
        "--values",
        "0",
        "3",
        "--at",
        "kl_weight=0.1",
        "lr=0.01",
        "--seeds",
        "1",
    ]
    assert cli.main(["study", *words, "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    assert {path.name for path in tmp_path.glob("*.png")} == {"trials.png", "sensitivity_alpha.png"}


def test_settings_of_another_study_are_taken_and_the_rest_is_tuned(
    finished: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    words = ["--quick", "--data", "digits-60", "--methods", "mfvi,ascended,asam", "--seeds", "1", "--trials", "2"]
    assert cli.main(["study", *words, "--settings-of", str(finished), "--out", str(tmp_path)]) == 0
    found = {row["method"]: row["settings"] for row in Records(tmp_path).read()}
    kept = {row["method"]: row["settings"] for row in Records(finished).read()}
    assert {name: kept.get(name) for name in found} == {**found, "asam": None}
    assert [path.name for path in (tmp_path / "tuning").glob("*.log")] == ["digits-60.asam.log"]


@pytest.mark.parametrize(("name", "number"), [("ascended-previous", 4), ("choice", 2)])
def test_three_of_four_trials_of_a_law_are_those_of_mfvi_and_the_climbs_go_on_from_their_best(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = dataclasses.replace(survey_worker.SIZE, trials=16)
    draws = Draws(survey_worker.SOURCE)
    monkeypatch.setattr(choosing, "_SOBOL", 8)  # so that the sampler has its say
    found = []
    for each in ("mfvi", name):
        file = tmp_path / f"{each}.log"
        choose(Task(METHODS[each], survey_worker.SOURCE, 20), draws.tuning(1), size, file)
        found.append(optuna.load_study(study_name="tune", storage=journal(str(file))).trials)
    plain, trials = found
    first, climbs = trials[:12], trials[12:]
    assert (len(plain), len(climbs)) == (16, number)
    for mine, theirs in zip(first, plain, strict=False):
        assert mine.params == {**theirs.params, "alpha": 0.0}
        assert mine.value == pytest.approx(theirs.value, rel=1e-5)
    assert len({trial.params["kl_weight"] for trial in first}) == 12
    best = sorted(first, key=lambda trial: trial.value)[:number]
    bases = {(trial.params["kl_weight"], trial.params["lr"]) for trial in best}
    assert {(trial.params["kl_weight"], trial.params["lr"]) for trial in climbs} == bases
    assert len({trial.params["alpha"] for trial in climbs}) == number
    if name == "choice":
        mixed = optuna.load_study(study_name="tune", storage=journal(str(tmp_path / "choice.mixed.log"))).trials
        assert len(mixed) == 2
        for trial, base in zip(mixed, best, strict=True):
            assert trial.params == {**base.params, "lr": pytest.approx(trial.params["lr"])}
            assert base.params["lr"] <= trial.params["lr"] <= min(8 * base.params["lr"], 0.03)


def test_mixtures_go_on_from_bases_with_a_learning_rate_up_to_eight_times_as_large(tmp_path: Path) -> None:
    bases = [{"kl_weight": 0.1, "lr": 0.001, "alpha": 0.0}, {"kl_weight": 0.2, "lr": 0.02, "alpha": 0.0}]
    task, (problem,) = Task(METHODS["choice"], survey_worker.SOURCE, 20), Draws(survey_worker.SOURCE).tuning(1)
    found = choosing._mixed(task, problem, survey_worker.SIZE, tmp_path / "log", bases, 8)
    assert all((each["alpha"], each["members"]) == (0.0, 4) for each in found)
    slow, fast = ([each["lr"] for each in found if each["kl_weight"] == base["kl_weight"]] for base in bases)
    assert len(set(slow)) == len(fast) == 4
    assert 0.001 <= min(slow) <= 0.003 < max(slow) <= 0.008
    assert 0.02 <= min(fast) <= max(fast) == 0.03


def test_finalists_are_judged_with_the_members_they_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, draws = dataclasses.replace(survey_worker.SIZE, trials=32, finalists=8), Draws(survey_worker.SOURCE)
    judged = []

    def watched(task: Task, settings: Any, among: Any, **options: Any) -> Any:
        if options["num_samples"] == 64:
            judged.extend((task.method.members, each.get("members", 1), each["alpha"] == 0) for each in settings)
        return train(task, settings, among, **options)

    monkeypatch.setattr(choosing, "train", watched)
    choose(Task(METHODS["choice"], survey_worker.SOURCE, 20), draws.tuning(2), size, tmp_path / "log")
    assert collections.Counter(judged) == {(1, 1, True): 8, (1, 1, False): 4, (4, 4, True): 4}


def test_a_choice_that_is_killed_among_its_finalists_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problems.Source, "side_by_side", 3)
    size, splits = (
        dataclasses.replace(survey_worker.SIZE, trials=16, finalists=4),
        Draws(survey_worker.SOURCE).tuning(2),
    )
    task, runs = Task(METHODS["choice"], survey_worker.SOURCE, 20), []
    straight = choose(task, splits, size, tmp_path / "straight")

    def dying(task: Task, settings: Any, among: Any, **options: Any) -> Any:
        if options["num_samples"] == 64:
            runs.append(len(settings))
            keep = options["keep"]

            def once(first: int, outcomes: Any) -> None:
                keep(first, outcomes)
                if len(runs) <= 2:
                    raise KeyboardInterrupt

            options["keep"] = once
        return train(task, settings, among, **options)

    monkeypatch.setattr(choosing, "train", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            choose(task, splits, size, tmp_path / "killed")
    assert choose(task, splits, size, tmp_path / "killed") == straight
    assert runs == [6, 3, 2]
    attrs = [
        optuna.load_study(study_name="tune", storage=journal(str(tmp_path / name))).user_attrs
        for name in ("straight", "killed")
    ]
    for name in ("finalists of 1", "finalists of 4"):
        assert attrs[0][name] == attrs[1][name]
        assert len(attrs[0][name]["nll"]) == 2 * len(attrs[0][name]["settings"])


def test_a_choice_of_two_finalists_keeps_a_single_posterior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, draws, judged = dataclasses.replace(survey_worker.SIZE, trials=8), Draws(survey_worker.SOURCE), []
    monkeypatch.setattr(choosing, "chosen", lambda finalists, *_: judged.extend(finalists) or 0)
    choose(Task(METHODS["choice"], survey_worker.SOURCE, 20), draws.tuning(1), size, tmp_path / "log")
    assert [each["alpha"] == 0 for each in judged] == [True, False]


def test_a_choice_none_of_whose_trials_ended_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_tune", lambda *_: None)  # no trial ends
    with pytest.raises(ValueError, match="no trial"):
        choose(
            Task(METHODS["choice"], survey_worker.SOURCE, 20),
            Draws(survey_worker.SOURCE).tuning(1),
            dataclasses.replace(survey_worker.SIZE, trials=8),
            tmp_path / "log",
        )


def test_a_choice_of_members_is_a_mixture_of_so_many() -> None:
    """At alpha 0 it is mfvi-mixed, run by run."""
    problems, settings = Draws(survey_worker.SOURCE).final(2), {"kl_weight": 0.1, "lr": 0.01, "alpha": 0.0}
    task = Task(METHODS["choice"], survey_worker.SOURCE, 40)
    options: dict[str, Any] = {"num_samples": 8, "points": 2}
    for members, name in ((4, "mfvi-mixed"), (1, "mfvi")):
        mine = {**settings, "members": float(members)}
        found = train(task.of(mine), [mine] * 2, problems, **options)
        plain = {"kl_weight": 0.1, "lr": 0.01}
        wanted = train(Task(METHODS[name], survey_worker.SOURCE, 40), [plain] * 2, problems, **options)
        for one, other in zip(found, wanted, strict=True):
            assert one.metrics == pytest.approx(other.metrics, rel=1e-4)
            assert [gradients for gradients, _ in one.curve] == [20, 40]


def test_a_study_runs_the_number_of_members_that_was_chosen(tmp_path: Path, monkeypatch: Any) -> None:
    kept, out = Records(tmp_path / "kept"), Records(tmp_path / "out")
    settings = {"kl_weight": 0.1, "lr": 0.01, "alpha": 0.0, "members": 4}
    about = {"data": "digits-60", "seed": 0, "settings": settings, "validation": 1.0}
    kept.add(
        [{**about, "method": "choice"}, {**about, "method": "mfvi-mixed", "settings": {"kl_weight": 0.1, "lr": 0.01}}]
    )
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    study(["digits-60"], ["choice", "mfvi-mixed"], survey_worker.SIZE, out, None, lambda _: None, kept)
    found = {(row["method"], row["seed"]): row for row in out.read()}
    assert len(found) == 4
    for seed in (0, 1):
        mine, other = found["choice", seed], found["mfvi-mixed", seed]
        assert mine["settings"] == settings
        assert (mine["gradients"], mine["curve"][-1][0]) == (20, 20)
        assert mine["metrics"] == pytest.approx(other["metrics"], rel=1e-3)


def test_a_climb_is_chosen_only_if_clear_of_the_best_zero_by_a_standard_error() -> None:
    finalists = [{"alpha": 0.0, "lr": 0.1}, {"alpha": 0.0, "lr": 0.2}, {"alpha": 3.0, "lr": 0.1}]
    plain = torch.tensor([[3.0, 3.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0]])  # means 3 and 2.5
    # ahead of the second by .1 +- s on average: the standard error of four is half of the standard deviation
    clear = plain[1] - torch.tensor([0.09, 0.11, 0.09, 0.11])
    unclear = plain[1] - torch.tensor([0.5, -0.3, 0.5, -0.3])
    assert chosen(finalists, torch.stack([*plain, clear]), "alpha") == 2
    assert chosen(finalists, torch.stack([*plain, unclear]), "alpha") == 1
    assert chosen(finalists, torch.stack([*plain, plain[1] + 1]), "alpha") == 1
    assert chosen(finalists, torch.stack([*plain, unclear]), None) == 2  # a method without a zero: the smallest mean
    lost = torch.full((4,), torch.inf)
    assert chosen(finalists, torch.stack([lost, lost, unclear]), "alpha") == 2  # no zero ended well
    assert chosen(finalists[2:], unclear[None], "alpha") == 0


def test_a_mixture_is_chosen_only_if_clear_of_the_best_single_posterior() -> None:
    finalists = [{"alpha": 0.0}, {"alpha": 3.0}, {"alpha": 0.0, "members": 4.0}]
    ahead, level = torch.tensor([0.8, 0.8, 0.9, 0.9]), torch.tensor([0.5, 1.3, 0.9, 1.1])
    one = torch.ones(4)
    assert chosen(finalists, torch.stack([one, one + 1, ahead]), "alpha") == 2
    assert chosen(finalists, torch.stack([one, one + 1, level]), "alpha") == 0
    assert chosen(finalists, torch.stack([one, ahead - 0.1, ahead]), "alpha") == 1


def test_the_command_measures_flatness(finished: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    words = ["study", "--quick", "--data", "digits-60", "--seeds", "2", "--out", str(finished)]
    assert cli.main([*words, "--flatness"]) == 0
    flat = Records(finished).read(FLATNESS)
    assert {tuple(row["settings"].values())[:2] for row in flat} == {(0.01, 0.001)}
    assert all(0 < row["flat"]["lambda_max"] <= row["flat"]["trace"] for row in flat)
    assert "## Flatness at the same kl_weight" in (finished / "study.md").read_text()


def test_a_sweep_varies_one_setting_and_keeps_what_was_chosen(
    finished: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    words = ["study", "--quick", "--data", "digits-60", "--seeds", "2", "--out", str(finished)]
    settings = ["alpha", "init_scale", "batch_size"]
    assert cli.main([*words, "--sensitivity", *settings]) == 0
    chosen = {row["method"]: row["settings"] for row in Records(finished).read()}
    rows = Records(finished).read(SENSITIVITY)
    for setting in settings:
        for method in SWEEPS[setting].methods:
            mine = [row for row in rows if (row["setting"], row["method"]) == (setting, method)]
            places = sorted((row["value"], row["seed"]) for row in mine)
            assert places == [(value, seed) for value in SWEEPS[setting].values for seed in range(2)]
            own = method in chosen and setting != "alpha"
            kept = chosen[method] if own else {**chosen["mfvi"], "alpha": 3.0}
            kept = {name: kept[name] for name in METHODS[method].distributions()}
            assert all(
                {**row["settings"], setting: 0} == {**kept, setting: 0} for row in mine if setting != "batch_size"
            )
            assert len({row["metrics"]["nll"] for row in mine}) == len(mine)
    assert {row["begun_with"]["gradients"] for row in rows} == {20}
    text = (finished / "study.md").read_text()
    assert all(f"## Test NLL by {setting}, all other settings as they were chosen" in text for setting in settings)
    assert all((finished / f"sensitivity_{setting}.png").is_file() for setting in settings)
    # at the value that was chosen the sweep is the study's run of other weights and noise, trained as long
    before = (finished / SENSITIVITY).read_text()
    monkeypatch.setattr("pyro_sam.study.survey.sensitivity.train", lambda *_, **__: pytest.fail("swept again"))
    assert cli.main([*words, "--sensitivity", "alpha"]) == 0
    assert (finished / SENSITIVITY).read_text() == before
    assert cli.main([*words, "--sensitivity", "alpha", "--gradients", "8"]) == 2
    assert "gradients 20, not 8" in capsys.readouterr().err
    assert cli.main([*words, "--sensitivity", "alhpa"]) == 2
    assert "--sensitivity must be among alpha, rho" in capsys.readouterr().err


def test_a_sweep_may_have_values_and_settings_of_the_users_own(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    words = ["study", "--quick", "--data", "digits-60", "--seeds", "2", "--out", str(tmp_path)]
    words += ["--sensitivity", "kl_weight", "--at", "lr=0.01", "kl_weight=1", "alpha=2"]
    rows: list[Any] = []
    for values, methods in (((0.1, 0.3), ["ascended-previous"]), ((0.1, 0.5), ["ascended-previous", "mfvi"])):
        before = len(rows)
        assert cli.main([*words, "--values", *map(str, values), "--methods", *methods]) == 0
        rows = Records(tmp_path).read(SENSITIVITY)
        new = [(row["method"], row["value"], row["seed"]) for row in rows[before:]]
        wanted = [(name, value, seed) for name in methods for value in values for seed in range(2)]
        assert sorted(new) == sorted(each for each in wanted if before == 0 or each[:2] != ("ascended-previous", 0.1))
    for row in rows:
        own = {"alpha": 2.0} if row["method"] == "ascended-previous" else {}
        assert row["settings"] == {**own, "kl_weight": row["value"], "lr": 0.01}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sensitivity", "lr", "alpha", "--values", "1"], "--values goes with one setting"),
        (["--values", "1"], "--values and --at go with --sensitivity"),
        (["--at", "lr=0.1", "kl_weight=1"], "--values and --at go with --sensitivity"),
        (["--sensitivity", "alpha", "--at", "lr=0.1"], "--at must give kl_weight and lr"),
        (["--sensitivity", "alpha", "--at", "lr=0.1", "kl_weight=1", "beta=2"], "--at .* may give alpha"),
        (["--sensitivity", "alpha", "--at", "lr"], "--at takes NAME=NUMBER"),
        (["--data", "digit"], "--data must be among digits-120, .*, got 'digit'"),
        (["--methods", "mfvi,sma"], "--methods must be among mfvi, .*, got 'sma'"),
        (["--settings-of", "nowhere"], "--settings-of nowhere is the folder of no study: it has no runs.jsonl"),
        (["--report"], "--report needs finished runs, and .* has none"),
    ],
)
def test_a_wrong_option_is_named(words: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["study", "--out", str(tmp_path), *words]) == 2
    assert re.search(message, capsys.readouterr().err)
