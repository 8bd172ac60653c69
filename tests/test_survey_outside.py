import dataclasses
import functools
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.utils import parameters_to_vector

import pyro_sam as ps
from benchmarks.ivon import METHOD, Ivon
from pyro_sam.study import cli
from pyro_sam.study.survey import problems
from pyro_sam.study.survey.methods import METHODS
from pyro_sam.study.survey.networks import plain_network
from pyro_sam.study.survey.outside.descent import Descent
from pyro_sam.study.survey.outside.dropout import Dropout
from pyro_sam.study.survey.outside.laplace import Laplace
from pyro_sam.study.survey.outside.running import RUNS, predict
from pyro_sam.study.survey.outside.start import Plain, Start
from pyro_sam.study.survey.outside.swag import Snapshots, Swag
from pyro_sam.study.survey.problems import Problem, Source
from pyro_sam.study.survey.tables import results
from pyro_sam.study.survey.training import Minibatches, Task, apart, network, train
from tests import survey_worker

STEPS, SEED = 40, 5
SOURCES = {
    "classification": Source("digits-60", "digits", hidden=(8,), batch_size=16),
    "regression": Source("diabetes-60", "diabetes", hidden=(8,), batch_size=16),
}
NUMBERS = {"kl_weight": 0.3, "lr": 0.01}


@pytest.fixture(params=SOURCES)
def source(request: Any) -> Source:
    return SOURCES[request.param]


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with apart(SEED):
        yield


def problem_of(source: Source) -> Problem:
    draw = torch.Generator().manual_seed(0)
    x, x_out = (torch.randn(n, 5, generator=draw, dtype=torch.double) for n in (48, 30))
    targets = [torch.tanh(each @ torch.ones(5).double()) for each in (x, x_out)]
    if source.task == "classification":
        targets = [(3 * each).round().long() + 4 for each in targets]
    return Problem(x, targets[0], x_out, targets[1], 0.0)


def start_of(source: Source, share: Any = None, **numbers: float) -> Start:
    torch.manual_seed(SEED)
    problem = problem_of(source)
    task = Task(METHODS["map"], source, STEPS)
    plain = Plain(plain_network(source, problem), source)
    return Start(plain, problem, {**NUMBERS, **numbers}, STEPS, share or task.share)


def vector(start: Start) -> Tensor:
    return parameters_to_vector(start.plain.parameters()).detach().clone()


def run_on(run: Any, start: Start, source: Source) -> Any:
    for x, y in Minibatches(start.problem, source.batch_size, STEPS, SEED):
        run.step(x, y)
    return run


@functools.cache
def end_of_map(source: Source) -> dict[str, Tensor]:
    """Train the study's map, which is Pyro's SVI, and return the mean of its guide."""
    problem, task = problem_of(source), Task(METHODS["map"], source, STEPS)
    with apart(SEED):
        svi = task.svi({name: torch.tensor([value]) for name, value in NUMBERS.items()}, problem)
        for x, y in Minibatches(problem, source.batch_size, STEPS, SEED):
            svi.step(ps.per_replica(x[None]), ps.per_replica(y[None]))
        return svi.guide.replica(0).median()


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


# Limits: all of them are map


def test_descent_is_map(source: Source) -> None:
    start = start_of(source)
    before = start.plain.values()
    run_on(Descent(start), start, source)
    same(start.plain.values(), end_of_map(source))
    assert max(float((start.plain.values()[name] - each).abs().max()) for name, each in before.items()) > 0.05


def test_dropout_at_rate_0_is_map(source: Source) -> None:
    start = start_of(source, rate=0.0)
    run = run_on(Dropout(start), start, source)
    with run.sampled():
        same(start.plain.values(), end_of_map(source))
        sampled = start.plain.net(start.problem.x)
    with run.centred():
        torch.testing.assert_close(sampled, start.plain.net(start.problem.x), rtol=0, atol=0)


def test_swag_with_one_snapshot_is_map(source: Source) -> None:
    start = start_of(source, swa_lr=0.5)
    run = run_on(Swag(start, collected=0.0), start, source)
    assert run.snapshots.number == 1
    for place in (run.sampled, run.centred):
        with place():
            same(start.plain.values(), end_of_map(source))


def test_laplace_trains_as_map(source: Source) -> None:
    start = start_of(source)
    run = run_on(Laplace(start), start, source)
    with run.sampled():
        pass
    with run.centred():
        same(start.plain.values(), end_of_map(source))


# The objective


