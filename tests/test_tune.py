"""tune: trials are what runs of their own would be, the best is at hand, mistakes are told and cost nothing."""

import builtins
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyro
import pyro.distributions as dist
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from pyro.infer import SVI
from pyro.optim import Adam
from searcher import SPACE, TRAIN, VALIDATION, X, build, model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_sam as ps

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def tune(
    build: Any = build, space: Any = SPACE, train: Any = TRAIN, validation: Any = VALIDATION, **kwargs: Any
) -> Any:
    return ps.tune(build, space, train, validation, **{"num_trials": 4, "num_epochs": 3, "progress": False, **kwargs})


def single(settings: Any) -> SVI:
    """Build a guide without replicas."""
    elbo = ps.SAM_ELBO(ps.AscendedSample(float(settings["alpha"])), kl_weight=float(settings["kl_weight"]))
    return SVI(model, ps.MeanFieldNormal(model), ps.optim.JointOptim(torch.optim.Adam, {"lr": 0.05}), elbo)


def nll_of(tuned: Any) -> float:
    pyro.set_rng_seed(0)
    return -float(ps.predict(tuned.model, tuned.guide, VALIDATION[0]).log_prob(VALIDATION[1]).mean())


# Trials


def test_a_trial_of_a_single_guide_is_the_run_of_its_settings() -> None:
    pyro.set_rng_seed(99)  # trials have a seed of their own
    tuned = tune(single, max_replicas=1, study=optuna.create_study(pruner=optuna.pruners.NopPruner()))
    assert sorted(row["trial"] for row in tuned.table) == [0, 1, 2, 3]
    for row in tuned.table:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        history = ps.fit(single(row), TRAIN, 3, progress=False, validation=VALIDATION)["validation"]
        assert row["nll"] == min(history)
        assert row["epoch"] == history.index(min(history)) + 1


def queued(params: list[dict[str, Any]]) -> Any:
    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    for each in params:
        study.enqueue_trial(each, user_attrs={"again": "first"} if each == {"kl_weight": 1.0, "alpha": 0.0} else None)
    return study


def test_trials_side_by_side_are_a_run_of_their_replicas() -> None:
    tuned = tune(num_epochs=6)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    params = {row["trial"]: row for row in tuned.table}
    settings = {name: torch.tensor([params[t][name] for t in range(4)]) for name in SPACE}
    history = ps.fit(build(settings), TRAIN, 6, progress=False, validation=VALIDATION)["validation"]
    for t in range(4):
        column = [each[t] for each in history]
        assert params[t]["nll"] == min(column)
        assert params[t]["epoch"] == column.index(min(column)) + 1


def test_a_trial_of_members_is_the_run_of_their_mixture() -> None:
    validation = ps.Validation(VALIDATION, members=2)
    tuned = tune(num_epochs=6, validation=validation, max_replicas=8)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    params = {row["trial"]: row for row in tuned.table}
    settings = {name: torch.tensor([params[t][name] for t in range(4) for _ in range(2)]) for name in SPACE}
    history = ps.fit(build(settings), TRAIN, 6, progress=False, validation=validation)["validation"]
    for t in range(4):
        column = [each[2 * t] for each in history]
        assert params[t]["nll"] == min(column)
        assert params[t]["epoch"] == column.index(min(column)) + 1
    assert tuned.guide.num_replicas == 2
    pyro.set_rng_seed(0)
    first = ps.predict(tuned.model, tuned.guide, VALIDATION[0], replica=0)
    pyro.set_rng_seed(0)
    second = ps.predict(tuned.model, tuned.guide, VALIDATION[0], replica=1)
    mixed = ((first.log_prob(VALIDATION[1]).exp() + second.log_prob(VALIDATION[1]).exp()) / 2).log()
    assert -float(mixed.mean()) == pytest.approx(tuned.table[0]["nll"], rel=1e-12)


