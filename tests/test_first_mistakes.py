"""Common first mistakes, made as a new user makes them: each is answered with what to change, and nothing else is."""

import copy
import math
import re
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.optim import Adam
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_sam as ps
from pyro_sam._base.cures import Data, explained, find_cure

N, B, CLASSES = 60, 10, 3


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, 4)


@pytest.fixture
def y() -> Tensor:
    return torch.randint(CLASSES, (N,))


def scaled(x: Tensor) -> AbstractContextManager[Any]:
    return pyro.plate("data", N, subsample_size=len(x))


def categorical(outputs: Tensor) -> Any:
    return dist.Categorical(logits=outputs)


def normal(outputs: Tensor) -> Any:
    return dist.Normal(outputs, 1.0)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))


def make(net: nn.Module | None = None, likelihood: Any = categorical, plate: Any = scaled) -> Any:
    bnn = ps.BayesianModule(net or classifier())

    def model(x: Tensor, y: Tensor | None = None) -> None:
        outputs = bnn(x)
        with plate(x):
            pyro.sample("obs", likelihood(outputs), obs=y)

    return model


def train(
    model: Any, x: Any, y: Any, steps: int = 2, batch: int = B, guide: Any = None, **settings: Any
) -> list[float]:
    if guide is None:
        pyro.clear_param_store()
        guide = ps.MeanFieldNormal(model, init_scale=0.02)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), ps.SAM_ELBO(**settings))
    rows = [slice(i * batch, (i + 1) * batch) for i in range(steps)]
    return [svi.step(x[now], y[now]) for now in rows]


def test_without_a_mistake_there_is_no_warning(x: Tensor, y: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(map(math.isfinite, train(make(), x, y, steps=6)))
        train(make(), x[:55], y[:55], steps=6)  # a smaller last batch
        train(make(regressor(), normal), x, torch.randn(N), kl_weight=0.3)
        train(make(plate=lambda x: pyro.plate("data", len(x))), x, y, batch=N, steps=1)


def test_missing_plate(x: Tensor, y: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Site 'obs' has a value for each of the 10 rows, outside of a plate: sample"):
        train(make(plate=lambda x: nullcontext()), x, y)


def test_plate_of_the_batchs_own_size(x: Tensor, y: Tensor) -> None:
    model = make(plate=lambda x: pyro.plate("data", len(x)))
    with pytest.warns(
        UserWarning, match=r"plate 'data' around site 'obs' has size 5 now and had 10 .* subsample_size="
    ):
        train(model, x[:55], y[:55], steps=6)


def test_plate_of_the_batchs_own_size_is_right_for_evaluation_and_weights_of_the_kl(x: Tensor, y: Tensor) -> None:
    model = make(plate=lambda x: pyro.plate("data", len(x)))
    guide = ps.MeanFieldNormal(model)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), ps.SAM_ELBO())
    svi.step(x, y)
    svi.evaluate_loss(x[:7], y[:7])
    train(model, x[:55], y[:55], steps=6, kl_weight=1 / 6)


def test_plates_of_local_latents_may_differ_in_size() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + shift, 1.0))

    svi = SVI(model, guide, Adam({"lr": 1e-2}), ps.SAM_ELBO())
    svi.step(torch.randn(10))
    svi.step(torch.randn(7))


@pytest.mark.parametrize("plate", [lambda x: pyro.plate("data", N), lambda x: pyro.plate("data", N, subsample_size=7)])
def test_forgotten_or_fixed_subsample_size(x: Tensor, y: Tensor, plate: Any) -> None:
    with pytest.raises(ValueError, match=r"has 10 along that dimension: give the plate the size of the whole data set"):
        train(make(plate=plate), x, y)


def test_missing_to_event_in_the_likelihood(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"declare the dimension of size 2 as part of one data point: .*to_event\(1\)"):
        train(make(nn.Linear(4, 2), normal), x, torch.randn(N, 2))


def test_missing_to_event_in_a_prior(x: Tensor) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0))
        with scaled(x):
            pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"Dimensions of site 'w' are in no plate.*declare them: .*to_event\(1\)"):
        train(model, x, torch.randn(N))


def test_to_event_over_the_data(x: Tensor) -> None:
    model = make(regressor(), lambda outputs: dist.Normal(outputs, 1.0).to_event(1))
    with pytest.warns(UserWarning, match=r"each of the 10 elements of plate 'data', so they count 10 times. Leave out"):
        train(model, x, torch.randn(N), steps=1)


