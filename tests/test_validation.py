"""Validation looks at the posterior predictive and at nothing else; the best weights are kept; numbers are annealed."""

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_sam as ps
from pyro_sam.training.loop import Training

N = 12


def batch(rows: int = N) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, rows)[:, None]
    return x, x[:, 0].sin()


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))


def build(net: nn.Module | None = None, **settings: Any) -> SVI:
    bnn = ps.BayesianModule(network() if net is None else net)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = bnn(x).squeeze(-1)
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)

    optim = ps.optim.JointOptim(torch.optim.Adam, {"lr": 0.02})
    guide = ps.MeanFieldNormal(model, init_scale=0.05)
    return SVI(model, guide, optim, loss=ps.SAM_ELBO(ps.MixSAM(rho=0.5), **settings))


def fit(svi: SVI, epochs: int = 2, **kwargs: Any) -> dict[str, list[float]]:
    loader = DataLoader(TensorDataset(*batch()), batch_size=5, shuffle=True)
    return ps.fit(svi, loader, epochs, **{"progress": False, **kwargs})


def line(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(w * x, 0.5), obs=y)


def line_svi(**kwargs: Any) -> SVI:
    guide = ps.MeanFieldNormal(line, init_loc_fn=lambda site: torch.tensor(0.7), init_scale=0.3)
    return SVI(line, guide, ps.optim.JointOptim(torch.optim.SGD, {"lr": 0.0}), ps.SAM_ELBO(ps.Gaussian()), **kwargs)


# The number


def test_it_is_the_nll_of_the_posterior_predictive_in_closed_form() -> None:
    x, y = torch.linspace(-2, 2, 9), torch.linspace(-1, 3, 9)
    validation = ps.Validation((x, y), num_samples=20_000)
    history = ps.fit(line_svi(), [(x, y)], 1, progress=False, validation=validation)
    # w ~ N(.7, .3²) and y | w ~ N(wx, .5²), so y ~ N(.7 x, .09 x² + .25)
    exact = -dist.Normal(0.7 * x, (0.09 * x**2 + 0.25).sqrt()).log_prob(y)
    w = 0.7 + 0.3 * torch.randn(20_000, 1)
    weights = dist.Normal(w * x, 0.5).log_prob(y).exp() / (-exact).exp()
    error = float((weights.var(0) / 20_000).sqrt().mean())  # of a mean of logs of means
    assert history["validation"][0] == pytest.approx(float(exact.mean()), abs=4 * error)


def test_batches_of_any_size_and_kind_give_one_number() -> None:
    x, y = batch()
    pieces = [(x[rows], y[rows]) for rows in (slice(0, 5), slice(5, N))]
    found = [
        fit(build(), 1, validation=each)["validation"]
        for each in map(
            self_clearing, [(x, y), pieces, {"x": x, "y": y}, DataLoader(TensorDataset(x, y), batch_size=7)]
        )
    ]
    assert found[1:] == [pytest.approx(found[0], rel=1e-12)] * 3


def self_clearing(value: Any) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    return value


def test_epochs_see_the_same_noise_and_rows() -> None:
    x, y = torch.linspace(-2, 2, 9), torch.linspace(-1, 3, 9)
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True, generator=torch.Generator())
    found = ps.fit(line_svi(), [(x, y)], 3, progress=False, validation=loader)["validation"]
    assert len(set(found)) == 1


