"""Settings assigned later are checked as new ones; what a law hands back is noise; what is remembered is bounded."""

import copy
import gc
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

import pyro_sam as ps
from pyro_sam._base.recent import Recent
from pyro_sam._step.settings import NAMES, Settings

X, Y = torch.linspace(-1, 1, 24).reshape(12, 2).double(), torch.linspace(0, 1, 12).double()


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", 400, subsample=torch.arange(len(x))):
        pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kl_weight", -1.0, "kl_weight must be non-negative"),
        ("scope", "sight", "scope must be one of"),
        ("scale_gradient", "meen", "scale_gradient must be one of"),
        ("ascent", "past", "ascent must be one of"),
        ("hide", 3, "hide must be a collection"),
        ("num_particles", 0, "num_particles must be a whole number"),
        ("perturbation", 1.0, "perturbation must be a Perturbation"),
        ("ascent_decay", 1.0, "ascent_decay must be in"),
        ("max_plate_nesting", -1, "max_plate_nesting must be a whole number"),
        ("fast", "no", "fast must be True or False"),
        ("retain_graph", 2, "retain_graph must be True or False"),
        ("strict_enumeration_warning", None, "strict_enumeration_warning must be True or False"),
    ],
)
def test_a_setting_assigned_later_is_checked_and_a_bad_one_changes_nothing(
    fast: bool, name: str, value: Any, message: str
) -> None:
    elbo = ps.SAM_ELBO(ps.Adversarial(0.5), fast=fast)
    before = getattr(elbo, name)
    with pytest.raises(ValueError, match=message):
        setattr(elbo, name, value)
    assert getattr(elbo, name) == before


def test_settings_are_checked_together() -> None:
    elbo = ps.SAM_ELBO(ps.Adversarial(0.5), scale_gradient="mean")
    with pytest.raises(ValueError, match="scale_gradient='mean' needs a gradient at the guide's mean"):
        elbo.perturbation = ps.AscendedSample()
    elbo.scale_gradient = "perturbed"
    elbo.perturbation = ps.AscendedSample()


def test_a_site_hidden_later_must_be_there() -> None:
    guide, elbo = ps.MeanFieldNormal(regression).initialize(X, Y), ps.SAM_ELBO(ps.Adversarial(0.5))
    for _ in range(2):
        elbo.loss_and_grads(regression, guide, X, Y)
    elbo.hide = "typo"
    with pytest.raises(ValueError, match="hide must name sites of the guide, got typo"):
        elbo.loss_and_grads(regression, guide, X, Y)


def test_a_geometry_chosen_later_refuses_a_full_covariance() -> None:
    guide, elbo = AutoMultivariateNormal(regression), ps.SAM_ELBO(ps.Adversarial(0.5))
    elbo.loss_and_grads(regression, guide, X, Y)
    elbo.perturbation = ps.Adversarial(0.1, geometry="euclidean")
    with pytest.raises(ValueError, match="full covariance"):
        elbo.loss_and_grads(regression, guide, X, Y)


def test_a_weight_set_later_refuses_a_prior_below_an_enumerated_site() -> None:
    @config_enumerate
    def model(y: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.3))
        w = pyro.sample("w", dist.Normal(5 * k, 1.0))
        pyro.sample("obs", dist.Normal(w, 1.0), obs=y)

    y = torch.tensor(1.0)
    guide, elbo = ps.MeanFieldNormal(model).initialize(y), ps.SAM_ELBO(ps.Gaussian())
    elbo.loss_and_grads(model, guide, y)
    elbo.kl_weight = 0.5
    with pytest.raises(ValueError, match="prior of latent site 'w' depends on a site that is summed out"):
        elbo.loss_and_grads(model, guide, y)


def test_every_setting_can_be_read_and_other_attributes_are_missed() -> None:
    elbo = ps.SAM_ELBO(ps.MixSAM(0.5), kl_weight=0.3, hide=["w"])
    assert {name: getattr(elbo, name) for name in NAMES} == {
        name: getattr(Settings(perturbation=ps.MixSAM(0.5), kl_weight=0.3, hide=["w"]), name) for name in NAMES
    }
    with pytest.raises(AttributeError, match="has no attribute 'rho'"):
        elbo.rho  # noqa: B018
    assert copy.deepcopy(elbo).kl_weight == 0.3


def test_pyros_own_arguments_are_taken() -> None:
    assert ps.SAM_ELBO(strict_enumeration_warning=False).strict_enumeration_warning is False
    assert isinstance(ps.SAM_ELBO(max_plate_nesting=2, retain_graph=True), ELBO)