@pytest.mark.parametrize("labels", [(10,), (10, 1)])
def test_output_and_labels_broadcast_against_each_other(x: Tensor, labels: tuple[int, ...]) -> None:
    net, y = (nn.Linear(4, 1), torch.randn(N)) if labels == (10,) else (regressor(), torch.randn(N, 1))
    with pytest.raises(ValueError, match=r"were broadcast against each other: .* bnn\(x\).squeeze\(-1\) or y.squeeze"):
        train(make(net, normal), x, y)


@pytest.mark.parametrize("row", [3, B + 3])
def test_label_out_of_range_in_the_first_or_a_later_batch(x: Tensor, y: Tensor, row: int) -> None:
    y[row] = CLASSES
    with pytest.raises(
        ValueError, match=r"whole numbers from 0 to 2, because the network has 3 outputs.* from \d to 3"
    ):
        train(make(), x, y)


def test_labels_of_the_wrong_kind(x: Tensor, y: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Labels .* not one-hot rows: give y.argmax\(-1\)"):
        train(make(), x, nn.functional.one_hot(y, CLASSES))
    with pytest.raises(ValueError, match=r"Labels or observations must be 0 or 1. Given: .* values from -1 to 1"):
        train(make(regressor(), lambda f: dist.Bernoulli(logits=f)), x, 2.0 * (y % 2) - 1)
    with pytest.raises(ValueError, match=r"observations .* to floating point, y.float\(\). Given: .* dtype int64"):
        train(make(regressor(), lambda f: dist.Bernoulli(logits=f)), x, y % 2)
    with pytest.raises(ValueError, match=r"observations of a Gamma must be in GreaterThanEq\(lower_bound=0"):
        train(make(regressor(), lambda f: dist.Gamma(f.exp(), 1.0)), x, -torch.ones(N))
    with pytest.raises(ValueError, match=r"take tensors, not NumPy arrays: give torch.as_tensor"):
        train(make(), x, y.numpy())


def test_inputs_of_the_wrong_kind(x: Tensor, y: Tensor) -> None:
    with pytest.raises(ValueError, match=r"convert the inputs to the network's, .* dtype float32"):
        train(make(), x.float(), y)
    with pytest.raises(ValueError, match=r"convert the inputs to the network's, .* dtype int64"):
        train(make(), x.long(), y)
    with pytest.raises(ValueError, match=r"take tensors, not NumPy arrays"):
        train(make(), x.numpy(), y)


@pytest.mark.parametrize(("number", "what"), [(6, "number of batches"), (B, "batch size"), (N, "size of the data set")])
def test_kl_weight_of_one_over_something_beside_a_scaled_plate(x: Tensor, y: Tensor, number: int, what: str) -> None:
    with pytest.warns(UserWarning, match=rf"is 1 / the {what}, but the plate 'data' already scales the likelihood"):
        train(make(), x, y, steps=1, kl_weight=1 / number)


def test_kl_weight_of_one_over_the_length_of_a_loader(x: Tensor, y: Tensor) -> None:
    model = make(plate=lambda x: pyro.plate("data", 55, subsample_size=len(x)))
    with pytest.warns(UserWarning, match=r"is 1 / the number of batches, rounded up, but the plate"):
        train(model, x, y, steps=1, kl_weight=1 / 6)


def wide(law: ps.Perturbation, init_scale: float, **settings: Any) -> None:
    pyro.clear_param_store()
    net = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, CLASSES))  # 323 weights
    model = make(net)
    guide = ps.MeanFieldNormal(model, init_scale=init_scale)
    train(model, torch.randn(N, 4), torch.zeros(N), steps=1, guide=guide, perturbation=law, **settings)


@pytest.mark.parametrize("law", [ps.MixSAM(), ps.Adversarial(None), ps.Mixture([ps.Mean(), ps.MixSAM()], [0.5, 0.5])])
def test_rho_none_with_a_wide_guide(law: ps.Perturbation) -> None:
    with pytest.warns(
        UserWarning, match=r"\(rho=None.*\) moves the 323 latent scalars by 1.8 .* init_scale=0.0056 and"
    ):
        wide(law, 0.1)