def test_as_many_replicas_as_are_asked_for_run_side_by_side_of_whole_trials() -> None:
    numbers = []

    def counted(settings: Any) -> SVI:
        numbers.append(len(settings["alpha"]))
        return build(settings)

    tune(counted, validation=ps.Validation(VALIDATION, members=3), max_replicas=8, num_trials=5)
    assert numbers[:3] == [6, 6, 6]  # the looks before
    assert numbers[3:] == [6, 6, 3]
    numbers.clear()
    tune(counted, validation=ps.Validation(VALIDATION, members=3), max_replicas=1, num_trials=2)
    assert set(numbers) == {3}


def test_a_search_of_members_goes_on_gives_its_guide_again_and_is_refitted(tmp_path: Path) -> None:
    validation = ps.Validation(VALIDATION, members=2)
    first = tune(study=tmp_path / "s", validation=validation)
    again = tune(study=tmp_path / "s", validation=validation, refit=True)
    assert again.table == first.table
    assert again.guide.num_replicas == 2
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = build({name: torch.tensor([again.best[name]] * 2) for name in SPACE})
    ps.fit(svi, [*TRAIN, VALIDATION], again.table[0]["epoch"], progress=False)
    for name, value in svi.guide.named_parameters():
        torch.testing.assert_close(again.guide.get_parameter(name), value)  # a copy's scale is inverted anew


def test_the_first_trial_is_plain_variational_inference() -> None:
    tuned = tune(space=ps.default_space())
    first = next(row for row in tuned.table if row["trial"] == 0)
    assert (first["kl_weight"], first["alpha"]) == (1.0, 0.0)
    assert len(tuned.table) == 4


def test_the_best_is_chosen_and_its_guide_has_that_nll() -> None:
    tuned = tune(num_trials=6, max_replicas=3)
    nlls = [row["nll"] for row in tuned.table]
    assert nlls == sorted(nlls)
    assert tuned.best == {name: tuned.table[0][name] for name in SPACE}
    assert tuned.study.best_value == nlls[0] == pytest.approx(nll_of(tuned), rel=1e-12)
    assert tuned.guide.num_replicas is None
    assert len(tuned.study.trials) == 6