def log_posterior(source: Source, start: Start) -> Tensor:
    """Return the gradient of the study's own log joint, its likelihood weighted by 1 / kl_weight."""
    model, _ = network(source, start.problem)
    values = {name: each.requires_grad_() for name, each in start.plain.values().items()}
    trace = poutine.trace(poutine.condition(model, values)).get_trace(start.problem.x, start.problem.y)
    trace.compute_log_prob()
    prior = sum(trace.nodes[name]["log_prob_sum"] for name in values)
    joint = trace.nodes["obs"]["log_prob_sum"] / start.numbers["kl_weight"] + prior
    names = [*(["log_noise"] if source.task == "regression" else []), *(name for name in values if name != "log_noise")]
    gradients = torch.autograd.grad(joint, [values[name] for name in names])
    return torch.cat([each.flatten() for each in gradients])


def test_map_s_objective_is_minus_kl_weight_times_the_log_posterior(source: Source) -> None:
    start = start_of(source)
    objective = Descent(start).objective(start.problem.x, start.problem.y)
    found = torch.autograd.grad(objective, [*start.plain.parameters()])
    wanted = -start.numbers["kl_weight"] * log_posterior(source, start)
    torch.testing.assert_close(torch.cat([each.flatten() for each in found]), wanted, rtol=1e-6, atol=1e-8)


def test_ivon_climbs_the_log_posterior(source: Source) -> None:
    ess, lr, curvature, decay = 48 / 0.3, 1e-3, 1e12, 0.999
    start = start_of(source, lr=lr, hess_init=curvature)  # so large that there is hardly any noise
    run, before, wanted = Ivon(start), vector(start), log_posterior(source, start)
    run.step(start.problem.x, start.problem.y)
    # the curvature found is about 0, and the package's step is lr * hess_init * gradient / hess
    share = decay + (1 - decay) ** 2 / 2
    torch.testing.assert_close((vector(start) - before) * share * ess / lr, wanted, rtol=1e-5, atol=1e-5)


def test_ivon_s_scale_is_that_of_its_precision_and_the_prior_s(source: Source) -> None:
    start = start_of(source, hess_init=0.25)
    run, draws = Ivon(start), []
    for _ in range(4000):
        with run.sampled():
            draws.append(vector(start))
    model, _ = network(source, start.problem)
    nodes = poutine.trace(model).get_trace(start.problem.x, start.problem.y).nodes
    names = [
        *(["log_noise"] if source.task == "regression" else []),
        *(n for n, _ in start.plain.net.named_parameters()),
    ]
    prior = torch.cat([nodes[name]["fn"].stddev.expand(nodes[name]["value"].shape).flatten() for name in names])
    ess = 48 / 0.3
    exact = (ess * 0.25 + prior**-2) ** -0.5
    found = torch.stack(draws)
    assert ((found.std(0) / exact - 1).abs() < 5 / math.sqrt(2 * 4000)).all()
    assert ((found.mean(0) - vector(start)).abs() < 5 * exact / math.sqrt(4000)).all()


def test_ivon_predicts_with_the_samples_of_its_package(source: Source) -> None:
    start = start_of(source, lr=0.1, hess_init=0.25)
    run, x, y = run_on(Ivon(start), start, source), start.problem.x_out, start.problem.y_out
    torch.manual_seed(3)
    found = predict(start.plain, x, run.sampled, 8).log_prob(y)
    torch.manual_seed(3)
    by_hand = []
    for _ in range(8):
        with run.optim.sampled_params():
            output, scale = start.plain.net(x).detach(), start.plain.values().get("log_noise", torch.zeros(())).exp()
        if source.task == "classification":
            by_hand.append(output.log_softmax(-1)[range(len(y)), y])
        else:
            by_hand.append(torch.distributions.Normal(output[:, 0], scale).log_prob(y))
    torch.testing.assert_close(found, torch.stack(by_hand).logsumexp(0) - math.log(8))


# Posteriors