def test_rho_none_is_right_for_narrow_guides_and_few_latents_and_many_particles() -> None:
    wide(ps.MixSAM(), 0.0056)
    wide(ps.MixSAM(1.0), 0.1)
    wide(ps.MixSAM(), 0.04, num_particles=5, vectorize_particles=True)

    def small(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with scaled(x):
            pyro.sample("obs", dist.Normal((w * x).sum(-1), 1.0), obs=y)

    guide = ps.MeanFieldNormal(small, init_scale=1.0)
    particles: dict[str, Any] = {"num_particles": 50, "vectorize_particles": True}
    train(small, torch.randn(N, 4), torch.randn(N), guide=guide, perturbation=ps.MixSAM(), **particles)


@pytest.mark.parametrize("prior", [dist.Normal(torch.zeros(3), 1.0), lambda name, p: dist.Normal(torch.zeros(3), 1.0)])
def test_prior_of_the_wrong_shape(x: Tensor, prior: Any) -> None:
    with pytest.raises(ValueError, match=r"prior of 'weight' must be scalar or of the parameter's shape \(2, 4\), got"):
        ps.BayesianModule(nn.Linear(4, 2), prior=prior)(x)


def test_data_network_and_guide_on_different_devices(x: Tensor, y: Tensor) -> None:
    message = r"on different devices. Move the network first, net.to\(device\).*device meta"
    with pytest.raises(ValueError, match=message):
        train(make(), x.to("meta"), y)
    net = classifier()
    model = make(net)
    guide = ps.MeanFieldNormal(model).initialize(x, y)
    net.to("meta")
    with pytest.raises(ValueError, match=message):
        train(model, x.to("meta"), y, guide=guide)


@pytest.mark.parametrize("row", [3, B + 3])
def test_nan_in_the_inputs_of_the_first_or_a_later_batch(x: Tensor, y: Tensor, row: int) -> None:
    x[row, 1] = math.nan
    with pytest.raises(ValueError, match=r"the first tensor, shape \(10, 4\), has NaN or infinity in row 3: clean"):
        train(make(), x, y)


@pytest.mark.parametrize("row", [3, B + 3])
def test_nan_in_the_observations(x: Tensor, row: int) -> None:
    y = torch.randn(N)
    y[row : row + 2] = math.inf
    with pytest.raises(ValueError, match=r"the second tensor, .* has NaN or infinity in row 3 and 1 more"):
        train(make(regressor(), normal), x, y)


def test_parameters_that_an_earlier_step_made_nan(x: Tensor, y: Tensor) -> None:
    model = make()
    guide = ps.MeanFieldNormal(model).initialize(x, y)
    next(guide.parameters()).data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"The batch is finite, so the parameters are not: an earlier step diverged"):
        train(model, x, y, guide=guide)