@pytest.mark.parametrize("several", [True, False])
def test_the_site_is_the_only_observed_one_or_obs_or_the_one_named(several: bool) -> None:
    def model(x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs" if several else "y", dist.Normal(w * x, 1.0), obs=y)
            if several:
                pyro.sample("other", dist.Normal(w * x, 2.0), obs=z)

    x, y = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    data = (x, y, 5 * y) if several else (x, y)
    guide = ps.MeanFieldNormal(model, init_loc_fn=lambda site: torch.tensor(0.7), init_scale=1e-6)
    svi = SVI(model, guide, ps.optim.JointOptim(torch.optim.SGD, {"lr": 0.0}), ps.SAM_ELBO())
    history = ps.fit(svi, [data], 1, progress=False, validation=data)
    assert history["validation"] == pytest.approx([-float(dist.Normal(0.7, 1.0).log_prob(y).mean())], rel=1e-4)
    if several:
        other = ps.Validation(data, site="other")
        history = ps.fit(svi, [data], 1, progress=False, validation=other)
        assert history["validation"] == pytest.approx([-float(dist.Normal(0.7, 2.0).log_prob(5 * y).mean())], rel=1e-4)


def test_arguments_that_a_dict_leaves_out_take_their_defaults() -> None:
    def model(x: Tensor, shift: float = 2.0, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(w + shift, 1.0), obs=y)

    data = {"x": torch.ones(3), "y": torch.tensor([1.0, 2.0, 3.0])}
    guide = ps.MeanFieldNormal(model, init_loc_fn=lambda site: torch.tensor(0.7), init_scale=1e-6)
    svi = SVI(model, guide, ps.optim.JointOptim(torch.optim.SGD, {"lr": 0.0}), ps.SAM_ELBO())
    history = ps.fit(svi, [data], 1, progress=False, validation=data)
    assert history["validation"] == pytest.approx([-float(dist.Normal(2.7, 1.0).log_prob(data["y"]).mean())], rel=1e-4)


# Nothing else is touched


def trace_of(validation: Any) -> tuple[Any, ...]:
    """Train, and return all that validation might have touched."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    svi, modes = build(net := network()), []
    history = fit(
        svi,
        3,
        validation=validation,
        restore_best_weights=False,
        callbacks=[lambda training: modes.append([module.training for module in net.modules()])],
    )
    history.pop("validation", None)
    history.pop("seconds")
    draws = [float(torch.randn(())), random.random(), float(np.random.rand())]  # noqa: NPY002
    kept = {name: value.tolist() for name, value in pyro.get_param_store().items()}
    return history, kept, {name: value.tolist() for name, value in net.named_buffers()}, modes, draws


def test_training_and_streams_and_buffers_and_modes_are_those_without_validation() -> None:
    class Drawing:
        def __iter__(self) -> Iterator[Any]:
            torch.randn(3), random.random(), np.random.rand()  # noqa: NPY002
            yield batch(7)

    straight = trace_of(None)
    for validation in (batch(7), Drawing(), DataLoader(TensorDataset(*batch(7)), batch_size=2, shuffle=True)):
        assert trace_of(validation) == straight


class Own(nn.Module):
    """Noise from a generator of its own, and a buffer that its method writes to: nobody calls the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = torch.Generator().manual_seed(4)
        self.register_buffer("sum", torch.zeros(()))

    def noise(self) -> Tensor:
        value = torch.rand((), generator=self.stream)
        self.sum += value
        return value


@pytest.mark.parametrize("elbo", [ps.SAM_ELBO(), Trace_ELBO()], ids=["SAM_ELBO", "Trace_ELBO"])
def test_the_models_own_streams_and_buffers_are_those_of_the_steps_alone(elbo: Any) -> None:
    """Nor do the terms of a loss that does not tell them, as Pyro's, cost the model a draw."""
    x, y = batch(8)

    def run(train: Any) -> tuple[Any, ...]:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        own = Own()

        def model(x: Tensor, y: Tensor | None = None) -> None:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(w * x[:, 0] + own.noise(), 0.1), obs=y)

        guide = ps.MeanFieldNormal(model)
        guide.initialize(x, y)
        own.stream.manual_seed(5)
        own.sum.zero_()
        train(SVI(model, guide, ps.optim.JointOptim(torch.optim.SGD, {"lr": 1e-3}), elbo))
        kept = {name: value.tolist() for name, value in pyro.get_param_store().items()}
        return kept, own.stream.get_state().tolist(), float(own.sum)

    straight = run(lambda svi: [svi.step(x, y) for _ in range(3)])
    assert run(lambda svi: ps.fit(svi, [(x, y)], 3, progress=False)) == straight
    assert (
        run(lambda svi: ps.fit(svi, [(x, y)], 3, progress=False, validation=(x, y), restore_best_weights=False))
        == straight
    )


def test_a_generator_that_both_loaders_share_is_left_alone() -> None:
    def run(validate: bool) -> list[float]:
        self_clearing(None)
        data, generator = TensorDataset(*batch()), torch.Generator()
        loader, other = (DataLoader(data, batch_size=5, shuffle=True, generator=generator) for _ in range(2))
        return ps.fit(build(), loader, 3, progress=False, validation=other if validate else None)["loss"]

    assert run(True) == run(False)


