"""A fast estimator and an ordinary one in lockstep, each in a world of its own, through whatever a user may do.

``python -m tests.test_lockstep`` goes on for ``SOAK_SECONDS`` (an hour), from ``SOAK_SEED`` on.
"""

import copy
import os
import random
import time
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor, nn

import pyro_sam as ps
from pyro_sam._base.random_state import RandomState, Streams
from pyro_sam._graph import lowering
from pyro_sam.elbo import sentinel
from tests.scenarios import Knobs, World, data, difference, fresh_start, observe
from tests.test_backends_agree import heard, ordinary

SETTINGS: Any = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
IN_CI: Any = {**SETTINGS, "derandomize": True, "phases": [Phase.generate]}  # shrinking a failure takes minutes
LAWS = (
    ps.Mean(),
    ps.Gaussian(),
    ps.Adversarial(0.5),
    ps.Adversarial(0.3, steps=2),
    ps.Adversarial(0.1, geometry="adaptive"),
    ps.MixSAM(0.5),
    ps.AscendedSample(0.5),
)
HANDLERS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: poutine.trace(param_only=True),
    "scale": lambda: poutine.scale(scale=0.3),
    "mask": lambda: poutine.mask(mask=torch.arange(5) < 3),
    "condition": lambda: poutine.condition(data={"temperature": torch.tensor(0.8)}),
    "block": lambda: poutine.block(hide=["obs"]),
}
PRIORS: dict[str, Callable[[Any], Any]] = {
    "Normal": lambda knobs: dist.Normal(torch.zeros(2), knobs.sigma),
    "Laplace": lambda knobs: dist.Laplace(torch.zeros(2), knobs.sigma),
    "StudentT": lambda knobs: dist.StudentT(4.0, torch.zeros(2), knobs.sigma),
}
DRAWS: dict[str, Callable[[Any], float]] = {
    "none": lambda knobs: 0.0,
    "torch's": lambda knobs: torch.rand(()).item(),
    "NumPy's": lambda knobs: np.random.normal(),  # noqa: NPY002
    "Python's": lambda knobs: random.gauss(0.0, 1.0),
    "its own": lambda knobs: torch.rand((), generator=knobs.generator).item(),
}
ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.Softplus)
taken = 0  # steps of all machines


def small_world() -> World:
    """A network with dropout and running statistics, weights by hand, a hierarchy, a parameter, an observed scale."""
    # no bias before the norm: its gradient is rounding, which a scope of its own would blow up to length rho
    first = nn.Linear(2, 3, bias=False)
    net = nn.Sequential(first, nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.2), nn.Linear(3, 1))
    bnn = ps.BayesianModule(net)
    knobs = Knobs(sigma=torch.ones(2), prior="Normal", tied=False, shift=0.0, prior_scale=1.0, stream="none")
    knobs.generator = torch.Generator().manual_seed(5)

    def model(x: Tensor, y: Tensor, shift: float = 0.0) -> None:
        tau = pyro.sample("log_tau", dist.Normal(0.0, 0.5)).exp()
        with poutine.scale(scale=knobs.prior_scale):
            w = pyro.sample("w", PRIORS[knobs.prior](knobs).to_event(1))
        v = pyro.sample("v", dist.Normal(torch.zeros(2), tau if knobs.tied else 1.0).to_event(1))
        slope = pyro.param("slope", torch.tensor(0.5), constraint=constraints.positive)
        scale = pyro.sample("temperature", dist.LogNormal(0.0, 1.0), obs=torch.tensor(0.5))
        shift = shift + knobs.shift + 0.1 * DRAWS[knobs.stream](knobs)
        observe(x, y, bnn(x).squeeze(-1) + slope * (x * (w + v)).sum(-1) + shift, scale)

    world = World(model, modules=[net, bnn], knobs=knobs, generators=[knobs.generator])
    world.lr = 1e-4  # rounding must not grow over many steps
    return world


