"""fit with replicas: a number for each in the history, each ends at its own best weights, one that is lost is alone."""

import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam, PyroOptim
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_sam as ps

N, R = 12, 3


def batch(rows: int = N) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, rows)[:, None]
    return x, x[:, 0].sin()


def unseen() -> tuple[Tensor, Tensor]:
    x, y = batch(7)
    return x, y / 2


def build(number: int | None = R, lr: Any = (0.005, 0.02, 0.05), law: Any = None) -> SVI:
    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    bnn = ps.BayesianModule(nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = bnn(x).squeeze(-1)
        with pyro.plate("data", N, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)

    optim = ps.optim.JointOptim(torch.optim.Adam, {"lr": lr})
    guide = ps.MeanFieldNormal(model, init_scale=0.05, num_replicas=number)
    return SVI(model, guide, optim, loss=ps.SAM_ELBO(law or ps.AscendedSample([0.0, 0.5, 1.0])))


def fit(svi: SVI, epochs: int, **kwargs: Any) -> dict[str, list[Any]]:
    loader = DataLoader(TensorDataset(*batch()), batch_size=5, shuffle=True)
    return ps.fit(svi, loader, epochs, **{"progress": False, **kwargs})


def weights(svi: SVI) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in svi.guide.named_parameters()}


def noting(seen: list[Any]) -> Any:
    return lambda training: seen.append(weights(training.svi))


def test_the_history_is_that_of_the_loop_of_svi_step() -> None:
    svi, losses = build(), []
    for _ in range(2):
        epoch = []
        for each in DataLoader(TensorDataset(*batch()), batch_size=5, shuffle=True):
            svi.step(*each)
            epoch.append(svi.loss.__self__.replica_losses)  # type: ignore[attr-defined]
        losses.append(torch.stack(epoch).mean(0).tolist())
    straight = weights(svi)
    history = fit(svi := build(), 2)
    assert [pytest.approx(each, rel=1e-12) for each in losses] == history["loss"]
    for name, value in weights(svi).items():
        assert torch.equal(value, straight[name])
    for e in range(2):
        both = zip(history["data"][e], history["kl"][e], strict=True)
        assert [data + kl for data, kl in both] == pytest.approx(history["loss"][e], rel=1e-12)
        assert [len(history[name][e]) for name in ("grad_norm", "data", "kl")] == [R, R, R]


def test_gradient_norms_are_each_replicas_own() -> None:
    svi = build(lr=0.0 + 1e-12, law=ps.Mean())
    history = ps.fit(svi, [batch()], 1, progress=False)
    svi.loss_and_grads(svi.model, svi.guide, *batch())
    grads = [param.grad.reshape(R, -1) for param in svi.guide.parameters()]
    assert history["grad_norm"][0] == pytest.approx(torch.cat(grads, 1).norm(dim=1).tolist(), rel=1e-6)


def test_validation_is_that_of_each_replica_as_a_guide_of_its_own_at_the_same_noise() -> None:
    svi = build()
    found = fit(svi, 1, validation=ps.Validation(unseen(), num_samples=8))["validation"][0]
    x, y = unseen()
    for r in range(R):
        pyro.set_rng_seed(0)
        single = ps.predict(svi.model, svi.guide.replica(r), x, num_samples=8)
        assert found[r] == pytest.approx(-float(single.log_prob(y).mean()), rel=1e-12)
    assert len({round(each, 3) for each in found}) == R


def test_replicas_may_be_validated_together() -> None:
    svi = build()
    found = fit(svi, 1, validation=ps.Validation(unseen(), num_samples=8, samples_at_once=4))["validation"][0]
    x, y = unseen()
    pyro.set_rng_seed(0)
    together = ps.predict(svi.model, svi.guide, x, num_samples=8, samples_at_once=4)
    assert found == pytest.approx([-float(together.replica(r).log_prob(y).mean()) for r in range(R)], rel=1e-12)


def of_four(**kwargs: Any) -> SVI:
    return build(**{"number": 4, "lr": (0.02, 0.005, 0.05, 0.05), "law": ps.Gaussian(), **kwargs})


@pytest.mark.parametrize("at_once", [1, 4])
def test_members_are_validated_as_the_mixture_of_their_predictions(at_once: int) -> None:
    svi, (x, y) = of_four(), unseen()
    validation = ps.Validation((x, y), num_samples=8, samples_at_once=at_once, members=2)
    found = fit(svi, 1, validation=validation)["validation"][0]

    def density(r: int) -> Tensor:
        pyro.set_rng_seed(0)
        if at_once == 1:
            return ps.predict(svi.model, svi.guide, x, num_samples=8, replica=r).log_prob(y).double().exp()
        together = ps.predict(svi.model, svi.guide, x, num_samples=8, samples_at_once=at_once)
        return together.replica(r).log_prob(y).double().exp()

    mixtures = [-float(((density(r) + density(r + 1)) / 2).log().mean()) for r in (0, 2)]
    assert found == pytest.approx([mixtures[0], mixtures[0], mixtures[1], mixtures[1]], rel=1e-6)
    assert mixtures[0] < (-density(0).log().mean() - density(1).log().mean()) / 2  # Jensen
    assert round(mixtures[0], 3) != round(mixtures[1], 3)