@pytest.mark.parametrize("local", [False, True])
def test_the_guide_does_not_take_what_the_store_holds_under_its_names(local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        other = single({"alpha": 1.0, "kl_weight": 1.0})
        ps.fit(other, TRAIN, 1, progress=False)
        for most, how in ((1, single), (4, build)):
            tuned = tune(how, max_replicas=most)
            assert nll_of(tuned) == pytest.approx(tuned.table[0]["nll"], rel=1e-12)
            tuned.guide(*TRAIN[0])
            assert nll_of(tuned) == pytest.approx(tuned.table[0]["nll"], rel=1e-12)


def test_parameters_of_the_model_come_with_the_guide() -> None:
    def noisy(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(w * x, noise), obs=y)

    def build(settings: Any) -> SVI:
        elbo = ps.SAM_ELBO(ps.Gaussian(), kl_weight=float(settings["kl_weight"]))
        return SVI(noisy, ps.MeanFieldNormal(noisy), ps.optim.JointOptim(torch.optim.Adam, {"lr": 0.05}), elbo)

    pyro.param("noise", torch.tensor(7.0), constraint=dist.constraints.positive)
    pyro.param("mine", torch.tensor(3.0))
    tuned = tune(build, {"kl_weight": SPACE["kl_weight"]}, max_replicas=1)
    assert nll_of(tuned) == pytest.approx(tuned.table[0]["nll"], rel=1e-12)
    assert float(pyro.param("noise").detach()) < 1
    assert float(pyro.param("mine").detach()) == 3


def test_random_streams_and_the_store_are_left_alone() -> None:
    pyro.param("mine", torch.tensor(3.0))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    tune()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    assert all(name == "mine" or name.startswith("MeanFieldNormal_") for name in pyro.get_param_store())


def test_categories_are_shared_by_a_batch_and_given_as_they_are() -> None:
    seen = []

    def with_width(settings: Any) -> SVI:
        seen.append((settings["width"], len(settings["kl_weight"]), settings["steps"].dtype))
        return build(settings)

    space = {**SPACE, "width": CategoricalDistribution(["narrow", "wide"]), "steps": IntDistribution(1, 5)}
    tuned = tune(with_width, space, num_trials=12, num_epochs=1)
    assert {row["width"] for row in tuned.table} == {"narrow", "wide"}
    batches = [(width, size) for width, size, _ in seen if size > 2]
    assert len(batches) == 2
    assert sum(size for _, size in batches) == 12
    assert {dtype for *_, dtype in seen} == {torch.int64}


def test_a_learning_rate_may_be_each_replicas_own() -> None:
    def with_rate(settings: Any) -> SVI:
        svi = build(settings)
        svi.optim = ps.optim.JointOptim(torch.optim.Adam, {"lr": settings["lr"]})
        return svi

    tuned = tune(with_rate, {**SPACE, "lr": FloatDistribution(1e-6, 0.5, log=True)}, num_trials=8, num_epochs=20)
    by_rate = sorted(tuned.table, key=lambda row: row["lr"])
    assert by_rate[0]["nll"] > by_rate[-1]["nll"] + 0.05


def test_a_study_of_ones_own_decides_by_its_sampler_and_pruner() -> None:
    class Worst(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number in (1, 2) and len(trial.intermediate_values) > 1

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(5), pruner=Worst())
    epochs = []

    class Batches:
        def __iter__(self) -> Any:
            epochs.append(1)
            return iter(TRAIN)

    tuned = tune(single, train=Batches(), study=study, max_replicas=1, num_epochs=5)
    assert {row["trial"]: row["state"] for row in tuned.table} == {
        0: "complete",
        1: "pruned",
        2: "pruned",
        3: "complete",
    }
    assert [len(trial.intermediate_values) for trial in study.trials] == [5, 2, 2, 5]
    assert [row["state"] for row in tuned.table] == ["complete", "complete", "pruned", "pruned"]
    expected = optuna.create_study(sampler=optuna.samplers.RandomSampler(5))
    expected.enqueue_trial({"kl_weight": 1.0, "alpha": 0.0})
    asked = [expected.ask(SPACE).params for _ in range(4)]
    assert [trial.params for trial in study.trials] == asked


def test_refitted_it_is_the_run_on_all_the_data_for_the_best_number_of_epochs() -> None:
    tuned = tune(refit=True, num_epochs=8)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = build({name: torch.tensor([tuned.best[name]]) for name in SPACE})
    ps.fit(svi, [*TRAIN, VALIDATION], tuned.table[0]["epoch"], progress=False)
    for name, value in svi.guide.named_parameters():
        assert torch.equal(tuned.guide.get_parameter(name), value[0]), name


def test_a_finished_search_gives_its_best_guide_again(tmp_path: Path) -> None:
    first = tune(study=tmp_path / "s", max_replicas=1)
    again = tune(study=tmp_path / "s", max_replicas=1)
    assert again.table == first.table
    assert len(again.study.trials) == 4
    assert nll_of(again) == pytest.approx(first.table[0]["nll"], rel=1e-9)  # trained again, from the same seed
    more = tune(study=tmp_path / "s", num_trials=6, max_replicas=1)
    assert len(more.table) == 6


# What fails


def failing(settings: Any) -> SVI:
    """A build whose second and fourth trials end badly: one by an exception, one by NaN."""
    svi = build(settings)
    losses = svi.loss.__self__
    kl = [round(float(each), 4) for each in settings["kl_weight"]]

    class Loss(ps.SAM_ELBO):
        def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
            if 0.2 in kl:
                raise RuntimeError("out of memory\nof the device")
            loss = super().loss_and_grads(model, guide, *args, **kwargs)
            if 0.3 in kl:
                guide.locs.w_unconstrained.grad[kl.index(0.3)] = math.nan
            return loss

    return SVI(model, svi.guide, svi.optim, Loss(losses.perturbation, kl_weight=losses.kl_weight))


@pytest.mark.parametrize("most", [1, 8])
@pytest.mark.filterwarnings("ignore:Encountered")
def test_trials_that_fail_are_recorded_and_the_others_go_on(most: int) -> None:
    study = queued([{"kl_weight": 1.0, "alpha": 0.0}])
    for weight in (0.2, 0.1, 0.3, 0.4):
        study.enqueue_trial({"kl_weight": weight, "alpha": 1.0})
    tuned = tune(failing, study=study, num_trials=5, max_replicas=most)
    states = {row["trial"]: (row["state"], row["why"]) for row in tuned.table}
    assert [states[t][0] for t in range(5)] == ["complete", "failed", "complete", "failed", "complete"]
    assert states[1][1] == "RuntimeError: out of memory"
    assert states[3][1]
    assert [trial.state for trial in study.trials].count(TrialState.FAIL) == 2
    assert all(math.isnan(row["nll"]) for row in tuned.table[-2:])


def test_a_search_in_which_all_fails_says_of_what() -> None:
    def broken(settings: Any) -> SVI:
        svi = build(settings)
        svi.loss_and_grads = lambda *args, **kwargs: 1 / 0
        return svi

    study = optuna.create_study()
    with pytest.raises(
        ValueError, match=r"none of the 4 trials ended with a finite .*ZeroDivisionError: division by zero"
    ):
        tune(broken, study=study)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 4


def test_ctrl_c_gives_the_trials_back_and_the_search_goes_on(tmp_path: Path) -> None:
    class Interrupted:
        def __iter__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(train=Interrupted(), study=tmp_path / "s", max_replicas=2)
    tuned = tune(study=tmp_path / "s")
    assert [row["state"] for row in tuned.table] == ["complete"] * 4
    assert {tuple(trial.params.items()) for trial in tuned.study.trials if "void" in trial.user_attrs} <= {
        tuple(trial.params.items()) for trial in tuned.study.trials if "void" not in trial.user_attrs
    }
    assert all("interrupted" in t.user_attrs["void"] for t in tuned.study.trials if "void" in t.user_attrs)


# What is refused


def wrong_number(settings: Any) -> SVI:
    return build({name: value[:1] for name, value in settings.items()})


def wrong_weights(settings: Any) -> SVI:
    svi = build(settings)
    svi.loss.__self__.kl_weight = [0.1, 0.2, 0.3]
    return svi


REFUSED = [
    (
        {"space": {**SPACE, "lr": FloatDistribution(0.1, 1.0)}},
        r"space has a setting that build does not read, 'lr'; build",
    ),
    ({"space": {"alpha": SPACE["alpha"]}}, r"build reads 'kl_weight', which is not in the space; it has alpha\."),
    ({"space": {"alpha": 3}}, "space must be a dict of Optuna's distributions by name"),
    ({"space": {}}, "space must be a dict of Optuna's distributions by name"),
    *[
        ({"space": {**SPACE, name: SPACE["alpha"]}}, f"space must not have a setting of the name '{name}'")
        for name in ("nll", "epoch", "state", "trial", "why")
    ],
    ({"build": wrong_number}, r"build must return .*there are 2 trials, and the guide has num_replicas=1"),
    (
        {"build": wrong_number, "validation": ps.Validation(VALIDATION, members=3)},
        r"build must return .*there are 6 members, and the guide has num_replicas=1",
    ),
    ({"build": lambda s: s["alpha"] + s["kl_weight"]}, "build must return a pyro"),
    ({"build": wrong_weights}, "kl_weight must have a number for each of the guide's 2 replicas, got 3"),
    ({"validation": (X,)}, "validation must hold observations"),
    ({"validation": []}, "validation must hold observations, got no batch"),
    ({"train": 3}, "loader must be an iterable of batches"),
    ({"site": "y"}, "validation must hold observations.* one of name 'y'"),
    ({"num_trials": 0}, "num_trials must be a whole number"),
    ({"num_epochs": 0}, "num_epochs must be a whole number"),
    ({"max_replicas": 0}, "max_replicas must be a whole number"),
    ({"patience": 0.0}, "patience must be positive"),
    ({"refit": 1}, "refit must be True or False"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_mistakes_are_told_in_one_line_and_nothing_is_recorded(change: dict[str, Any], message: str) -> None:
    study = optuna.create_study()
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        tune(**{"study": study, **change})
    assert "\n" not in str(error.value)
    assert study.trials == []
    assert study.user_attrs == {}
    assert not list(pyro.get_param_store())


def shared_parameter() -> Any:
    bnn = ps.BayesianModule(nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)).double(), hide="0")
    return network(bnn), None


def shared_statistics() -> Any:
    bnn = ps.BayesianModule(nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).double())
    return network(bnn), None