def package(start: Start, **options: Any) -> Any:
    """Return the posterior of laplace-torch, called by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports is deprecated
        from laplace import Laplace as make

        found = make(start.plain.net, subset_of_weights="last_layer", hessian_structure="kron", **options)
        y = start.problem.y
        rows = torch.utils.data.TensorDataset(start.problem.x, y[:, None] if y.is_floating_point() else y)
        found.fit(torch.utils.data.DataLoader(rows, len(rows)))
    return found


def test_laplace_predicts_with_the_samples_of_its_package(source: Source) -> None:
    start = start_of(source)
    run, x, y = run_on(Laplace(start), start, source), start.problem.x_out, start.problem.y_out
    options: dict[str, Any] = {"likelihood": source.task, "temperature": 0.3}
    if source.task == "regression":
        options["sigma_noise"] = float(start.plain.values()["log_noise"].exp())
    # the last layer has a fan-in of 8, so the precisions of its weights and biases are 8 and 1
    posterior = package(start, prior_precision=torch.tensor([8.0, 1.0]).double(), **options)
    with run.sampled():
        pass
    torch.manual_seed(3)
    prediction = predict(start.plain, x, run.sampled, 8)
    torch.manual_seed(3)
    by_hand = torch.cat([posterior.predictive_samples(x, pred_type="nn", n_samples=1) for _ in range(8)])
    if source.task == "classification":
        torch.testing.assert_close(prediction.probs, by_hand.mean(0))
    else:
        torch.testing.assert_close(prediction.mean, by_hand[..., 0].mean(0))
        torch.testing.assert_close(
            prediction.variance, by_hand[..., 0].var(0, correction=0) + options["sigma_noise"] ** 2
        )
    assert prediction.log_prob(y).isfinite().all()


def test_laplace_is_bayesian_linear_regression_on_the_last_layer() -> None:
    source = SOURCES["regression"]
    start = start_of(source)
    run, plain = run_on(Laplace(start), start, source), start.plain
    features = plain.net[:-1](start.problem.x).detach()
    temperature = 0.3 * float(plain.values()["log_noise"].exp()) ** 2
    exact = torch.linalg.inv(features.T @ features / temperature + 8 * torch.eye(8))
    of_bias = 1 / (len(features) / temperature + 1)  # in a block of its own, as the Kronecker factors have it
    draws = []
    for _ in range(5000):
        with run.sampled():
            draws.append(parameters_to_vector(plain.net[-1].parameters()).detach().clone())
    found = torch.stack(draws).T.cov()
    for part, wanted in ((found[:8, :8], exact), (found[8:, 8:], torch.tensor([[of_bias]]).double())):
        variances = wanted.diagonal()
        errors = ((wanted**2 + variances[:, None] * variances) / 5000).sqrt()
        assert ((part - wanted).abs() < 5 * errors).all()


def test_laplace_is_fitted_anew_after_a_step() -> None:
    source = SOURCES["classification"]
    start = start_of(source)
    run = Laplace(start)
    for _ in range(2):
        with run.sampled():
            pass
        run.step(start.problem.x, start.problem.y)
        torch.manual_seed(0)
        with run.sampled():
            found = parameters_to_vector(start.plain.net[-1].parameters()).detach().clone()
        torch.manual_seed(0)
        fresh = Laplace(start)
        with fresh.sampled():
            torch.testing.assert_close(parameters_to_vector(start.plain.net[-1].parameters()), found)


def test_laplace_refuses_a_noise_that_the_network_tells() -> None:
    source = dataclasses.replace(SOURCES["regression"], own_noise=True)
    with pytest.raises(ValueError, match="laplace needs a regression whose noise is one parameter"):
        Laplace(start_of(source))


def test_laplace_refuses_weights_that_are_not_finite() -> None:
    start = start_of(SOURCES["classification"])
    start.plain.net[0].weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="the network must have finite weights"), Laplace(start).sampled():
        pass


def test_snapshots_have_the_moments_of_the_iterates() -> None:
    iterates, rank = 100 + torch.randn(30, 4).double(), 20
    found = Snapshots(rank)
    for each in iterates:
        found.add(each)
    means = torch.stack([iterates[: k + 1].mean(0) for k in range(30)])
    torch.testing.assert_close(found.mean, means[-1])
    torch.testing.assert_close(found.variance, iterates.var(0, correction=0))
    torch.testing.assert_close(found.columns, (iterates - means)[-rank:].T)
    # a sample is linear in its noise: its covariance is that of what each unit of noise gives
    zero = found.at(torch.zeros(4).double(), torch.zeros(rank).double())
    units = torch.eye(4 + rank).double()
    linear = torch.stack([found.at(unit[:4], unit[4:]) - zero for unit in units], 1)
    deviations = (iterates - means)[-rank:]
    wanted = (torch.diag(iterates.var(0, correction=0)) + deviations.T @ deviations / (rank - 1)) / 2
    torch.testing.assert_close(zero, iterates.mean(0))
    torch.testing.assert_close(linear @ linear.T, wanted)


def test_snapshots_are_drawn_from_standard_normal_noise() -> None:
    found = Snapshots()
    for each in torch.randn(30, 3).double():
        found.add(each)
    draws = torch.stack([found.sample() for _ in range(5000)])
    linear = [found.at(unit[:3], unit[3:]) - found.mean for unit in torch.eye(23).double()]
    wanted = sum(torch.outer(each, each) for each in linear)
    errors = ((wanted**2 + wanted.diagonal()[:, None] * wanted.diagonal()) / 5000).sqrt()
    assert ((draws.T.cov() - wanted).abs() < 5 * errors).all()
    assert ((draws.mean(0) - found.mean).abs() < 5 * (wanted.diagonal() / 5000).sqrt()).all()


def test_swag_collects_the_last_iterates(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_sam.study.survey.outside.swag._NUMBER", 5)
    start = start_of(source, swa_lr=0.02)
    run, passed = Swag(start, collected=0.5), []
    for x, y in Minibatches(start.problem, source.batch_size, STEPS, SEED):
        run.step(x, y)
        passed.append(vector(start))
    due = torch.stack(passed)[23::4]  # after 24, 28, ... 40 steps
    torch.testing.assert_close(run.snapshots.mean, due.mean(0))
    torch.testing.assert_close(run.snapshots.variance, due.var(0, correction=0))
    with run.centred():
        torch.testing.assert_close(vector(start), due.mean(0))
    torch.testing.assert_close(vector(start), passed[-1], rtol=0, atol=0)


def test_swag_begins_with_a_shorter_map_and_goes_on_at_swa_lr() -> None:
    source = SOURCES["classification"]
    start, short = start_of(source, swa_lr=1e-9), start_of(source)
    run_on(Swag(start, collected=0.5), start, source)
    task = Task(METHODS["map"], source, STEPS // 2)
    descent = Descent(dataclasses.replace(short, share=task.share))
    for x, y in Minibatches(short.problem, source.batch_size, STEPS // 2, SEED):
        descent.step(x, y)
    same(start.plain.values(), short.plain.values())


def test_swag_has_one_snapshot_for_each_of_its_many_intervals_at_the_study_s_size() -> None:
    source = SOURCES["classification"]
    start = start_of(source, swa_lr=1e-3)
    run = Swag(dataclasses.replace(start, steps=1000))
    for x, y in Minibatches(start.problem, source.batch_size, 1000, SEED):
        run.step(x, y)
    assert run.snapshots.number == 125
    assert run.snapshots.columns.shape[1] == 20


def test_dropout_has_the_variance_of_its_masks() -> None:
    start = start_of(SOURCES["classification"], rate=0.3)
    run, net, x = Dropout(start), start.plain.net, start.problem.x[:2]
    with run.centred(), torch.no_grad():
        hidden, centre = net[:2](x), net(x)
    draws = []
    for _ in range(5000):
        with run.sampled(), torch.no_grad():
            draws.append(net(x))
    found = torch.stack(draws)
    # each hidden unit is 0 or 1 / (1 - p) of itself, independently: no input is dropped, nor an output
    exact = 0.3 / 0.7 * hidden**2 @ net[2].weight.detach().T ** 2
    fourth = (found - found.mean(0)).pow(4).mean(0)
    assert ((found.var(0) - exact).abs() < 5 * ((fourth - exact**2) / 5000).sqrt()).all()
    assert ((found.mean(0) - centre).abs() < 5 * (exact / 5000).sqrt()).all()


def test_dropout_trains_with_masks() -> None:
    source = SOURCES["classification"]
    start, by_hand = start_of(source, rate=0.3), start_of(source)
    x, y = start.problem.x, start.problem.y
    torch.manual_seed(3)
    Dropout(start).step(x, y)
    torch.manual_seed(3)
    net = by_hand.plain.net
    by_hand.plain.net = torch.nn.Sequential(*net[:2], torch.nn.Dropout(0.3), net[2])
    Descent(by_hand).step(x, y)
    torch.testing.assert_close(vector(start), vector(by_hand), rtol=0, atol=1e-12)


# The study

OUTSIDE = ["ivon", "laplace", "swag", "dropout"]


@pytest.fixture(scope="module", autouse=True)
def with_ivon() -> Iterator[None]:
    METHODS["ivon"], RUNS["ivon"] = METHOD, Ivon
    yield
    del METHODS["ivon"], RUNS["ivon"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: Any) -> Path:
    out: Path = tmp_path_factory.mktemp("outside")
    assert not [line for line in survey_worker.work(out, OUTSIDE) if "failed" in line]
    return out


def lines_of(out: Path) -> list[Any]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def test_a_study_has_the_same_measures_of_methods_from_outside(finished: Path) -> None:
    lines = lines_of(finished)
    assert {(line["method"], line["seed"]) for line in lines} == {(m, k) for m in ["map", *OUTSIDE] for k in range(2)}
    of_map = next(line for line in lines if line["method"] == "map")
    for line in lines:
        assert line["metrics"].keys() == of_map["metrics"].keys() - ({"elbo"} if line["method"] != "map" else set())
        assert line["at_mean"].keys() == of_map["at_mean"].keys()
        assert line["shift"].keys() == of_map["shift"].keys()
        assert line["flat"].keys() == of_map["flat"].keys()
        assert [gradients for gradients, _ in line["curve"]] == [10, 20]
        assert line["curve"][-1][1] == line["metrics"]["nll"]


def test_methods_from_outside_are_tuned_with_the_same_number_of_trials(finished: Path) -> None:
    for method in ("map", "ivon", "swag", "dropout"):
        log = [json.loads(line) for line in (finished / "tuning" / f"digits-60.{method}.log").read_text().splitlines()]
        told = [line for line in log if line.get("op_code") == 6 and line.get("state") == 1]
        assert len({line["trial_id"] for line in told}) == survey_worker.SIZE.trials
    assert not (finished / "tuning" / "digits-60.laplace.log").exists()
    settings = {line["method"]: line["settings"] for line in lines_of(finished)}
    assert settings["laplace"] == settings["map"]


def test_laplace_has_the_network_of_map_at_its_mean() -> None:
    source, settings = survey_worker.SOURCE, {"kl_weight": 0.1, "lr": 0.003}
    problem, flat = problems.Draws(source).final(1)[0], []

    def look(svi: Any, _: Any) -> None:
        flat.append(svi.guide.replica(0).median())

    found = [train(Task(METHODS[name], source, 20), [settings], [problem], num_samples=4, look=look)[0].at_mean
             for name in ("laplace", "map")]  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    same(*flat, tolerance=1e-5)


def test_a_run_that_ends_in_nan_is_no_error() -> None:
    source, problem = survey_worker.SOURCE, problems.Draws(survey_worker.SOURCE).final(1)[0]
    numbers = {"kl_weight": 0.1, "lr": 1e30, "hess_init": 1.0, "swa_lr": 1e30, "rate": 0.1}
    for method in OUTSIDE:
        (outcome,) = train(Task(METHODS[method], source, 8), [numbers], [problem], num_samples=2, shift=True)
        assert math.isnan(outcome.metrics["nll"])
        assert outcome.shift == {}


def test_a_killed_study_of_methods_from_outside_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.survey_worker", str(tmp_path)]
    for delay in ("3", "4"):
        subprocess.run([*command, delay, "dropout"], check=False, cwd=Path(__file__).parents[1])
    survey_worker.work(tmp_path, ["dropout"])
    assert sorted((line["method"], line["seed"]) for line in lines_of(tmp_path)) == [("dropout", 0), ("dropout", 1)]


def test_a_method_does_not_wait_for_the_settings_of_one_that_failed(tmp_path: Path, monkeypatch: Any) -> None:
    def choose(*_: Any) -> None:
        raise ValueError("no trial ended well")

    monkeypatch.setattr("pyro_sam.study.survey.studying.choose", choose)
    said = survey_worker.work(tmp_path, ["map", "laplace"])
    assert said[-1] == "digits-60, laplace: failed: map, whose settings laplace takes, failed."


# The command


def test_tables_mark_methods_from_outside(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problems.SOURCES, "digits-60", survey_worker.SOURCE)
    table = results(lines_of(finished), "digits-60")
    assert all(f"| {method} (outside) " in table for method in OUTSIDE)
    assert "| map  " in table


@pytest.fixture
def _no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in (("swag", "no_swag"), ("laplace", "no_laplace")):
        monkeypatch.setitem(METHODS, name, dataclasses.replace(METHODS[name], needs=package))


@pytest.mark.usefixtures("_no_packages")
def test_a_method_whose_package_is_missing_is_refused_in_one_line(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["study", "--methods", "map,laplace,swag", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert '--methods laplace, swag needs no_laplace, no_swag, not installed: pip install "pyro-sam[outside]".' in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.usefixtures("_no_packages")
def test_the_default_list_leaves_out_what_is_not_installed_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("pyro_sam.study.survey.studying.study", lambda data, methods, *_: asked.extend(methods))
    cli.main(["study", "--out", str(tmp_path)])
    assert asked == [name for name in METHODS if name not in ("laplace", "swag")]
    captured = capsys.readouterr()
    assert "left out laplace, swag, which needs no_laplace, no_swag, not installed" in captured.out + captured.err