def test_outputs_given_as_probabilities(x: Tensor, y: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Outputs of a network are no probabilities: .* dist.Categorical\(logits="):
        train(make(likelihood=lambda outputs: dist.Categorical(probs=outputs)), x, y)


def test_guide_started_without_observations(x: Tensor, y: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Site 'obs' was not observed when the guide was started.* guide\(x, y\)"):
        ps.MeanFieldNormal(make())(x[:B])
    pyro.clear_param_store()
    model = make(regressor(), normal)
    guide = ps.MeanFieldNormal(model).initialize(x[:B])
    with pytest.raises(ValueError, match=r"guide samples site 'obs', which the model observes.* make a new one, and"):
        train(model, x, y.double(), guide=guide)


def test_forgotten_obs(x: Tensor, y: Tensor) -> None:
    def forgetful(net: nn.Module, likelihood: Any) -> Any:
        model = make(net, likelihood)
        return lambda x, y: model(x)

    with pytest.raises(
        ValueError, match=r"Site 'obs' was not observed when the guide was started.* obs=y in the model"
    ):
        train(forgetful(classifier(), categorical), x, y)
    with pytest.warns(
        UserWarning, match=r"The model observes nothing, so only the KL is learnt, though it subsamples data around obs"
    ):
        train(forgetful(regressor(), normal), x, y, steps=1)


def test_module_called_inside_the_plate(x: Tensor, y: Tensor) -> None:
    bnn = ps.BayesianModule(classifier())

    def model(x: Tensor, y: Tensor) -> None:
        with scaled(x):
            pyro.sample("obs", categorical(bnn(x)), obs=y)

    with pytest.raises(ValueError, match=r"BayesianModule was called inside the plate 'data'"):
        train(model, x, y)


def test_empty_batch(x: Tensor, y: Tensor) -> None:
    with pytest.raises(ValueError, match=r"The batch is empty: its first tensor has no rows. Look at what the loader"):
        train(make(), x[:0], y[:0])


def test_optimiser_that_is_no_pyro_optim(x: Tensor, y: Tensor) -> None:
    model = make()
    guide = ps.MeanFieldNormal(model).initialize(x, y)
    with pytest.raises(ValueError, match=r"Optimizer should be an instance of pyro.optim.PyroOptim"):
        SVI(model, guide, torch.optim.Adam(guide.parameters()), ps.SAM_ELBO())  # type: ignore[arg-type]


def test_predictions_for_another_number_of_rows(x: Tensor, y: Tensor) -> None:
    for plate, message in (
        (lambda x: pyro.plate("data", N), r"Plate 'data' takes 60 rows at a time, but site 'obs' has 90 along that"),
        (scaled, r"A plate was given more rows than its size.* N if y is not None else len\(x\)"),
    ):
        pyro.clear_param_store()
        model = make(plate=plate)
        guide = ps.MeanFieldNormal(model).initialize(x, y)
        with pytest.raises(ValueError, match=message):
            ps.predict(model, guide, torch.randn(90, 4))


def test_model_without_latents(x: Tensor, y: Tensor) -> None:
    net = classifier()

    def model(x: Tensor, y: Tensor) -> None:
        with scaled(x):
            pyro.sample("obs", categorical(net(x)), obs=y)

    with pytest.raises(ValueError, match=r"The model has no latent site to infer: .* pyro_sam.BayesianModule\(net\)"):
        train(model, x, y, guide=AutoDiagonalNormal(model))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ps.MeanFieldNormal(3), r"model must be a callable, such as a Pyro model, got 3"),
        (lambda: ps.MeanFieldNormal(make(), init_loc_fn=0.0), r"init_loc_fn must be a callable, such as pyro.infer"),
        (
            lambda: ps.MeanFieldNormal(make(), create_plates=[3]),
            r"create_plates must be a callable, such as a function",
        ),
        (
            lambda: ps.MeanFieldNormal(make(), learn_scale="no"),
            r"learn_scale must be True or False, got learn_scale='no'",
        ),
        (lambda: ps.MeanFieldNormal(make(), init_scale=float), r"init_scale must be a positive finite number"),
        (lambda: ps.BayesianModule(classifier(), hide=3), r"hide must be names .* or a predicate on names, got 3"),
        (lambda: ps.BayesianModule(classifier(), hide=str), r"hide must be names .* got <class 'str'>"),
        (lambda: ps.Mixture(ps.Mean(), [1.0]), r"perturbations must be a sequence, got perturbations=Mean\(\)"),
        (lambda: ps.Mixture([ps.Mean()], 1.0), r"probs must be a sequence, got probs=1.0"),
        (lambda: ps.Adversarial(ord="inf"), r"ord must be 2 or inf, got ord='inf'"),
        (lambda: ps.Adversarial(geometry=torch.zeros(2)), r"geometry must be one of posterior, .* got geometry=tensor"),
        (lambda: ps.SAM_ELBO(vectorize_particles=2), r"vectorize_particles must be True or False, got vectorize_par"),
        (lambda: ps.SAM_ELBO(scope=["site"]), r"scope must be one of global, site, event, got scope=\['site'\]"),
        (lambda: ps.SAM_ELBO(hide=torch.tensor(1.0)), r"hide must be a collection of site names or a predicate"),
        (lambda: ps.predict(make(), print, progress=1), r"progress must be True or False, got progress=1"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_errors_and_silent_validation_are_left_alone(x: Tensor, y: Tensor) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        train(make(), torch.randn(N, 5), y)
    with pyro.validation_enabled(False):
        train(make(plate=lambda x: pyro.plate("data", len(x))), x[:55], y[:55], steps=6)


def test_an_explained_error_is_explained_once_and_keeps_its_cause() -> None:
    @explained
    @explained
    def run(x: Tensor) -> None:
        raise RuntimeError("mat1 and mat2 must have the same dtype, but got Double and Float")

    with pytest.raises(ValueError, match="must have the same dtype") as caught:
        run(torch.zeros(3))
    assert str(caught.value).count("convert the inputs") == 1
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_arguments_are_described_wherever_they_stand() -> None:
    data = Data([{"x": torch.zeros(2, 3)}, (np.zeros(2), torch.tensor([1, 2]))])
    assert str(data) == (
        "the first tensor has shape (2, 3), dtype float64, device cpu, values from 0 to 0; "
        "the second tensor has shape (2,), dtype int64, device cpu, values from 1 to 2"
    )
    assert data.has_numpy
    assert data.not_finite() is None
    assert find_cure("a text that nobody knows", copy.copy(data)) is None


# Said since the diagnosis


@pytest.mark.parametrize("plate", [scaled, lambda x: pyro.plate("data", len(x))])
def test_real_valued_observations_that_were_not_passed(x: Tensor, plate: Any) -> None:
    model = make(regressor(), normal, plate)
    svi = SVI(model, ps.MeanFieldNormal(model), Adam({"lr": 1e-2}), ps.SAM_ELBO())
    with pytest.warns(UserWarning, match=r"so only the KL is learnt, and obs taken for a latent. Pass"):
        svi.step(x)


def test_a_model_without_observed_site(x: Tensor) -> None:
    def model(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    svi = SVI(model, ps.MeanFieldNormal(model), Adam({"lr": 1e-2}), ps.SAM_ELBO())
    with pytest.warns(UserWarning, match=r"The model observes nothing, so only the KL is learnt. Pass"):
        svi.step(x)


@pytest.mark.parametrize("law", [ps.Gaussian(), ps.Adversarial()])
def test_a_plain_module_in_the_place_of_a_bayesian_one(x: Tensor, y: Tensor, law: ps.Perturbation) -> None:
    net = classifier()

    def model(x: Tensor, y: Tensor) -> None:
        outputs = net(x)
        with scaled(x):
            pyro.sample("obs", categorical(outputs), obs=y)

    with pytest.raises(ValueError, match=r"pyro_sam.BayesianModule\(net\), where it calls a plain nn.Module now"):
        train(model, x, y, perturbation=law)


def test_fit_names_the_row_that_is_not_finite_and_no_learning_rate(x: Tensor, y: Tensor) -> None:
    x[13, 1] = math.nan
    model = make()
    svi = SVI(model, ps.MeanFieldNormal(model), Adam({"lr": 1e-2}), ps.SAM_ELBO())
    with pytest.raises(FloatingPointError, match=r"NaN or infinity in row 13, in epoch 1.* Clean the data") as caught:
        ps.fit(svi, [(x, y)], 1, progress=False)
    assert "learning rate" not in str(caught.value)


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (ps.Adversarial(1e6), r"moves the 323 latent scalars by 1e\+05 .* Take rho=1, which"),
        (ps.Adversarial(math.sqrt(323)), r"moves the 323 latent scalars by 1.8 .* Take rho=1, which"),
        (ps.AscendedSample(1e3), r"by 100 .* Take alpha=1, which"),
        (ps.Adversarial(1e3, geometry="euclidean"), r"by 1e\+03 .* Take rho=0.1, which"),
        (ps.Adversarial(1.0, ord=math.inf), r"by 1.8 .* Take rho=1, which"),
        (ps.Adversarial(0.05), r"by 0.005 in their own units, next to nothing: .* rho=0.5 at .* geometry='euclidean'"),
        (ps.MixSAM(), r"or take rho=1, which moves them by 0.1"),
    ],
)
def test_a_radius_that_suits_no_network(law: ps.Perturbation, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        wide(law, 0.1)


@pytest.mark.parametrize(
    ("law", "init_scale"),
    [
        (ps.Adversarial(), 0.005),  # the default
        (ps.Adversarial(0.05), 1.0),  # SAM's own radius, at scale 1
        (ps.Adversarial(1e3), 1e-4),  # SAM's own radius, at a small scale
        (ps.Adversarial(10.0), 0.02),
        (ps.Adversarial(0.05, geometry="euclidean"), 0.1),
        (ps.Adversarial(2.0, geometry="adaptive"), 0.1),
        (ps.Adversarial(0.0), 0.1),
    ],
)
def test_radii_that_mean_something(law: ps.Perturbation, init_scale: float) -> None:
    wide(law, init_scale)


def test_pyros_autoguides_that_start_away_from_trained_weights(x: Tensor, y: Tensor) -> None:
    net = classifier()
    bnn = ps.BayesianModule(net)

    def model(x: Tensor, y: Tensor) -> None:
        outputs = bnn(x)
        with scaled(x):
            pyro.sample("obs", categorical(outputs), obs=y)

    train(model, x, y, guide=AutoNormal(model))  # fresh weights
    with torch.no_grad():
        net[0].weight.mul_(3)  # type: ignore[operator]
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match=r"AutoNormal starts away from .* at 0.weight, .*init_to_module\(bnn\)"):
        train(model, x, y, guide=AutoNormal(model))
    pyro.clear_param_store()
    train(model, x, y, guide=AutoNormal(model, init_loc_fn=ps.nn.init_to_module(bnn)))


def test_a_state_is_not_loaded_into_a_guide_without_parameters(x: Tensor, y: Tensor) -> None:
    model = make()
    state = ps.MeanFieldNormal(model).initialize(x, y).state_dict()
    fresh = ps.MeanFieldNormal(model)
    with pytest.raises(RuntimeError, match=r"no parameters yet to load .*; call guide.initialize\(x, y\) first"):
        fresh.load_state_dict(state)
    fresh.initialize(x, y).load_state_dict(state)


def test_autoguides_that_pyros_svi_fails_on_under_module_local_params(x: Tensor, y: Tensor) -> None:
    model = make()
    with (
        pyro.settings.context(module_local_params=True),
        pytest.raises(ValueError, match=r"AutoDiagonalNormal cannot be trained by Pyro's SVI under module"),
    ):
        train(model, x, y, guide=AutoDiagonalNormal(model))


def test_a_cell_that_is_run_twice_says_that_it_goes_on(x: Tensor, y: Tensor) -> None:
    train(make(), x, y, guide=ps.MeanFieldNormal(make()))
    model = make()
    with pytest.warns(UserWarning, match=r"the guide is new and took over 8 parameters .* pyro.clear_param_store\(\)"):
        train(model, x, y, guide=ps.MeanFieldNormal(model))


def test_parameters_loaded_from_a_file_are_taken_over_in_silence(x: Tensor, y: Tensor) -> None:
    model = make()
    train(model, x, y)
    state = copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    train(model, x, y, guide=ps.MeanFieldNormal(model))


def test_the_history_of_a_fit_holds_the_weighted_kl(x: Tensor, y: Tensor) -> None:
    model = make()
    svi = SVI(model, ps.MeanFieldNormal(model), Adam({"lr": 1e-2}), ps.SAM_ELBO(kl_weight=0.3))
    history = ps.fit(svi, [(x, y)], 1, progress=False)
    assert history["data"][0] + history["kl"][0] == pytest.approx(history["loss"][0])


def test_a_guide_has_what_was_loaded_before_its_first_call(x: Tensor, y: Tensor, tmp_path: Path) -> None:
    model = make()
    guide = ps.MeanFieldNormal(model)
    train(model, x, y, guide=guide)
    pyro.get_param_store().save(str(tmp_path / "posterior.pt"))
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "posterior.pt"))
    loaded = ps.MeanFieldNormal(model).initialize(x, y)
    for ours, theirs in ((loaded.median(), guide.median()), (loaded.state_dict(), guide.state_dict())):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_cell_with_initialize_that_is_run_twice_says_that_it_goes_on(x: Tensor, y: Tensor) -> None:
    model = make()
    first = ps.MeanFieldNormal(model)
    train(model, x, y, guide=first)
    with pytest.warns(UserWarning, match=r"the guide is new and took over 8 parameters .* pyro.clear_param_store\(\)"):
        second = ps.MeanFieldNormal(model).initialize(x, y)
    assert torch.equal(second.median()["0.bias"], first.median()["0.bias"])
    with pyro.settings.context(module_local_params=True):
        ps.MeanFieldNormal(make()).initialize(x, y)