class Given(ps.Perturbation):
    """A law that hands back what it is told."""

    uses_gradient = False

    def __init__(self, make: Any) -> None:
        self.make = make

    def noise(self, space: ps.NoiseSpace) -> Tensor:
        return self.make(space.zeros())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda e: e[0], r"\(2,\)"),
        (lambda e: e[:, :1], r"\(1, 1\)"),
        (lambda e: e.sum(), r"\(\)"),
        (lambda e: e.repeat(2, 1), r"\(2, 2\)"),
        (lambda e: 0.5, "float"),
    ],
)
def test_noise_of_another_shape_is_refused(fast: bool, make: Any, shape: str) -> None:
    guide, elbo = ps.MeanFieldNormal(regression).initialize(X, Y), ps.SAM_ELBO(ps.Mean(), fast=fast)
    for _ in range(2):
        elbo.loss_and_grads(regression, guide, X, Y)
    elbo.perturbation = Given(make)
    with pytest.raises(ValueError, match=rf"noise must have shape \(P, d\) = \(1, 2\), .* Given gave {shape}"):
        elbo.loss_and_grads(regression, guide, X, Y)


@pytest.mark.parametrize("mark", [{"num_samples": 3}, {"num_samples": 1}])
def test_local_samples_of_a_guide_site_are_refused(mark: Any) -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    marked = config_enumerate(guide, "parallel", **mark)
    with pytest.raises(NotImplementedError, match=r"guide site 'w' is marked for . local samples"):
        ps.SAM_ELBO(ps.Gaussian()).loss_and_grads(regression, marked, X, Y)


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_a_continuous_guide_site_that_is_marked_to_be_enumerated_is_refused(how: str) -> None:
    """As by TraceEnum_ELBO."""

    def guide(x: Tensor, y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2))
        pyro.sample("w", dist.Normal(loc, 1.0).to_event(1), infer={"enumerate": how})

    for elbo in (ps.SAM_ELBO(), TraceEnum_ELBO(max_plate_nesting=1)):
        with pytest.raises(NotImplementedError) as refused:
            elbo.loss_and_grads(regression, guide, X, Y)
        assert isinstance(elbo, TraceEnum_ELBO) or "guide site 'w' is marked to be enumerated" in str(refused.value)


def held(root: Any) -> int:
    """Return how many objects something holds, outside of modules, classes and functions."""
    seen, todo = set(), [root]
    while todo:
        item = todo.pop()
        if id(item) not in seen and not isinstance(item, type | type(gc) | type(held)):
            seen.add(id(item))
            todo += gc.get_referents(item)
    return len(seen)


@pytest.mark.parametrize("settings", [{}, {"fast": False}, {"ascent": "previous"}], ids=str)
def test_what_is_remembered_does_not_grow_with_the_number_of_batch_sizes(settings: Any) -> None:
    x, y = X.repeat(20, 1), Y.repeat(20)
    guide, elbo = ps.MeanFieldNormal(regression).initialize(X, Y), ps.SAM_ELBO(ps.Adversarial(0.5), **settings)
    sizes = []
    for rows in range(1, 221):
        elbo.loss_and_grads(regression, guide, x[:rows], y[:rows])
        if rows in (110, 220):
            sizes.append(held(elbo))
    assert sizes[1] < 1.1 * sizes[0]


def test_recent_forgets_what_was_not_asked_for_longest_but_what_it_shall_keep() -> None:
    recent: Recent[str, int] = Recent(3, keep=lambda value: value == 0)
    for key, value in (("kept", 0), ("a", 1), ("b", 2)):
        recent.put(key, value)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert ("kept" in recent, "a" in recent, "b" in recent, len(recent)) == (True, True, False, 3)
    assert recent.get("b") is None


@pytest.mark.parametrize("law", [ps.Gaussian(), ps.Adversarial(0.5)], ids=repr)
def test_a_likelihood_as_a_factor_and_the_parts_of_a_mixture_are_checked_at_every_step(law: ps.Perturbation) -> None:
    def factor(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.factor("likelihood", dist.Bernoulli(logits=x @ w).log_prob(y).sum())

    def mixture(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        parts = dist.Gamma(y[:2], torch.ones(2))
        mix = dist.MixtureSameFamily(dist.Categorical(logits=torch.stack([w, -w])), parts)
        pyro.sample("obs", mix.expand([12]).to_event(1), obs=x[:, 0] + 2)

    for model, good, bad in ((factor, (Y > 0.5).double(), 2 * Y), (mixture, Y + 1, -Y - 1)):
        pyro.clear_param_store()
        guide, elbo = ps.MeanFieldNormal(model).initialize(X, good), ps.SAM_ELBO(law)
        for _ in range(2):
            elbo.loss_and_grads(model, guide, X, good)
        with pytest.raises(ValueError, match=r"to be within the support|to satisfy"):
            elbo.loss_and_grads(model, guide, X, bad)