def shared_guide() -> Any:
    return model, ps.MeanFieldNormal(model)


def network(bnn: Any) -> Any:
    def regression(x: Tensor, y: Tensor | None = None) -> None:
        mean = bnn(x[:, None])[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    return regression


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (shared_parameter, "the parameter '.*0.(weight|bias)'"),
        (shared_statistics, "the buffer '.*' of BatchNorm1d"),
        (shared_guide, r"the parameter 'MeanFieldNormal\..*'"),
    ],
)
def test_a_build_whose_trials_would_begin_where_others_ended_is_refused(make: Any, what: str) -> None:
    model, guide = make()

    def leaking(settings: Any) -> SVI:
        elbo = ps.SAM_ELBO(ps.AscendedSample(float(settings["alpha"])), kl_weight=float(settings["kl_weight"]))
        return SVI(model, guide or ps.MeanFieldNormal(model), Adam({"lr": 0.05}), elbo)

    with pytest.raises(ValueError, match=f"build must make the network and the guide anew: .* share {what}"):
        tune(leaking, max_replicas=1)


def test_the_rows_of_every_trial_come_in_the_same_order() -> None:
    stream = torch.Generator().manual_seed(7)
    train = DataLoader(TensorDataset(X, 0.5 * X), batch_size=2, shuffle=True, generator=stream)
    study = queued([{"kl_weight": 0.3, "alpha": 1.0}] * 3)
    tuned = tune(single, train=train, max_replicas=1, study=study)
    assert len({row["nll"] for row in tuned.table if row["kl_weight"] == 0.3}) == 1
    assert torch.equal(stream.get_state(), torch.Generator().manual_seed(7).get_state())