def test_guide_before_model_or_svi_in_their_place(x: Tensor, y: Tensor) -> None:
    model = make()
    guide = ps.MeanFieldNormal(model)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), ps.SAM_ELBO())
    svi.step(x, y)
    with pytest.raises(ValueError, match=r"model must come first and its guide second, got the guide first"):
        ps.predict(guide, model, x)
    with pytest.raises(ValueError, match=r"got an SVI: give svi.model, and svi.guide after it"):
        ps.predict(svi, x)
    with pytest.raises(ValueError, match=r"got an SVI: give svi.model"):
        ps.flatness.sharpness(svi, x, y)


def test_predictions_for_a_loader(x: Tensor, y: Tensor) -> None:
    model = make()
    guide = ps.MeanFieldNormal(model).initialize(x, y)
    with pytest.raises(ValueError, match=r"got a DataLoader: give all rows, with batch_size="):
        ps.predict(model, guide, DataLoader(TensorDataset(x, y)))


def test_fit_on_a_pair_that_is_no_loader(x: Tensor, y: Tensor) -> None:
    model = make()
    svi = SVI(model, ps.MeanFieldNormal(model), Adam({"lr": 1e-2}), ps.SAM_ELBO())
    with pytest.raises(ValueError, match=r"give it in a list, \[\(x, y\)\]"):
        ps.fit(svi, (x, y), 1, progress=False)
    assert not len(pyro.get_param_store())
    ps.fit(svi, [(x, y)], 1, progress=False)