def test_modules_are_in_evaluation_mode() -> None:
    svi = build(net := network())
    seen = []
    net[3].register_forward_hook(lambda module, args, out: seen.append((module.training, torch.equal(args[0], out))))
    fit(svi, 1, validation=batch())
    steps = [each for each in seen if each[0]]
    looks = [each for each in seen if not each[0]]
    assert len(looks) > 32
    assert all(unchanged for _, unchanged in looks)  # no dropout
    assert not all(unchanged for _, unchanged in steps)
    assert net[3].training


def test_an_error_while_validating_leaves_modes_and_streams() -> None:
    svi, state = build(net := network()), []

    class Breaks:
        def __iter__(self) -> Iterator[Any]:
            yield batch()
            if net[1].num_batches_tracked:  # not at the check before training
                raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fit(svi, 1, validation=Breaks(), callbacks=[state.append])
    assert all(module.training for module in net.modules())


# Best weights


def test_training_ends_at_the_best_epochs_weights_and_buffers() -> None:
    svi, seen = build(net := network()), []

    def note(training: Training) -> None:
        values = [*(value for _, value in pyro.get_param_store().items()), *net.buffers()]
        seen.append([value.detach().clone() for value in values])

    def now() -> list[Tensor]:
        return [*(value for _, value in pyro.get_param_store().items()), *net.buffers()]

    x, y = batch(7)
    history = fit(svi, 12, validation=(x, y / 2), callbacks=[note])
    best = min(range(12), key=history["validation"].__getitem__)
    assert 0 < best < 11
    assert all(map(torch.equal, now(), seen[best]))
    assert len(history["validation"]) == 12
    self_clearing(None)
    seen.clear()
    svi = build(net := network())
    fit(svi, 12, validation=(x, y / 2), callbacks=[note], restore_best_weights=False)
    assert all(map(torch.equal, now(), seen[-1]))


def test_the_predictive_in_hand_has_the_smallest_number_of_the_history() -> None:
    svi = build(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    x, y = batch(7)
    history = fit(svi, 12, validation=(x, y / 2))
    pyro.set_rng_seed(0)
    assert -float(ps.predict(svi.model, svi.guide, x).log_prob(y / 2).mean()) == pytest.approx(
        min(history["validation"]), rel=1e-12
    )


def test_early_stopping_watches_validation_where_there_is_one() -> None:
    class Fake:
        def __init__(self, **history: list[float]) -> None:
            self.history: Any = history

    falling, rising = [3.0, 2.0, 1.0, 0.5], [1.0, 2.0, 3.0, 4.0]
    stop: Any = ps.EarlyStopping(patience=3)
    assert stop(Fake(loss=falling, validation=rising))
    assert not stop(Fake(loss=rising, validation=falling))
    assert stop(Fake(loss=rising))
    assert stop(Fake(loss=falling, validation=[1.0, math.nan, math.nan, math.nan]))
    x, y = batch(7)
    history = fit(build(), 50, validation=(x, y / 2), callbacks=[ps.EarlyStopping(patience=2)])
    last = history["validation"]
    assert len(last) < 50
    assert min(last) == min(last[:-2]) < min(last[-2:])


def test_the_bar_shows_it_after_every_epoch_and_through_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, bool]] = []

    class Display:
        def update(self, values: Any) -> None:
            shown.append(("batch", "validation" in values))

        def epoch(self, values: Any) -> None:
            shown.append(("epoch", "validation" in values))

        def close(self) -> None:
            pass

    monkeypatch.setattr("pyro_sam.training.loop.display", lambda *args: Display())
    fit(build(), 2, validation=batch())
    assert shown == [("batch", False)] * 3 + [("epoch", True)] + [("batch", True)] * 3 + [("epoch", True)]