def test_a_name_that_some_category_alone_reads_is_read() -> None:
    def by_law(settings: Any) -> SVI:
        svi = build({"kl_weight": settings["kl_weight"], "alpha": torch.zeros(len(settings["kl_weight"]))})
        if settings["law"] == "AscendedSample":
            svi.loss.__self__.perturbation = ps.AscendedSample(settings["alpha"])
        return svi

    space = {**SPACE, "law": CategoricalDistribution(["Gaussian", "AscendedSample"])}
    assert len(tune(by_law, space).table) == 4


@pytest.mark.parametrize(
    ("space", "epochs", "message"),
    [
        (
            {**SPACE, "alpha": FloatDistribution(0.0, 9.0)},
            3,
            "made with another space: alpha is .*3.0.* there, .*9.0.* here",
        ),
        ({"kl_weight": SPACE["kl_weight"]}, 3, "made with another space: alpha is .* there, not in it here"),
        (SPACE, 5, "made with num_epochs=3, and its trials do not compare with those of num_epochs=5"),
    ],
)
def test_a_study_of_another_search_is_refused_and_kept(space: Any, epochs: int, message: str, tmp_path: Path) -> None:
    def lax(settings: Any) -> SVI:
        return build({"alpha": settings.get("alpha", torch.zeros(len(settings["kl_weight"]))), **settings})

    tune(study=tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(ValueError, match=f"study was {message}"):
        tune(lax, space, study=tmp_path / "s", num_trials=9, num_epochs=epochs)
    assert (tmp_path / "s").read_bytes() == before


def test_a_study_of_single_posteriors_takes_no_mixtures(tmp_path: Path) -> None:
    tune(study=tmp_path / "s")
    with pytest.raises(ValueError, match="made with members=1, and its trials do not compare with those of members=2"):
        tune(study=tmp_path / "s", validation=ps.Validation(VALIDATION, members=2))


def test_a_study_with_other_trials_or_another_direction_is_refused() -> None:
    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("lr", 0, 1), n_trials=1)
    with pytest.raises(ValueError, match="its trials and space differ in alpha, kl_weight, lr"):
        tune(study=study)
    assert len(study.trials) == 1
    with pytest.raises(ValueError, match="study must minimise one number"):
        tune(study=optuna.create_study(direction="maximize"))