def test_a_tuple_of_equal_batches_is_a_loader(x: Tensor) -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with scaled(x):
            pyro.sample("obs", dist.Normal(w, 1.0), obs=x[:, 0])

    svi = SVI(model, ps.MeanFieldNormal(model), Adam({"lr": 1e-2}), ps.SAM_ELBO())
    assert len(ps.fit(svi, x.split(B), 2, progress=False)["loss"]) == 2


def test_a_callback_that_is_a_class(x: Tensor, y: Tensor) -> None:
    model = make()
    svi = SVI(model, ps.MeanFieldNormal(model), Adam({"lr": 1e-2}), ps.SAM_ELBO())
    with pytest.raises(ValueError, match=r"got the class EarlyStopping: give EarlyStopping\(...\)"):
        ps.fit(svi, [(x, y)], 1, progress=False, callbacks=[ps.EarlyStopping])


def test_frozen_layers_that_become_latents() -> None:
    net = classifier()
    net[0].requires_grad_(False)  # type: ignore[index]
    with pytest.warns(
        UserWarning, match=r"2 parameters of net that do not require grad, .* hide=\['0.bias', '0.weight'\]"
    ):
        ps.BayesianModule(net)
    ps.BayesianModule(net, hide="0")
    ps.BayesianModule(net.requires_grad_(False))  # all of them: a trained network that only starts the guide