# Errors


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (lambda: batch()[:1], r"validation must hold observations.* observes nothing.*A tuple is one batch"),
        (lambda: [batch()[:1]], r"validation must hold observations.* observes nothing"),
        (lambda: list(batch()), r"validation must hold observations.* observes nothing"),
        (lambda: {"x": batch()[0]}, r"validation must hold observations.* observes nothing"),
        (lambda: [], "validation must hold observations, got no batch"),
        (lambda: batch(0), "validation must hold observations, got a batch of none"),
        (lambda: iter([batch()]), "an iterator is used up after one"),
        (lambda: 3, "validation must be batches, or one batch"),
        (lambda: (1, 2, 3), "validation's batches do not fit the model"),
        (
            lambda: ps.Validation(batch(), site="x"),
            "the model observes obs, and is to observe one site, or one of name 'x'",
        ),
    ],
)
def test_what_cannot_be_validated_on_is_refused_before_training(validation: Any, message: str) -> None:
    svi = build()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fit(svi, validation=validation())
    assert not list(pyro.get_param_store())
    assert svi.guide.prototype_trace is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_later_batch_without_rows_is_named() -> None:
    x, y = batch()
    with pytest.raises(ValueError, match="validation must hold observations, got a batch of none"):
        fit(build(), validation=[(x, y), (x[:0], y[:0])])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_is_refused(mode: Any) -> None:
    with mode(), pytest.raises(ValueError, match=r"needs gradients: call it outside of torch.no_grad\(\)"):
        fit(build())
    assert not len(pyro.get_param_store())


def test_the_look_before_training_leaves_no_parameter_of_the_model() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.param("noise", lambda: torch.rand(()))
        line(x, y)

    svi = line_svi()
    svi = SVI(model, ps.MeanFieldNormal(model), svi.optim, svi.loss.__self__)
    with pytest.raises(ValueError, match="observes nothing"):
        ps.fit(svi, [(torch.ones(2), torch.ones(2))], 1, progress=False, validation=(torch.ones(2),))
    assert not list(pyro.get_param_store())


def test_nan_in_the_data_is_named() -> None:
    x, y = batch()
    y[3] = math.nan
    with pytest.raises(ValueError, match=r"validation must be finite, and in part 1 of the batch .*row 3"):
        fit(build(), validation=(x, y))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"restore_best_weights": 1}, "restore_best_weights must be True or False"),
        ({"validation": (lambda: ps.Validation(batch(), num_samples=0))}, "num_samples must be a whole number"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(build(), **{name: value() if callable(value) else value for name, value in change.items()})


def test_arguments_by_name_only_are_refused() -> None:
    def model(*, x: Tensor, y: Tensor | None = None) -> None:
        line(x, y)

    svi = line_svi()
    svi.model = model
    with pytest.raises(
        ValueError, match="validation needs a model whose arguments may be given by place, and it takes x"
    ):
        ps.fit(svi, [{"x": torch.ones(2)}], 1, progress=False, validation={"x": torch.ones(2), "y": torch.ones(2)})


# Annealing


def test_numbers_are_set_before_every_epoch() -> None:
    svi, seen = build(), []

    class Note(ps.SAM_ELBO):
        def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
            law: Any = self.perturbation
            seen.append((self.kl_weight, law.rho, law.kappa))
            return super().loss_and_grads(*args, **kwargs)

    elbo = Note(ps.MixSAM(rho=0.5, kappa=2.0))
    svi = SVI(svi.model, svi.guide, svi.optim, elbo)
    anneal = ps.Anneal(kl_weight=(0.0, 1.0, 4), rho=lambda epoch: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6][epoch])
    fit(svi, 6, callbacks=[anneal])
    assert seen[::3] == seen[1::3] == seen[2::3]
    assert [each[0] for each in seen[::3]] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [each[1] for each in seen[::3]] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert {each[2] for each in seen} == {2.0}
    assert isinstance(svi.loss.__self__, Note)