@pytest.mark.parametrize("study", [3, "/nowhere/s", "/"])
def test_what_is_no_study_is_refused(study: Any) -> None:
    with pytest.raises(ValueError, match="study must be"):
        tune(study=study)


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("optuna"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for call in (tune, ps.default_space):
        with pytest.raises(ImportError, match=r'tune needs optuna: pip install "pyro-sam\[tune\]"'):
            call()


# Spaces


@pytest.mark.parametrize(
    ("laws", "names"),
    [
        ((), {"kl_weight", "alpha"}),
        ((ps.Gaussian,), {"kl_weight"}),
        ((ps.Adversarial,), {"kl_weight", "rho", "law"}),
        ((ps.MixSAM,), {"kl_weight", "rho", "kappa", "law"}),
        ((ps.AscendedSample, ps.Adversarial), {"kl_weight", "alpha", "rho", "law"}),
    ],
)
def test_every_default_space_has_plain_variational_inference_in_it(laws: Any, names: set[str]) -> None:
    space = ps.default_space(*laws)
    assert space.keys() == names
    assert space["kl_weight"].low < 0.01
    assert space["kl_weight"].high == 1.0
    seen = []

    def build_law(settings: Any) -> SVI:
        svi = build({"kl_weight": settings["kl_weight"], "alpha": torch.zeros(len(settings["kl_weight"]))})
        svi.loss.__self__.perturbation = ps.tuning.law_of(settings)
        seen.append((svi.loss.__self__.perturbation, svi.loss.__self__.kl_weight))
        return svi

    tuned = tune(build_law, space, num_trials=8, max_replicas=1, num_epochs=1)
    first = min(tuned.table, key=lambda row: row["trial"])
    assert first["kl_weight"] == 1.0
    plain = [law for law, weight in seen if weight == (1.0,)]
    assert any(law == ps.Gaussian() or (isinstance(law, ps.AscendedSample) and law.alpha == (0.0,)) for law in plain)
    if "law" in names:
        assert {type(law).__name__ for law, _ in seen} == set(space["law"].choices)


def test_a_law_without_a_default_space_is_refused() -> None:
    with pytest.raises(
        ValueError, match="default_space knows the laws Gaussian, AscendedSample, Adversarial, MixSAM, got"
    ):
        ps.default_space(ps.Mean)


def test_settings_are_a_mapping() -> None:
    def by_name(settings: Any) -> SVI:
        assert "other" not in settings
        assert settings.get("other", 3) == 3
        assert len(settings) == len(list(settings)) == 2
        assert "alpha" in repr(settings)
        return build({**settings})

    assert len(tune(by_name).table) == 4


# Progress


def test_the_bar_counts_trials_and_shows_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    tuned = tune(progress=True)
    err = capsys.readouterr().err
    assert "4/4" in err
    assert f"best={tuned.table[0]['nll']:.4g}" in err