@pytest.mark.watched
def test_a_training_that_diverges_is_told_to_lower_the_learning_rate(x: Tensor, y: Tensor) -> None:
    torch.set_default_dtype(torch.float32)
    model, x = make(), x.float()
    guide = ps.MeanFieldNormal(model)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), ps.SAM_ELBO())
    for _ in range(2):  # the third step is the one that is looked at
        svi.step(x, y)
    for scale in guide.scales.parameters():
        scale.data.fill_(-60.0)  # softplus(-60) = 1e-26, whose square is 0 and makes torch's KL infinite
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        svi.step(x, y)
    text = " ".join(str(warning.message) for warning in told)
    assert "inf the ordinary way" in text
    assert "diverges, with scales or weights too small or large for their precision: lower the learning rate" in text
    assert "reads something that changes" not in text


# Messages of others, which the page on troubleshooting tells again


def two_networks() -> None:
    ps.BayesianModule(classifier())(torch.zeros(2, 4))
    ps.BayesianModule(classifier())(torch.zeros(2, 4))


def step_of(model: Any, loss: Any = None) -> Any:
    svi = SVI(model, ps.MeanFieldNormal(model), Adam({"lr": 1e-2}), loss or ps.SAM_ELBO())
    return lambda: svi.step(torch.randn(N, 4), torch.randint(CLASSES, (N,)))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: ps.SAM_ELBO(rho=0.05), "unexpected keyword argument 'rho'"),  # type: ignore[call-arg]
        (lambda: Adam(lr=1e-3), "unexpected keyword argument 'lr'"),
        (lambda: ps.optim.JointOptim(torch.optim.Adam, lr=1e-3), "unexpected keyword argument 'lr'"),  # type: ignore[call-arg]
        (step_of(make(), ps.SAM_ELBO), "SAM_ELBO.__init__() takes from 1 to 2 positional arguments"),
        (
            step_of(ps.BayesianModule(classifier())),
            "forward() takes 2 positional arguments but 3 were given",
        ),
        (lambda: ps.BayesianModule(classifier()).fit(), "object has no attribute 'fit'"),
        (
            lambda: torch.optim.Adam(ps.SAM_ELBO()(m := make(), ps.MeanFieldNormal(m)).parameters()),
            "optimizer got an empty parameter list",
        ),
        (
            lambda: pyro.poutine.trace(two_networks).get_trace(),
            "Multiple sample sites named '0.weight'",
        ),
        (lambda: dist.Normal(0.0, torch.tensor(-1.0)), "satisfy the constraint GreaterThan(lower_bound=0.0)"),
        (lambda: nn.BatchNorm1d(4)(torch.zeros(1, 4)), "Expected more than 1 value per channel when training"),
        (lambda: ps.fit(None, [], epochs=3), "unexpected keyword argument 'epochs'"),  # type: ignore[arg-type, call-arg]
        (lambda: ps.fit(make(), print, [], 3), "fit() takes 3 positional arguments"),  # type: ignore[arg-type, misc]
        (lambda: setattr(ps.SAM_ELBO(ps.Adversarial()).perturbation, "rho", 2.0), "cannot assign to field 'rho'"),
        (
            lambda: ps.optim.JointOptim(torch.optim.Adam([torch.zeros(1)])),  # type: ignore[call-arg]
            "missing 1 required positional argument: 'optim_args'",
        ),
        (lambda: step_of(make())().backward(), "'float' object has no attribute 'backward'"),
        (
            lambda: ps.SAM_ELBO()(m := make(), ps.MeanFieldNormal(m), torch.zeros(1)),
            "ELBO.__call__() takes 3 positional arguments",
        ),
        (
            lambda: SVI(m := make(), ps.MeanFieldNormal(m), Adam({"lr": 1e-2}), ps.SAM_ELBO()).step(
                torch.zeros(N, 2, 2), torch.zeros(N)
            ),
            "mat1 and mat2 shapes cannot be multiplied",
        ),
        (
            lambda: SVI(make(), print, torch.optim.Adam([torch.zeros(1)]), ps.SAM_ELBO()),
            "Optimizer should be an instance of pyro.optim.PyroOptim class",
        ),
        (
            lambda: SVI(m := make(), ps.MeanFieldNormal(m), Adam({"lr": 1e-2}), ps.SAM_ELBO()).step(
                torch.zeros(N, 4), torch.full((N,), 0.5)
            ),
            "Error while computing log_prob at site 'obs'",
        ),
    ],
)
def test_messages_of_others_stand_in_the_page_on_troubleshooting(call: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError, RuntimeError), match=re.escape(text)):
        call()
    assert f"`{text}`" in (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text()


# Messages with the value and the cure


def network_with(prior: Any) -> tuple[Any, Any]:
    bnn = ps.BayesianModule(torch.nn.Linear(3, 2), prior=prior)

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    return model, ps.MeanFieldNormal(model)


def test_an_svi_in_the_place_of_what_builds_one_is_named() -> None:
    model, guide = network_with(dist.Normal(0.0, 1.0))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), ps.SAM_ELBO())
    for build, got in ((svi, "got an SVI"), (3, "got 3")):
        with pytest.raises(ValueError, match=f"build must be .*{got}"):
            ps.tune(build, ps.default_space(), [], (torch.ones(1),), num_trials=1, num_epochs=1)