def test_members_end_at_the_same_epoch_and_mixtures_each_at_their_own() -> None:
    seen: list[Any] = []
    validation = ps.Validation(unseen(), num_samples=8, members=2)
    history = fit(svi := of_four(), 14, validation=validation, callbacks=[noting(seen)])["validation"]
    best = [min(range(14), key=lambda e, r=r: history[e][r]) for r in range(4)]
    assert best[0] == best[1] != best[2] == best[3]
    for name, value in weights(svi).items():
        for r in range(4):
            assert torch.equal(value[r], seen[best[r]][name][r]), name


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.filterwarnings("ignore:replica 1 ")
def test_a_mixture_with_a_lost_member_has_no_nll_and_the_others_have_theirs() -> None:
    history = fit(of_four(lr=(0.02, 1e200, 0.05, 0.05)), 2, validation=ps.Validation(unseen(), members=2))
    assert [math.isfinite(each) for each in history["validation"][-1]] == [False, False, True, True]


def test_members_need_a_multiple_of_their_number_and_the_same_rows() -> None:
    for number, there in ((3, "num_replicas=3"), (None, "a single one")):
        svi = build(number, lr=0.01, law=ps.Gaussian())
        with pytest.raises(ValueError, match=f"validation mixes members=2 .*a multiple of that, got {there}"):
            fit(svi, 1, validation=ps.Validation(unseen(), members=2))
    own = tuple(ps.per_replica(torch.stack([part] * 4)) for part in unseen())
    with pytest.raises(ValueError, match="cannot mix members that have rows of their own"):
        fit(of_four(), 1, validation=ps.Validation(own, members=2))
    with pytest.raises(ValueError, match="members must be a whole number"):
        ps.Validation(unseen(), members=0)


def test_each_replica_may_be_validated_on_rows_of_its_own() -> None:
    x, y = unseen()
    xs, ys = torch.stack([x, x + 1, x - 1]), torch.stack([y, -y, 2 * y])
    svi = build()
    both = {name: ps.per_replica(rows) for name, rows in (("x", xs), ("y", ys))}
    data = [both, {name: rows.to(torch.float64) for name, rows in both.items()}]
    found = fit(svi, 1, validation=ps.Validation(data, num_samples=8))["validation"][0]
    for r in range(R):
        pyro.set_rng_seed(0)
        single = ps.predict(svi.model, svi.guide.replica(r), xs[r], num_samples=8)
        assert found[r] == pytest.approx(-float(single.log_prob(ys[r]).mean()), rel=1e-12)
    with pytest.raises(ValueError, match=r"rows for 2 replicas .* has 3 replicas"):
        fit(build(), validation=(ps.per_replica(xs[:2]), ps.per_replica(ys[:2])), epochs=1)
    with pytest.raises(ValueError, match=r"predict\(model, guide, x\[r\], replica=r\)"):
        ps.predict(svi.model, svi.guide, ps.per_replica(xs))


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (PyroOptim(torch.optim.Adafactor, {"lr": 0.1}), "Adafactor does not work element by element"),
        (Adam({"lr": 0.1}, {"clip_norm": 1.0}), r"bounds the norm over all replicas.*JointOptim\(..., clip_norm"),
    ],
)
def test_optimisers_of_pyro_that_mix_replicas_are_refused(optim: Any, message: str) -> None:
    svi = build()
    svi.optim = optim
    with pytest.raises(ValueError, match=message):
        fit(svi, 1)
    assert not len(pyro.get_param_store())
    for fine, number in ((Adam({"lr": 0.1}, {"clip_value": 1.0}), R), (optim, None)):
        svi = build(number, lr=0.1, law=ps.Gaussian())
        svi.optim = fine
        fit(svi, 1)


def test_an_optimiser_that_evaluates_the_loss_of_all_replicas_together_is_refused() -> None:
    svi = build()
    svi.optim = ps.optim.JointOptim(torch.optim.LBFGS, {"lr": 0.1})
    with pytest.raises(ValueError, match="LBFGS does not work element by element"):
        fit(svi, 1)
    assert all(param.grad is None for _, param in pyro.get_param_store().named_parameters())


