"""The study's networks, data sets and measures, each beside an oracle of its own."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.ndimage
import sklearn.datasets
import sklearn.metrics
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_sam as ps
from pyro_sam.study import cli, sources
from pyro_sam.study.survey import flat, networks, rows, sizes, training
from pyro_sam.study.survey.measuring import Trained, selective_accuracy
from pyro_sam.study.survey.methods import METHODS
from pyro_sam.study.survey.networks import plain_network
from pyro_sam.study.survey.problems import SOURCES, Draws, Problem, Source
from pyro_sam.study.survey.shift import noisy, permuted, rotated, under_shift
from pyro_sam.study.survey.tables import shift
from pyro_sam.study.survey.training import Task, apart, network, train
from pyro_sam.study.tables import DataError

NETWORKS = {
    "mlp": Source("a", "digits", network="mlp", hidden=(5,)),
    "lenet": Source("b", "mnist", network="lenet"),
    "resnet20": Source("c", "cifar10", network="resnet20"),
    "resnet18": Source("e", "cifar10", network="resnet18"),
    "transformer": Source("d", "digits", network="transformer"),
}


def random_problem(source: Source, number: int = 6, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, math.prod(source.image or ()), generator=generator)
    y = torch.randint(10, (number,), generator=generator)
    return Problem(x, y, x, y, 0.0)


# Networks


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("mlp", 64 * 5 + 5 + 5 * 10 + 10),
        ("lenet", 61_706),  # LeCun et al. 1998 with full connections and ten outputs
        # 19 convolutions without biases, their GroupNorms, the last layer: He et al. 2016 have 0.27 million
        ("resnet20", 432 + 6 * 2304 + 4608 + 5 * 9216 + 18_432 + 5 * 36_864 + 2 * (7 * 16 + 6 * 32 + 6 * 64) + 650),
        # 17 convolutions, their GroupNorms, the last layer: He et al. 2016 have 11 million
        (
            "resnet18",
            *(
                1728
                + 4 * 36_864
                + 73_728
                + 3 * 147_456
                + 294_912
                + 3 * 589_824
                + 1_179_648
                + 3 * 2_359_296
                + 2 * (5 * 64 + 4 * (128 + 256 + 512))
                + 5130,
            ),
        ),
        # tokens, places, per layer attention, ReLU network and two LayerNorms, the last LayerNorm, the last layer
        ("transformer", 288 + 256 + 2 * (4 * 32 * 33 + 64 * 33 + 32 * 65 + 128) + 64 + 330),
    ],
)
def test_a_network_has_the_weights_that_it_should(name: str, number: int) -> None:
    problem = random_problem(NETWORKS[name])
    net = plain_network(NETWORKS[name], problem)
    assert net(problem.x).shape == (6, 10)
    assert sum(parameter.numel() for parameter in net.parameters()) == number


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_of_replicas_is_the_step_of_each_network_alone(name: str) -> None:
    source, problems = NETWORKS[name], [random_problem(NETWORKS[name], seed=k) for k in range(2)]
    net, lr, weights = plain_network(source, problems[0]), 1e-4, [1.0, 0.1]
    kl_weight: Any = weights
    bnn = ps.BayesianModule(net, prior=dist.Normal(0.0, 0.5))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = bnn(x)
        with pyro.plate("data", 60, subsample_size=len(x)):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    with apart(0):
        guide = ps.MeanFieldNormal(model, num_replicas=2, learn_scale=False, init_loc_fn=ps.nn.init_to_module(bnn))
        optim = ps.optim.JointOptim(torch.optim.SGD, {"lr": lr})
        svi = SVI(model, guide, optim, ps.SAM_ELBO(ps.Mean(), kl_weight=kl_weight))
        svi.step(*(ps.per_replica(torch.stack([getattr(each, part) for each in problems])) for part in ("x", "y")))
    for r, problem in enumerate(problems):
        loss = 10 * nn.functional.cross_entropy(net(problem.x), problem.y, reduction="sum")
        loss = loss + kl_weight[r] * sum(each.square().sum() for each in net.parameters()) / (2 * 0.5**2)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        found = guide.replica(r).median()
        for (key, before), grad in zip(net.named_parameters(), grads, strict=True):
            moved = (found[key] - before.detach()) / lr
            assert grad.abs().max() > 0
            torch.testing.assert_close(moved, -grad, rtol=1e-3, atol=float(2e-3 * grad.abs().max()) + 2e-3)


def test_replicas_of_every_network_start_apart() -> None:
    for source in NETWORKS.values():
        problem = random_problem(source)
        numbers = {"kl_weight": torch.ones(2), "lr": torch.full((2,), 1e-3)}
        with apart(0):
            svi = Task(METHODS["map"], source, 10).svi(numbers, problem)
            svi.guide.initialize(problem.x, problem.y)
            first, second = (svi.guide.replica(r).median() for r in range(2))
        assert all(not torch.equal(first[name], second[name]) for name in first if first[name].dim() > 1)


@pytest.mark.parametrize("name", ["mlp", "lenet", "transformer"])
def test_a_step_of_the_study_is_all_on_the_device_of_its_problem(name: str) -> None:
    source, numbers = NETWORKS[name], {"kl_weight": torch.ones(2), "lr": torch.full((2,), 1e-3), "alpha": torch.ones(2)}
    problem, task = random_problem(source).to("meta"), Task(METHODS["ascended-previous"], source, 10)
    with pyro.validation_enabled(False), apart(0):
        svi = task.svi(numbers, problem)
        loss = task.method.estimator(numbers).differentiable_loss(svi.model, svi.guide, problem.x, problem.y)
        loss.backward()
        assert loss.device.type == "meta"
        assert {each.grad.device.type for each in svi.guide.parameters()} == {"meta"}


def test_a_drawn_problem_is_where_it_was_asked_for() -> None:
    problem = Draws(SOURCES["digits-tuned"], device="meta").final(1)[0]
    tensors = [problem.x, problem.y, problem.x_out, problem.y_out, *problem.outliers.values(), *(problem.before or ())]
    assert len(tensors) == 7
    assert all(tensor.is_meta for tensor in tensors)


def test_runs_that_are_too_many_to_run_together_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    problems_, parts = [random_problem(NETWORKS["resnet18"], seed=k) for k in range(5)], []

    def together(task: Any, settings: Any, problems: Any, *, seed: int, **_: Any) -> list[int]:
        parts.append((list(settings), list(problems), seed))
        return [each["n"] for each in settings]

    monkeypatch.setattr(training, "_together", together)
    settings = [{"n": k} for k in range(5)]
    task = Task(METHODS["mfvi"], NETWORKS["resnet18"], 10)
    assert train(task, settings, problems_, num_samples=1, seed=7) == [0, 1, 2, 3, 4]
    assert parts == [(settings[k : k + 2], problems_[k : k + 2], 7 + k) for k in (0, 2, 4)]


def test_autocast_trains_in_bfloat16_and_predicts_about_the_same() -> None:
    source, settings = (
        Source("digits-60", "digits", rows=60, validation=60, hidden=(8,)),
        {"kl_weight": 0.01, "lr": 0.01},
    )
    problem, seen = Draws(source).final(1)[0], []

    def look(svi: Any, _: Any) -> None:
        seen.append(svi.guide.replica(0).median()["0.weight"])

    nll = [
        train(Task(METHODS["map"], source, 200, on), [settings], [problem], num_samples=1, look=look)[0].metrics["nll"]
        for on in (False, True)
    ]
    assert nll[0] < 1.5
    assert nll[0] != nll[1] == pytest.approx(nll[0], abs=0.1)
    assert seen[1].dtype == torch.float32


def test_the_norm_of_groups_is_that_of_torch() -> None:
    ours, theirs, x = networks.GroupNorm(4, 8), nn.GroupNorm(4, 8), torch.randn(3, 8, 5, 5)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_attention_is_that_of_torch() -> None:
    ours, theirs, x = networks.Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(3, 8, 32)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.all.weight.data, ours.all.bias.data
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], rtol=1e-4, atol=1e-5)


def test_a_transformer_reads_the_rows_of_an_image_in_their_order() -> None:
    problem = random_problem(NETWORKS["transformer"])
    net = plain_network(NETWORKS["transformer"], problem)
    torch.testing.assert_close(next(net.children())(problem.x)[:, 2], problem.x[:, 16:24])
    swapped = problem.x.view(-1, 8, 8)[:, [1, 0, 2, 3, 4, 5, 6, 7]].flatten(1)
    assert (net(swapped) - net(problem.x)).abs().max() > 1e-3


def test_colour_images_get_their_channels_first() -> None:
    image = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    found = networks.ChannelsFirst((32, 32, 3))(torch.tensor(image.reshape(2, -1)))
    np.testing.assert_array_equal(found.numpy(), image.transpose(0, 3, 1, 2))


def test_a_network_for_images_refuses_other_inputs() -> None:
    source = Source("wave-lenet", "wave", network="lenet")
    with pytest.raises(ValueError, match="the network lenet needs images, and wave-lenet has none"):
        plain_network(source, Problem(torch.zeros(3, 1), torch.zeros(3), torch.zeros(3, 1), torch.zeros(3), 0.0))


# Fine-tuning


def test_fine_tuning_starts_at_a_network_that_knows_the_classes_left_out() -> None:
    source = SOURCES["digits-tuned"]
    problem = Draws(source).final(1)[0]
    assert problem.before is not None
    x, y = problem.before
    trained = networks._trained(source.hidden, x, y)
    assert float((trained(x).argmax(1) == y).double().mean()) > 0.98
    net: Any = plain_network(source, problem)
    torch.testing.assert_close(net[:-1](x), trained[:-1](x))
    assert torch.equal(net(problem.x), torch.zeros(len(problem.x), 5))
    assert all(not parameter.any() for parameter in net.parameters())


def test_every_replica_of_fine_tuning_starts_there_and_its_prior_is_centred_there() -> None:
    source = SOURCES["digits-tuned"]
    problem = Draws(source).final(1)[0]
    with apart(0):
        svi = Task(METHODS["map"], source, 10).svi({"kl_weight": torch.ones(2), "lr": torch.ones(2)}, problem)
        svi.guide.initialize(problem.x, problem.y)
        probs = ps.predict(svi.model, svi.guide, problem.x_out, num_samples=1, replica=1).probs
    torch.testing.assert_close(probs, torch.full_like(probs, 0.2), rtol=0, atol=0.05)
    for r in range(2):
        assert all(not value.any() for value in svi.guide.replica(r).median().values())


def test_what_is_learnt_in_fine_tuning_leaves_the_start_as_it_was() -> None:
    source = SOURCES["digits-tuned"]
    problem = Draws(source).final(1)[0]
    before = [each.clone() for each in plain_network(source, problem).buffers()]
    (outcome,) = train(Task(METHODS["map"], source, 200), [{"kl_weight": 0.01, "lr": 0.01}], [problem], num_samples=1)
    assert outcome.metrics["accuracy"] > 0.8
    assert all(map(torch.equal, before, plain_network(source, problem).buffers()))


def test_classes_of_fine_tuning_and_those_before_it_are_told_apart_rightly() -> None:
    problem = Draws(SOURCES["digits-tuned"]).final(1)[0]
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    labels = {tuple(row): int(label) for row, label in zip(x.astype(int).tolist(), y, strict=True)}

    def labels_of(inputs: Tensor) -> list[int]:
        pixels = ((inputs - inputs.amin(1, keepdim=True)) * 6.02).round().int().tolist()
        return [labels[tuple(row)] for row in pixels]

    assert problem.before is not None
    assert labels_of(problem.x_out) == problem.y_out.tolist()
    assert labels_of(problem.before[0]) == [5 + label for label in problem.before[1].tolist()]
    assert set(labels_of(problem.outliers["classes"])) == {5, 6, 7, 8, 9}
    assert len(problem.x) == 50


def test_fine_tuning_needs_classes_left_out() -> None:
    source = dataclasses.replace(SOURCES["digits"], network="tuned_mlp")
    with pytest.raises(ValueError, match="tuned_mlp needs a source with classes left out, digits has all"):
        plain_network(source, random_problem(source))


# Data sets


@pytest.mark.parametrize("share", [0.2, 0.4])
def test_the_share_of_the_training_labels_is_wrong_and_no_test_label(share: float) -> None:
    clean, source = rows.rows("digits", 3, None), SOURCES[f"digits-noise-{100 * share:.0f}"]
    for problem in (Draws(source).final(4)[3], Draws(source).tuning(1)[0]):
        whole = clean if len(problem.x) == len(clean.x_train) else rows.rows("digits", 100, None)
        labels = {tuple(x): int(y) for x, y in zip(whole.x_train.tolist(), whole.y_train, strict=True)}
        held_out = problem is not None and len(problem.x) != len(whole.x_train)
        noisy_x = torch.cat([problem.x, problem.x_out]) if held_out else problem.x
        noisy_y = torch.cat([problem.y, problem.y_out]) if held_out else problem.y
        right = torch.tensor([labels[tuple(x)] for x in noisy_x.tolist()])
        assert int((noisy_y != right).sum()) == round(share * len(right))
        assert len(right) == len(whole.x_train)
        if held_out:  # validation rows have their part
            wrong = (problem.y_out != right[len(problem.x) :]).double().mean()
            assert float(wrong) == pytest.approx(share, abs=4 * (share * (1 - share) / len(problem.y_out)) ** 0.5)
        else:
            assert torch.equal(problem.y_out, whole.y_test[: len(problem.y_out)])


def test_a_wrong_label_is_any_other_class() -> None:
    clean = rows.rows("digits", 0, None)
    noisy_set = rows.with_wrong_labels(clean, 1.0, seed=0)
    steps = (noisy_set.y_train - clean.y_train) % 10
    counts = torch.bincount(steps, minlength=10)
    assert counts[0] == 0
    assert scipy.stats.chisquare(counts[1:].numpy()).pvalue > 1e-3
    assert torch.equal(clean.y_train, rows.rows("digits", 0, None).y_train)


def test_the_noise_of_the_wave_grows_as_it_says() -> None:
    dataset = rows.rows("wave", 0, None)
    x_all, y_all = rows._wave().x[:, 0], rows._wave().y
    z = (y_all - np.sin(2 * x_all)) / np.exp(0.75 * x_all - 2)
    for low in (-2, -1, 0, 1):
        part = z[(x_all >= low) & (x_all < low + 1)]
        assert scipy.stats.kstest(part, "norm").pvalue > 1e-3
    assert dataset.x_train.shape == (3600, 1)
    assert all(len(each.x) == 200 and len(each.x_out) == 400 for each in Draws(SOURCES["wave"]).final(2))


def test_the_second_output_is_the_logarithm_of_the_noise() -> None:
    source, problem = SOURCES["wave"], Draws(SOURCES["wave"]).final(1)[0]
    model, _ = network(source, problem)
    with apart(0):
        trace = pyro.poutine.trace(model).get_trace(problem.x, problem.y)
        weights = {name: site["value"] for name, site in trace.nodes.items() if name.endswith(("weight", "bias"))}
        net = plain_network(source, problem)
        net.load_state_dict(weights)
        output = net(problem.x).detach()
        expected = scipy.stats.norm.logpdf(problem.y, output[:, 0], np.exp(output[:, 1]))
        likelihood: Any = trace.nodes["obs"]["fn"]
        torch.testing.assert_close(likelihood.log_prob(problem.y), torch.tensor(expected).float())
    assert "log_noise" not in trace.nodes


def write_images(
    path: Path, shape: tuple[int, ...], number: int = 40, seed: int = 0, names: tuple[str, ...] = ()
) -> Any:
    generator = np.random.default_rng(seed)
    arrays: dict[str, Any] = {
        "x_train": generator.integers(0, 256, (number, *shape), dtype=np.uint8),
        "y_train": np.arange(number) % 10,
        "x_test": generator.integers(0, 128, (20, *shape), dtype=np.uint8),
        "y_test": np.arange(20) % 10,
    }
    np.savez(path, **arrays)
    return arrays


def test_colour_images_are_read_from_an_archive(tmp_path: Path) -> None:
    arrays = write_images(tmp_path / "cifar10_subset.npz", (32, 32, 3))
    problem = Draws(SOURCES["cifar-4000"], tmp_path).final(1)[0]
    pixels = arrays["x_train"].reshape(40, -1).astype(float)
    expected = (pixels - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(problem.x.numpy(), expected, atol=1e-5)
    assert problem.y.tolist() == arrays["y_train"].tolist()
    tuning = Draws(SOURCES["cifar-4000"], tmp_path).tuning(1)[0]
    assert (len(tuning.x), len(tuning.x_out)) == (30, 10)


def test_colour_images_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"put it at .*cifar10_subset\.npz, with arrays x_train, y_train, x_test, y_test\."
    ):
        Draws(SOURCES["cifar-4000"], tmp_path).final(1)


def test_all_rows_of_a_published_split_are_no_copies(tmp_path: Path) -> None:
    write_images(tmp_path / "mnist.npz", (28, 28))
    first, second = Draws(SOURCES["mnist"], tmp_path).final(2)
    assert first.x.data_ptr() == second.x.data_ptr()


@pytest.mark.parametrize("in_system", [False, True])
def test_outliers_of_mnist_are_images_of_fashion_on_the_same_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_system: bool
) -> None:
    data, system = tmp_path / "data", tmp_path / "system"
    data.mkdir()
    system.mkdir()
    monkeypatch.setattr(sources, "SYSTEM", system)
    arrays = write_images(data / "mnist.npz", (28, 28))
    pixels = arrays["x_train"].astype(float)
    source = dataclasses.replace(SOURCES["mnist-800"], rows=20, validation=10)
    if not in_system:
        assert Draws(source, data).final(1)[0].outliers == {}
    rows.foreign.cache_clear()
    fashion = write_images((system if in_system else data) / "fashion-mnist.npz", (28, 28), seed=1)["x_test"]
    outliers = Draws(source, data).final(1)[0].outliers
    unit = fashion.reshape(20, -1) / fashion.max()
    expected = (255 * unit - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(outliers["fashion-mnist"].numpy(), expected, atol=1e-4)
    assert Draws(source, data).tuning(1)[0].outliers == {}
    rows.foreign.cache_clear()


# Shift


def images(shape: tuple[int, int, int], number: int = 3) -> Tensor:
    return torch.randn(number, math.prod(shape), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3)])
def test_a_rotation_by_a_right_angle_is_that_of_torch(shape: tuple[int, int, int]) -> None:
    x = images(shape)
    expected = torch.rot90(x.view(-1, *shape), 1, (1, 2)).flatten(1)
    torch.testing.assert_close(rotated(x, shape, 90, float(x.min())), expected, rtol=1e-4, atol=1e-4)


def test_a_rotation_is_that_of_scipy_and_its_corners_are_background() -> None:
    x = images((28, 28, 1))
    found = rotated(x, (28, 28, 1), 30, -7.0).view(-1, 28, 28).numpy()
    for image, turned in zip(x.view(-1, 28, 28).numpy(), found, strict=True):
        expected = scipy.ndimage.rotate(image, 30, reshape=False, order=1, mode="constant", cval=-7.0)
        np.testing.assert_allclose(turned[6:22, 6:22], expected[6:22, 6:22], atol=1e-4)
        assert turned[0, 0] == pytest.approx(-7.0)


def test_pixel_noise_has_its_deviation_and_is_the_same_again() -> None:
    x = images((28, 28, 1), 50)
    noise = noisy(x, 0.5) - x
    assert float(noise.std()) == pytest.approx(0.5, abs=4 * 0.5 / (2 * noise.numel()) ** 0.5)
    assert torch.equal(noisy(x, 0.5), noisy(x, 0.5))


def test_a_permutation_moves_whole_pixels_the_same_way_in_all_images() -> None:
    x = torch.arange(2 * 4 * 4 * 3).double().view(2, -1)
    found = permuted(x, (4, 4, 3)).view(2, 16, 3)
    assert torch.equal(found[1] - found[0], torch.full((16, 3), 48.0).double())
    assert torch.equal(found[0, :, 0] + 1, found[0, :, 1])
    assert torch.equal(found[0, :, 0].sort().values, x[0].view(16, 3)[:, 0])
    assert not torch.equal(found[0], x[0].view(16, 3))


class Linear:
    """A classifier of flat digits by a softmax, which has an answer for every input."""

    def __init__(self) -> None:
        self.weight = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))

    def __call__(self, x: Tensor) -> ps.Prediction:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Categorical(logits=x @ self.weight.to(x)))

        return ps.predict(model, lambda *_: None, x, num_samples=1)


def test_metrics_under_shift_are_those_of_scikit_learn() -> None:
    source = SOURCES["digits-tuned"]
    problem = Draws(source).final(1)[0]
    predict, x, y = Linear(), problem.x_out, problem.y_out
    found = under_shift(predict, source, problem)
    turned = predict(rotated(x, (8, 8, 1), 45, float(problem.x.min()))).probs.double()
    turned = turned / turned.sum(-1, keepdim=True)
    assert found["nll_rotated_45"] == pytest.approx(sklearn.metrics.log_loss(y, turned, labels=range(10)), rel=1e-4)
    spoilt = predict(noisy(x, 1.0)).probs.argmax(1)
    assert found["accuracy_noise_1"] == pytest.approx(sklearn.metrics.accuracy_score(y, spoilt))
    entropy = [scipy.stats.entropy(predict(each).probs.numpy(), axis=1) for each in (x, problem.outliers["classes"])]
    is_outside = np.repeat([0, 1], [len(each) for each in entropy])
    expected = sklearn.metrics.roc_auc_score(is_outside, np.concatenate(entropy))
    assert found["auroc_classes"] == pytest.approx(expected, abs=1e-4)
    names = [f"{score}_{each}" for each in ("rotated_15", "rotated_30", "rotated_45", "noise_0.5", "noise_1")
             for score in ("nll", "accuracy", "ece")]  # fmt: skip
    assert [*found] == [*names, "auroc_permuted", "auroc_classes"]


@pytest.mark.parametrize("name", ["breast-cancer", "wave"])
def test_there_is_no_shift_but_of_images(name: str) -> None:
    assert under_shift(Linear(), SOURCES[name], Draws(SOURCES[name]).final(1)[0]) == {}


def test_selective_accuracy_is_that_of_the_most_confident_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    probs, y = torch.rand(41, 3, generator=generator).softmax(-1), torch.randint(3, (41,), generator=generator)
    order = np.argsort(-probs.max(-1).values.numpy())[:33]  # 80 % of 41 and a bit
    expected = np.mean(probs.argmax(-1).numpy()[order] == y.numpy()[order])

    class Given:
        def __init__(self) -> None:
            self.probs = probs

    assert selective_accuracy(Given(), y) == pytest.approx(expected)  # type: ignore[arg-type]
    assert selective_accuracy(Given(), y, 1.0) == pytest.approx(float((probs.argmax(-1) == y).double().mean()))  # type: ignore[arg-type]


def test_the_elbo_is_that_of_pyro_at_kl_weight_one() -> None:
    source = dataclasses.replace(SOURCES["diabetes"], hidden=(4,))
    problem = Draws(source).final(1)[0]
    numbers = {"kl_weight": torch.full((2,), 0.01), "lr": torch.full((2,), 0.01)}
    with apart(0):
        svi = Task(METHODS["mfvi"], source, 20).svi(numbers, problem)
        for _ in range(5):
            svi.step(problem.x, problem.y)
        found = Trained(svi, source).elbo([problem, problem])
        for r in range(2):
            guide = svi.guide.replica(r)
            draws = [-TraceMeanField_ELBO().loss(svi.model, guide, problem.x, problem.y) for _ in range(200)]
            values = np.array(draws) / len(problem.x) - problem.log_unit
            error = values.std() * (1 / 200 + 1 / 32) ** 0.5
            assert found[r] == pytest.approx(values.mean(), abs=4 * error)
    assert found[0] != found[1]


def test_a_run_that_ended_in_nan_has_no_elbo_and_no_metrics_under_shift() -> None:
    source = SOURCES["digits-tuned"]
    problems, task = Draws(source).final(2), Task(METHODS["mfvi"], source, 4)
    settings = [{"kl_weight": 1.0, "lr": lr} for lr in (0.001, 1e30)]
    fine, lost = train(task, settings, problems, num_samples=2, shift=True)
    assert math.isfinite(fine.metrics["elbo"])
    assert all(map(math.isfinite, fine.shift.values()))
    assert math.isnan(lost.metrics["nll"])
    assert math.isnan(lost.metrics["elbo"])
    assert lost.shift == {}


# The command


def test_the_command_runs_sequences_noisy_labels_growing_noise_and_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    small = dataclasses.replace(
        sizes.SIZES["quick"], finalists=1, tuning_seeds=1, num_samples=4, points=1, test_rows=60
    )
    monkeypatch.setitem(sizes.SIZES, "quick", small)
    monkeypatch.setattr(flat, "_ROWS", 20)
    data = ["digits-sequence", "wave", "digits-noise-20", "digits-tuned"]
    words = ["study", "--quick", "--data", *data, "--methods", "mfvi", "ascended-previous", "--trials", "2"]
    assert cli.main([*words, "--seeds", "2", "--gradients", "6", "--out", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert {(line["data"], line["method"], line["seed"]) for line in lines} == {
        (each, method, seed) for each in data for method in ("mfvi", "ascended-previous") for seed in range(2)
    }
    assert {line["gradients"] for line in lines} == {6}
    assert all(math.isfinite(value) for line in lines for value in (*line["metrics"].values(), *line["shift"].values()))
    assert all(bool(line["shift"]) == (line["data"] != "wave") for line in lines)
    text = (tmp_path / "study.md").read_text()
    table = text.partition("## digits-tuned: ELBO, and under shift\n\n")[2].partition("\n\n")[0]
    assert "auroc classes" in table
    assert table == shift(lines, "digits-tuned")
    mean = np.mean([line["shift"]["nll_rotated_45"] for line in lines if line["data"] == "digits-tuned"][:2])
    assert f"{mean:.3f} ±" in table
    capsys.readouterr()