def test_fan_in_normal_without_a_call_is_named() -> None:
    with pytest.raises(ValueError, match=r"prior must be what fan_in_normal returns, such as fan_in_normal\(1.0\)"):
        ps.BayesianModule(torch.nn.Linear(3, 2), prior=ps.nn.fan_in_normal)


def test_a_prior_that_the_networks_own_weights_lie_outside_of_is_named() -> None:
    model, guide = network_with(dist.HalfNormal(1.0))
    with pytest.raises(ValueError, match=r"The prior of 'weight' has support .*GreaterThan.*lies outside of it"):
        ps.SAM_ELBO().loss_and_grads(model, guide, torch.ones(4, 3), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("what", ["mean", "variance"])
def test_classes_have_no_mean(what: str) -> None:
    model, guide = network_with(dist.Normal(0.0, 1.0))
    guide.initialize(torch.ones(4, 3), torch.zeros(4, dtype=torch.long))
    prediction = ps.predict(model, guide, torch.ones(4, 3))
    with pytest.raises(ValueError, match=f"a Categorical likelihood has no {what}; use probs"):
        getattr(prediction, what)


@pytest.mark.parametrize("name", ["rho", "kappa", "alpha", "steps", "geometry", "eta"])
def test_a_number_of_the_law_is_no_setting_of_the_elbo(name: str) -> None:
    elbo = ps.SAM_ELBO(ps.Adversarial(1.0))
    with pytest.raises(
        AttributeError, match=rf"{name} is a number of the law.*assign.*elbo.perturbation = \w+\({name}=2"
    ):
        setattr(elbo, name, 2)
    assert not hasattr(elbo, name)
    elbo.my_own = 3  # what is nothing of ours may be kept there
    assert elbo.my_own == 3


def test_a_tensor_in_the_place_of_a_callable_is_shown_by_its_shape() -> None:
    with pytest.raises(ValueError, match=r"model must be a callable.*got a tensor of shape \(100, 30\)"):
        ps.MeanFieldNormal(torch.zeros(100, 30))


@pytest.mark.parametrize("settings", [{}, {"fast": False}, {"perturbation": ps.Gaussian()}], ids=str)
@pytest.mark.parametrize("named", [False, True])
def test_a_model_that_writes_into_its_arguments_is_told_once(
    settings: Any, named: bool, x: Tensor, y: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    bnn = ps.BayesianModule(classifier())

    def writes(x: Tensor, y: Tensor) -> None:
        x.clamp_(-1, 1)
        copies(x, y)

    def copies(x: Tensor, y: Tensor) -> None:
        logits = bnn(x.clone().clamp_(-1, 1))
        with scaled(x):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    for model, number in ((writes, 1), (copies, 0)):
        recwarn.clear()
        guide = ps.MeanFieldNormal(model, init_scale=0.02)
        guide.initialize(x, y)
        svi = SVI(model, guide, ps.optim.JointOptim(torch.optim.Adam, {"lr": 0.01}), ps.SAM_ELBO(**settings))
        for _ in range(4):
            svi.step(x.clone(), y=y) if named else svi.step(x.clone(), y)
        told = [str(each.message) for each in recwarn if "writes into one of its arguments" in str(each.message)]
        assert len(told) == number
        pyro.clear_param_store()