class Lockstep(RuleBasedStateMachine):
    """Two worlds that the same is done to; a rule takes turns in them."""

    compile: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.stores: list[Any] = [{"params": {}, "constraints": {}} for _ in range(2)]
        self.streams: list[Any] = [None, None]
        self.worlds: list[World] = []

    @initialize(ascent=st.sampled_from(["fresh", "fresh", "previous"]), num_particles=st.sampled_from([1, 1, 2]))
    def start(self, ascent: str, num_particles: int) -> None:
        given = {"ascent": ascent, "num_particles": num_particles}
        for turn, make in enumerate((ps.SAM_ELBO, ordinary)):
            with fresh_start(), pyro.get_param_store().scope(self.stores[turn]):
                extra = {"compile": True} if self.compile and turn == 0 else {}
                self.worlds.append(small_world().start(make, ordinary=turn == 1, **given, **extra))
                self.streams[turn] = RandomState.capture(Streams())

    def _both(self, function: Callable[[World], Any]) -> None:
        """Do something in each world, with its own parameters and random stream."""
        for turn, world in enumerate(self.worlds):
            with fresh_start(), heard(), pyro.get_param_store().scope(self.stores[turn]):
                self.streams[turn].restore()
                function(world)
                self.streams[turn] = RandomState.capture(Streams())

    def _change(self, function: Callable[[World], Any]) -> None:
        """Do something in each world, and step on."""
        self._both(function)
        self._steps(slice(12))

    def _steps(self, rows: slice, count: int = 1) -> None:
        global taken
        taken += count
        x, y = data()

        def go(world: World) -> None:
            world.args = x[rows].clone(), y[rows].clone()
            for _ in range(count):
                world.step()

        self._both(go)

    # ---- steps

    @rule(size=st.sampled_from([5, 12, 12, 12]), count=st.integers(1, 3))
    def take_steps(self, size: int, count: int) -> None:
        self._steps(slice(size), count)

    @rule(count=st.integers(1, 3))
    def take_more_steps(self, count: int) -> None:
        self._steps(slice(12), count)

    @rule(start=st.integers(0, 4), size=st.integers(2, 8))
    def take_a_step_on_other_rows(self, start: int, size: int) -> None:
        self._steps(slice(start, start + size))

    @rule(name=st.sampled_from(sorted(HANDLERS)))
    def take_steps_under_a_handler(self, name: str) -> None:
        self._both(lambda world: setattr(world, "around", HANDLERS[name]))
        self._steps(slice(5), 2)
        self._both(lambda world: setattr(world, "around", HANDLERS["nothing"]))

    @rule()
    def take_a_step_that_fails(self) -> None:
        def fail(world: World) -> None:
            world.args = data()[0] * torch.nan, data()[1]
            world.step()
            pyro.set_rng_seed(3)

        self._both(fail)

    # ---- settings

    @rule(law=st.sampled_from(LAWS))
    def set_law(self, law: ps.Perturbation) -> None:
        self._change(lambda world: setattr(world.elbo, "perturbation", law))

    @rule(rho=st.sampled_from([0.0, 0.1, 1.0]))
    def anneal_rho(self, rho: float) -> None:
        self._change(lambda world: setattr(world.elbo, "perturbation", ps.MixSAM(rho)))

    @rule(weight=st.sampled_from([0.0, 0.3, 1.0]))
    def set_kl_weight(self, weight: float) -> None:
        self._change(lambda world: setattr(world.elbo, "kl_weight", weight))

    @rule(scope=st.sampled_from(["global", "site", "event"]))
    def set_scope(self, scope: str) -> None:
        self._change(lambda world: setattr(world.elbo, "scope", scope))

    # ---- parameters

    @rule(name=st.sampled_from(["locs.w", "scales.w", "locs.4.weight", "slope"]), learn=st.booleans())
    def freeze_or_thaw(self, name: str, learn: bool) -> None:
        self._change(lambda world: [p.requires_grad_(learn) for p in named(name)])

    @rule(name=st.sampled_from(["locs.w", "locs.0.weight", "scales.log_tau", "slope"]), through_data=st.booleans())
    def edit_in_place(self, name: str, through_data: bool) -> None:
        def edit(world: World) -> None:
            for leaf in named(name):
                if through_data:
                    leaf.data.mul_(0.9)
                else:
                    with torch.no_grad():
                        leaf.mul_(0.9)

        self._change(edit)

    @rule()
    def replace_in_the_store(self) -> None:
        def put(world: World) -> None:
            store = pyro.get_param_store()
            for name in dict(store.named_parameters()):
                if name.endswith("locs.v"):
                    store[name] = store[name].detach() * 0.5

        self._change(put)

    @rule()
    def step_and_load_the_store(self) -> None:
        def load(world: World) -> None:
            state = copy.deepcopy(pyro.get_param_store().get_state())
            world.args = data()
            world.step()
            pyro.get_param_store().set_state(state)

        self._change(load)

    # ---- the model

    @rule(factor=st.sampled_from([0.5, 1.5]), through_data=st.booleans())
    def anneal_the_prior(self, factor: float, through_data: bool) -> None:
        self._change(lambda world: (world.knobs.sigma.data if through_data else world.knobs.sigma).mul_(factor))

    @rule(name=st.sampled_from(sorted(PRIORS)))
    def set_the_family(self, name: str) -> None:
        self._change(lambda world: setattr(world.knobs, "prior", name))

    @rule(tied=st.booleans())
    def tie_the_prior_to_a_latent(self, tied: bool) -> None:
        self._change(lambda world: setattr(world.knobs, "tied", tied))

    @rule(scale=st.sampled_from([0.1, 1.0]))
    def scale_a_prior(self, scale: float) -> None:
        self._change(lambda world: setattr(world.knobs, "prior_scale", scale))

    @rule(shift=st.sampled_from([0.0, 0.5]), by_name=st.booleans())
    def shift(self, shift: float, by_name: bool) -> None:
        def change(world: World) -> None:
            if by_name:
                world.kwargs["shift"] = shift
            else:
                world.knobs.shift = shift

        self._change(change)

    @rule(stream=st.sampled_from(sorted(DRAWS)))
    def draw_from(self, stream: str) -> None:
        self._change(lambda world: setattr(world.knobs, "stream", stream))

    @rule(kind=st.sampled_from(ACTIVATIONS))
    def replace_a_layer(self, kind: type[nn.Module]) -> None:
        self._change(lambda world: world.modules[0].__setitem__(2, kind()))

    @rule(mode=st.booleans())
    def set_training(self, mode: bool) -> None:
        self._change(lambda world: world.modules[0].train(mode))

    @rule()
    def reset_statistics(self) -> None:
        self._change(lambda world: world.modules[0][1].reset_running_stats())

    # ---- in between

    @rule(grad=st.booleans())
    def evaluate(self, grad: bool) -> None:
        def look(world: World) -> None:
            world.args = data()
            with torch.set_grad_enabled(grad):
                world.evaluate()

        self._change(look)

    @rule()
    def copy_the_estimator(self) -> None:
        self._change(lambda world: setattr(world, "elbo", copy.deepcopy(world.elbo)))

    @rule()
    def keep_the_estimators_state(self) -> None:
        self._change(lambda world: world.elbo.load_state_dict(copy.deepcopy(world.elbo.state_dict())))

    @rule(seed=st.integers(0, 3))
    def seed(self, seed: int) -> None:
        self._change(lambda world: pyro.set_rng_seed(seed))

    @rule()
    def run_the_guide(self) -> None:
        self._change(lambda world: world.guide(*world.args))

    @invariant()
    def numbers_are_equal(self) -> None:
        if self.worlds:
            fast, right = self.worlds
            assert (why := difference(fast.log, right.log, 1e-9)) is None, why
            fast.log, right.log = [], []