def test_an_annealed_run_is_the_loop_that_assigns() -> None:
    self_clearing(None)
    history = fit(build(), 3, callbacks=[ps.Anneal(kl_weight=(1.0, 0.1, 2))])["loss"]
    self_clearing(None)
    svi, elbo, loader = build(), None, DataLoader(TensorDataset(*batch()), batch_size=5, shuffle=True)
    elbo = svi.loss.__self__
    means = []
    for weight in (1.0, 0.55, 0.1):
        elbo.kl_weight = weight
        losses = [svi.step(*each) for each in loader]
        means.append(sum(losses) / len(losses))
    assert history == pytest.approx(means, rel=1e-12)


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ({}, "Anneal needs a schedule"),
        ({"kl_weight": 3}, r"kl_weight must be \(start, stop, epochs\) or a function of the epoch, got kl_weight=3"),
        ({"kl_weight": (0.0, 1.0)}, r"kl_weight must be \(start, stop, epochs\)"),
        ({"rho": (0.0, math.inf, 3)}, "rho must be a finite number"),
        ({"rho": (0.0, 1.0, 0)}, "rho: epochs must be a whole number"),
    ],
)
def test_schedules_that_are_none_are_refused(schedules: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ps.Anneal(**schedules)


def test_a_number_that_is_refused_leaves_all_as_they_were() -> None:
    for schedules in (
        {"kl_weight": (0.0, 1.0, 2), "rho": (-1.0, 1.0, 2)},
        {"rho": (0.1, 1.0, 2), "kl_weight": (-1.0, 0.0, 2)},
    ):
        svi = build(kl_weight=0.7)
        with pytest.raises(ValueError, match="must be non-negative"):
            fit(svi, callbacks=[ps.Anneal(**schedules)])
        elbo: Any = svi.loss.__self__
        assert elbo.kl_weight == 0.7
        assert elbo.perturbation == ps.MixSAM(rho=0.5)


def test_numbers_that_the_loss_does_not_have_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"Anneal knows kl_weight and .*which are rho, kappa; got alpha"):
        fit(build(), callbacks=[ps.Anneal(alpha=(0.0, 1.0, 2))])
    svi = build()
    with pytest.raises(ValueError, match="Anneal sets numbers of a SAM_ELBO, and the loss is"):
        fit(SVI(svi.model, svi.guide, svi.optim, Trace_ELBO()), callbacks=[ps.Anneal(kl_weight=(0.0, 1.0, 2))])
    with pytest.raises(ValueError, match="kl_weight must be non-negative"):
        fit(build(), callbacks=[ps.Anneal(kl_weight=(-1.0, 1.0, 2))])
    assert not list(pyro.get_param_store())


# How the model is called


def test_a_model_is_called_without_the_observations_where_it_can_be() -> None:
    seen = []

    def model(x: Tensor, y: Tensor | None = None) -> None:
        seen.append(y is None)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4 if y is not None else len(x), subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(w * x, 1.0), obs=y)

    x, y = torch.linspace(0, 1, 9), torch.linspace(1, 2, 9)  # more rows than the plate has
    guide = ps.MeanFieldNormal(model, init_loc_fn=lambda site: torch.tensor(0.7), init_scale=1e-6)
    svi = SVI(model, guide, ps.optim.JointOptim(torch.optim.SGD, {"lr": 0.0}), ps.SAM_ELBO(ps.Mean()))
    history = ps.fit(svi, [(x[:4], y[:4])], 1, progress=False, validation=(x, y))
    assert history["validation"] == pytest.approx([-float(dist.Normal(0.7 * x, 1.0).log_prob(y).mean())], rel=1e-4)
    assert sum(seen) > 32


@pytest.mark.parametrize("needed", [True, False])
def test_a_model_that_needs_the_observations_or_changes_them_is_called_with_them(needed: bool) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 9, subsample_size=len(y) if needed else len(x)):
            pyro.sample("obs", dist.Normal(w * x, 1.0), obs=y if needed else y + 1)

    x, y = torch.linspace(0, 1, 9), torch.linspace(1, 2, 9)
    guide = ps.MeanFieldNormal(model, init_loc_fn=lambda site: torch.tensor(0.7), init_scale=1e-6)
    svi = SVI(model, guide, ps.optim.JointOptim(torch.optim.SGD, {"lr": 0.0}), ps.SAM_ELBO(ps.Mean()))
    history = ps.fit(svi, [(x, y)], 1, progress=False, validation=(x, y))
    expected = -float(dist.Normal(0.7 * x, 1.0).log_prob(y if needed else y + 1).mean())
    assert history["validation"] == pytest.approx([expected], rel=1e-4)
    too_many = (torch.linspace(0, 1, 10),) * 2
    with pytest.raises(ValueError, match="subsample_size"):
        ps.fit(svi, [(x, y)], 1, progress=False, validation=too_many)