def test_nan_in_rows_of_replicas_own_is_named() -> None:
    x, y = batch()
    xs, ys = torch.stack([x] * R), torch.stack([y] * R)
    xs[:, 5] = math.nan
    with pytest.raises(
        FloatingPointError, match=r"in part 0 of the batch the first tensor, .* NaN or infinity in row 5"
    ):
        ps.fit(build(), [(ps.per_replica(xs), ps.per_replica(ys))], 1, progress=False)


@pytest.mark.parametrize("others", [[], [ps.EarlyStopping(patience=3)]])
def test_a_number_that_all_replicas_share_stops_all(others: list[Any]) -> None:
    svi, seen = build(), list[Any]()
    stops = [ps.EarlyStopping("lr", patience=2), *others]
    history = fit(svi, 9, validation=unseen(), restore_best_weights=False, callbacks=[*stops, noting(seen)])
    assert len(history["loss"]) == 3 if not others else 3 <= len(history["loss"]) <= 9
    assert len(others) or all(torch.equal(value, seen[-1][name]) for name, value in weights(svi).items())


def test_each_replica_ends_at_its_own_best_weights() -> None:
    seen: list[Any] = []
    history = fit(svi := build(), 14, validation=unseen(), callbacks=[noting(seen)])
    best = [min(range(14), key=lambda e, r=r: history["validation"][e][r]) for r in range(R)]
    assert len(set(best)) > 1
    for name, value in weights(svi).items():
        for r in range(R):
            assert torch.equal(value[r], seen[best[r]][name][r]), name
    fit(svi := build(), 14, validation=unseen(), restore_best_weights=False)
    for name, value in weights(svi).items():
        assert torch.equal(value, seen[-1][name])


@pytest.mark.parametrize("best", [True, False])
def test_each_replica_stops_as_it_would_alone(best: bool) -> None:
    stop, seen = ps.EarlyStopping(patience=2), []
    full = fit(build(), 40, validation=unseen(), callbacks=[noting(seen)])["validation"]

    def end(r: int) -> int:
        column = [each[r] for each in full]
        return next(e for e in range(40) if stop.stopped({"validation": column[: e + 1]})[0])

    ends = [end(r) for r in range(R)]
    assert len(set(ends)) > 1
    svi = build()
    history = fit(svi, 40, validation=unseen(), callbacks=[stop], restore_best_weights=best)
    assert len(history["validation"]) == max(ends) + 1
    for r in range(R):
        until = [each[r] for each in full[: ends[r] + 1]]
        epoch = until.index(min(until)) if best else ends[r]
        for name, value in weights(svi).items():
            assert torch.equal(value[r], seen[epoch][name][r]), (name, r)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("at_once", [1, 4])
def test_a_replica_that_is_lost_leaves_the_others_alone(at_once: int) -> None:
    straight = fit(svi := build(), 3, validation=unseen())
    kept = weights(svi)
    svi = build(lr=(0.005, 1e200, 0.05))
    with pytest.warns(UserWarning, match=r"replica 1 .*the others go on"):
        history = fit(svi, 3, validation=ps.Validation(unseen(), samples_at_once=at_once))
    for name in ("loss", "grad_norm", "data", "kl", *(["validation"] if at_once == 1 else [])):
        for e in range(3):
            assert [history[name][e][r] for r in (0, 2)] == pytest.approx(
                [straight[name][e][r] for r in (0, 2)], rel=1e-9
            )
    assert not math.isfinite(history["validation"][-1][1])
    for name, value in weights(svi).items():
        for r in (0, 2):
            torch.testing.assert_close(value[r], kept[name][r], rtol=1e-9, atol=1e-12)
    with pytest.raises((FloatingPointError, ValueError)):
        fit(build(lr=(1e200, 1e200, 1e200)), 3)


def test_a_run_of_replicas_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    options: Any = {"validation": unseen(), "callbacks": [ps.EarlyStopping(patience=3)]}
    history = fit(svi := build(), 12, **options)
    straight = weights(svi)

    class Killed(Exception):
        pass

    def die(training: Any) -> None:
        if training.epoch == 5:
            raise Killed

    keep = ps.Checkpoint(tmp_path / "c", every=2)
    with pytest.raises(Killed):
        fit(build(), 12, checkpoint=keep, validation=unseen(), callbacks=[*options["callbacks"], die])
    resumed = fit(svi := build(), 12, checkpoint=keep, **options)
    resumed.pop("seconds"), history.pop("seconds")
    assert resumed == history
    for name, value in weights(svi).items():
        assert torch.equal(value, straight[name])


def test_the_bar_shows_the_mean_of_the_replicas_that_are_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    history = fit(build(), 1, progress=True)
    assert f"loss={sum(history['loss'][0]) / R:.4g}" in capsys.readouterr().err