def named(end: str) -> list[Any]:
    """Return the parameter whose name ends so."""
    return [p for name, p in pyro.get_param_store().named_parameters() if name.endswith(end)]


def test_lean_steps_keep_in_step() -> None:
    run_state_machine_as_test(Lockstep, settings=settings(max_examples=55, stateful_step_count=40, **IN_CI))


def test_captured_steps_keep_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "compiled", lambda graph, inputs: graph)
    monkeypatch.setattr(Lockstep, "compile", True)
    run_state_machine_as_test(Lockstep, settings=settings(max_examples=4, stateful_step_count=12, **IN_CI))


def main() -> None:
    """Go on with other seeds until the time is up."""
    end = time.monotonic() + float(os.environ.get("SOAK_SECONDS", "3600"))
    seed = int(os.environ.get("SOAK_SEED", "0"))
    torch.set_default_dtype(torch.float64)
    lowering.compiled = lambda graph, inputs: graph
    sentinel.is_due = lambda count, **_: False  # it would hide what is looked for
    warnings.simplefilter("ignore")
    while time.monotonic() < end:
        Lockstep.compile = seed % 4 == 3
        machine = hypothesis.seed(seed)(Lockstep)
        examples = 3 if Lockstep.compile else 25  # a captured step is captured anew at almost every change: seconds
        run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=60, **SETTINGS))
        kind = "captured" if Lockstep.compile else "flat"
        print(f"seed {seed}, {kind} steps: {taken:,} in all, nothing found", flush=True)  # noqa: T201
        seed += 1


if __name__ == "__main__":
    main()
