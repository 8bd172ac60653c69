"""What a user changes or does between two steps: worlds, each with one change.

A :class:`World` is a model with its guide, data and estimator, built from a fixed seed, so that two of them are the
same until somebody tells them apart. A :class:`Scenario` builds one and changes one thing in it. Whoever takes the same
scenario with two estimators (``World.start``) and the same steps can compare the two logs (:func:`difference`).
"""

import copy
import itertools
import math
import pickle
import random
import threading
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import pyro_sam as ps

SIZE, ROWS = 40, 12
Change = Callable[["World"], Any]


def data() -> tuple[Tensor, Tensor]:
    """Return twelve rows and their targets, the same ones every time, in tensors of their own."""
    x = torch.randn(ROWS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x, torch.sin(2 * x[:, 0]) - 0.5 * x[:, 1]


# ---- the world


class Knobs:
    """Attributes that a model reads and a change turns."""

    def __init__(self, **values: Any) -> None:
        self.on = False
        vars(self).update(values)


class World:
    """A model, a guide, an estimator and all that a step of theirs writes to.

    Args:
        model: The model.
        args: Arguments of a step.
        kwargs: Named arguments of a step.
        guide: The guide; a mean-field one by default.
        law: The law of the noise.
        plain_law: For an estimator of ordinary steps: the same law written without writing in place.
        settings: Other settings of the estimator.
        modules: Modules whose parameters and buffers belong to the state.
        generators: Random streams of the model's own.
        knobs: What the model reads and a change turns.
        initialised: Whether the guide's parameters exist before the first step.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        guide: Callable[..., Any] | None = None,
        law: ps.Perturbation | None = None,
        plain_law: ps.Perturbation | None = None,
        settings: Mapping[str, Any] | None = None,
        modules: Iterable[nn.Module] = (),
        generators: Iterable[Any] = (),
        knobs: Any = None,
        initialised: bool = True,
    ) -> None:
        self.model = model
        self.args = args or data()
        self.kwargs = dict(kwargs or {})
        self.guide: Any = ps.MeanFieldNormal(model, init_scale=0.3) if guide is None else guide
        self.law = ps.MixSAM(0.5) if law is None else law
        self.plain_law = self.law if plain_law is None else plain_law
        self.settings = dict(settings or {})
        self.modules, self.generators = list(modules), list(generators)
        self.knobs = Knobs() if knobs is None else knobs
        self.elbo: Any = None
        self.around: Callable[[], Any] = nullcontext
        self.take: Callable[[World], Any] = accumulate
        self.model_of: Callable[[], Callable[..., Any]] = lambda: self.model
        self.args_of: Callable[[], tuple[Any, ...]] = lambda: self.args
        self.lr = 1e-3
        self.initialised = initialised
        self.log: list[dict[str, Any]] = []

    def start(self, make: Callable[..., Any], *, ordinary: bool = False, **settings: Any) -> "World":
        """Make the estimator, and the guide's parameters."""
        if self.initialised and isinstance(self.guide, ps.MeanFieldNormal):
            self.guide.initialize(*self.args_of(), **self.kwargs)
            pyro.set_rng_seed(1)
        self.elbo = make(self.plain_law if ordinary else self.law, **{**self.settings, **settings})
        return self

    def step(self) -> None:
        """Take a step as Pyro's SVI does, and log what came of it; an error counts as an outcome."""
        seen: dict[str, Any] = {}
        statements = SimpleNamespace(trace=SimpleNamespace(nodes={}))
        try:
            with self.around(), poutine.trace(param_only=True) as statements:
                seen["loss"] = float(self.take(self))
        except Exception as error:
            seen["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            seen["statements"] = sorted(statements.trace.nodes)
        self._note(seen)

    def leaves(self) -> dict[str, Tensor]:
        """Return all that may get a gradient."""
        leaves = dict(pyro.get_param_store().named_parameters())
        owners = [self.guide, *self.modules]
        for number, owner in enumerate(owner for owner in owners if isinstance(owner, nn.Module)):
            leaves |= {f"{number} {name}": p for name, p in owner.named_parameters()}
        arguments = [*self.args, *self.kwargs.values()]
        leaves |= {f"argument {k}": a for k, a in enumerate(arguments) if isinstance(a, Tensor) and a.is_leaf}
        return leaves

    def evaluate(self, *args: Any) -> None:
        """Log an evaluation."""
        self.log.append({"evaluated": self.elbo.loss(self.model_of(), self.guide, *(args or self.args_of()))})

    def _note(self, seen: dict[str, Any]) -> None:
        leaves = self.leaves()
        seen |= {f"grad {name}": p.grad.clone() for name, p in leaves.items() if p.grad is not None}
        moved = {id(p): p for name, p in leaves.items() if p.grad is not None and not name.startswith("argument")}
        with torch.no_grad():
            for leaf in moved.values():
                leaf.sub_(self.lr * leaf.grad.nan_to_num())  # type: ignore[union-attr]
        for leaf in leaves.values():
            leaf.grad = None
        seen |= {f"value {name}": p.detach().clone() for name, p in leaves.items()}
        for number, module in enumerate(self.modules):
            seen |= {f"buffer {number} {name}": b.detach().clone() for name, b in module.named_buffers()}
        seen |= {"torch's stream": torch.get_rng_state(), "Python's stream": hash(random.getstate())}
        streams = {"NumPy's stream": np.random.get_state(), **dict(enumerate(map(_state, self.generators)))}  # noqa: NPY002
        seen |= {f"{name}": repr(state) for name, state in streams.items()}
        self.log.append(seen)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().sum(), torch.rand(3, generator=generator.clone_state()).tolist()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.getstate()


def accumulate(world: World) -> float:
    """Take one step's loss and gradients."""
    return world.elbo.loss_and_grads(world.model_of(), world.guide, *world.args_of(), **world.kwargs)


@contextmanager
def fresh_start() -> Iterator[None]:
    """Run a world away from all others: an empty store, seeds, double precision, nothing around."""
    before = torch.get_default_dtype(), torch.get_rng_state()
    with pyro.get_param_store().scope(), torch.autocast("cpu", enabled=False), torch.enable_grad():
        torch.set_default_dtype(torch.float64)
        pyro.set_rng_seed(0)
        try:
            yield
        finally:
            torch.set_default_dtype(before[0])
            torch.set_rng_state(before[1])


def difference(got: list[dict[str, Any]], want: list[dict[str, Any]], rtol: float) -> str | None:
    """Return in words where two logs first differ; None if they agree."""
    if len(got) != len(want):
        return f"{len(got)} entries in the log, right are {len(want)}"
    for step, (here, there) in enumerate(zip(got, want, strict=True)):
        if "error" in here or "error" in there:
            if here.get("error") != there.get("error"):
                return f"entry {step}: error {here.get('error')!r}, right is {there.get('error')!r}"
            continue
        here, there = _with_zeros(here, there), _with_zeros(there, here)
        if missing := here.keys() ^ there.keys():
            return f"entry {step}: only one of the two has {sorted(missing)}"
        for name, right in there.items():
            if (why := _unlike(here[name], right, rtol)) is not None:
                return f"entry {step}: {name} is {why}"
    return None


def _with_zeros(entry: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with zeros for gradients that only the other has: to have none is to have a zero one."""
    missing = {name: torch.zeros_like(v) for name, v in other.items() if name.startswith("grad") and name not in entry}
    return {**entry, **missing}


def _unlike(got: Any, want: Any, rtol: float) -> str | None:
    if not isinstance(want, Tensor | float):
        return None if got == want else f"{str(got)[:80]}, right is {str(want)[:80]}"
    here, there = torch.as_tensor(got), torch.as_tensor(want)
    if here.dtype != there.dtype or here.shape != there.shape:
        return f"{here.dtype} {tuple(here.shape)}, right is {there.dtype} {tuple(there.shape)}"
    if here.dtype == torch.uint8:
        return None if torch.equal(here, there) else "in another state"
    here, there = here.double().flatten(), there.double().flatten()
    size = there.nan_to_num().abs().amax().clamp_min(1e-3) if len(there) else torch.tensor(1.0)
    off = (here - there).abs() / (there.abs() + size)
    off[here.isnan() & there.isnan() | (here == there)] = 0.0
    if not (off.nan_to_num(math.inf) > rtol).any():
        return None
    worst = int(off.nan_to_num(math.inf).argmax())
    return f"{float(here[worst]):.8g}, right is {float(there[worst]):.8g}"


@dataclass(frozen=True)
class Scenario:
    """A change between two steps.

    Args:
        name: What is changed or done.
        build: Makes a world.
        change: What the user does after two steps.
        back: What the user does after two more.
        guards: Which part of the shortened steps would go wrong unnoticed.
        not_for: Back ends that it says nothing about, each with the reason.
        tells: Whether the change shows in the numbers at all (otherwise it must not).
        fails: Whether a step fails after the change, in every back end alike.
        rtol: How closely numbers agree.
    """

    name: str
    build: Callable[[], World]
    change: Change
    back: Change | None = None
    guards: str = ""
    not_for: Mapping[str, str] = field(default_factory=dict)
    tells: bool = True
    fails: bool = False
    rtol: float = 1e-10

    def run(
        self, make: Callable[..., Any], *, ordinary: bool = False, changed: bool = True, **settings: Any
    ) -> list[dict[str, Any]]:
        """Take two steps, make the change, take two, take it back, take two, and return the log."""
        with fresh_start():
            world = self.build().start(make, ordinary=ordinary, **settings)
            try:
                for then in (self.change, self.back, None):
                    world.step()
                    world.step()
                    if then is not None and changed:
                        try:
                            then(world)
                        except (ValueError, TypeError, RuntimeError) as error:
                            world.log.append({"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
            finally:
                world.around = nullcontext
        return world.log


# ---- kinds of changes


def on(world: World) -> None:
    world.knobs.on = True


def off(world: World) -> None:
    world.knobs.on = False


def then_reseed(change: Change) -> Change:
    """Seed anew after steps that failed: how far one gets, and what it draws until then, is nobody's business."""

    def seeded(world: World) -> None:
        change(world)
        pyro.set_rng_seed(11)

    return seeded


def nothing(world: World) -> None:
    """Change nothing: what the world does at every step is enough."""


def assign(**settings: Any) -> Change:
    """Assign settings of the estimator."""

    def change(world: World) -> None:
        for name, value in settings.items():
            setattr(world.elbo, name, value)

    return change


def under(handler: Callable[[], Any]) -> Change:
    """Take steps under a handler from now on."""
    return lambda world: setattr(world, "around", handler)


def outside(world: World) -> None:
    world.around = nullcontext


def given(*args: Any, **kwargs: Any) -> Change:
    """Give other arguments; a callable makes its argument from the data."""

    def change(world: World) -> None:
        x, y = data()
        world.args = tuple(a(x, y) if callable(a) else a for a in args)
        world.kwargs = {name: a(x, y) if callable(a) else a for name, a in kwargs.items()}

    return change


def set_knob(**values: Any) -> Change:
    return lambda world: vars(world.knobs).update(values)


def stored(end: str) -> tuple[str, Any]:
    """Return the full name and the leaf of the first parameter whose name ends so."""
    return next((n, p) for n, p in pyro.get_param_store().named_parameters() if n.endswith(end))


def on_leaf(end: str, function: Callable[[Any], Any]) -> Change:
    def change(world: World) -> None:
        with torch.no_grad():
            function(stored(end)[1])

    return change


def on_module(function: Callable[[Any], Any], number: int = 0) -> Change:
    return lambda world: function(world.modules[number])


def knob_of(name: str, function: Callable[[Any], Any]) -> Change:
    return lambda world: function(getattr(world.knobs, name))


# ---- the models


def observe(x: Tensor, y: Any, mean: Tensor, scale: Any = 0.5) -> None:
    with pyro.plate("data", SIZE, subsample=torch.arange(len(x))):
        pyro.sample("obs", dist.Normal(mean, scale), obs=y)


def two_weights(knobs: Any = None) -> Tensor:
    return pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def product(x: Tensor, w: Tensor, knobs: Any = None) -> Tensor:
    return (x * w).sum(-1)


def regression(x: Tensor, y: Tensor) -> None:
    """A model that can be pickled."""
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    observe(x, y, product(x, two_weights()) + b)


def simple(law: ps.Perturbation | None = None, **settings: Any) -> World:
    return World(regression, law=law, **settings)


def by_hand(
    weights: Callable[..., Tensor] = two_weights,
    mean: Callable[..., Tensor] = product,
    kind: Callable[..., Any] = Knobs,
    **knobs: Any,
) -> Callable[[], World]:
    """Return a builder of a regression whose weights and mean may read knobs."""

    def build() -> World:
        turned = kind(**{k: v() if callable(v) else v for k, v in knobs.items()})

        def model(x: Tensor, y: Tensor) -> None:
            observe(x, y, mean(x, weights(turned), turned))

        generators = [g for g in vars(turned).values() if isinstance(g, torch.Generator | np.random.Generator)]
        return World(model, knobs=turned, generators=generators)

    return build


def free(function: Callable[..., Any], *first: Any, **first_named: Any) -> Callable[[], World]:
    """Return a builder around a model of its own arguments."""

    def build() -> World:
        world = World(function)
        given(*(first or data()), **first_named)(world)
        return world

    return build


def layers(*more: Callable[[], nn.Module], prior: Any = None) -> Callable[[], World]:
    """Return a builder of a Bayesian network; its modules are the network and the BayesianModule."""

    def build() -> World:
        net = nn.Sequential(nn.Linear(2, 3), *(make() for make in more), nn.Tanh(), nn.Linear(3, 1))
        knobs = Knobs(sigma=torch.tensor(1.0))
        bnn = ps.BayesianModule(net, prior(knobs) if prior else None)

        def model(x: Tensor, y: Tensor) -> None:
            observe(x, y, bnn(x).squeeze(-1))

        return World(model, modules=[net, bnn], knobs=knobs)

    return build


def around_module(make: Callable[[], nn.Module]) -> Callable[[], World]:
    def build() -> World:
        module = make()
        return World(module, modules=[module])

    return build


# ---- laws of one's own


class Own(ps.Perturbation):
    """A law whose radius is an attribute that can be set."""

    def __init__(self, rho: Any) -> None:
        self.rho = rho

    def noise(self, space: Any) -> Tensor:
        return self.rho * space.direction(space.zeros()) + 0.1 * space.gaussian()


@dataclass
class Unhashable(ps.Perturbation):
    rho: float

    def noise(self, space: Any) -> Tensor:
        return self.rho * space.direction(space.zeros())


class Nested(ps.Perturbation):
    """A law that keeps its radius in a dict."""

    def __init__(self) -> None:
        self.options = {"rho": 0.2}

    def noise(self, space: Any) -> Tensor:
        return self.options["rho"] * space.direction(space.zeros())


class Climbing(ps.Perturbation):
    """Climbs from what a space hands out, written in place or not."""

    def __init__(self, start: str, *, in_place: bool) -> None:
        self.start, self.in_place = start, in_place

    def noise(self, space: Any) -> Tensor:
        return getattr(self, self.start)(space)

    def zeros(self, space: Any) -> Tensor:
        e = space.zeros()
        for _ in range(2):
            step = 0.3 * space.direction(e)
            e = e.add_(step) if self.in_place else e + step
        return e

    def gaussian(self, space: Any) -> Tensor:
        z = space.gaussian()
        z = z.mul_(0.2) if self.in_place else z * 0.2
        return z + 0.3 * space.direction(z)

    def gradient(self, space: Any) -> Tensor:
        u = space.gradient(space.zeros())
        return u.mul_(1e-3) if self.in_place else u * 1e-3

    def loc_and_scale(self, space: Any) -> Tensor:
        loc, scale = space.loc_and_scale()
        size = loc.abs_().add_(0.1) if self.in_place else loc.abs() + 0.1
        return 0.1 * size / scale * space.direction(space.zeros())

    def groups(self, space: Any) -> Tensor:
        u = space.gradient(space.zeros())
        parts = space.groups(u)
        if self.in_place:
            for part in parts:
                part.mul_(1e-3)
            return u
        return space.join([part * 1e-3 for part in parts])


def climbing(start: str) -> Callable[[], World]:
    return lambda: World(regression, law=Climbing(start, in_place=True), plain_law=Climbing(start, in_place=False))


class OfClass(ps.Perturbation):
    """A law whose number is its class's."""

    rho = 0.2

    @classmethod
    def again(cls) -> "OfClass":
        cls.rho = 0.2
        return cls()

    def noise(self, space: Any) -> Tensor:
        return self.rho * space.direction(space.zeros())


class OfGlobal(ps.Perturbation):
    """A law whose number is a global."""

    @staticmethod
    def again() -> "OfGlobal":
        RADIUS["rho"] = 0.2
        return OfGlobal()

    def noise(self, space: Any) -> Tensor:
        return RADIUS["rho"] * space.direction(space.zeros())


RADIUS = {"rho": 0.2}


class InSlot(ps.Perturbation):
    """A law whose number is in a slot."""

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 0.2

    def noise(self, space: Any) -> Tensor:
        return self.size * space.direction(space.zeros())


class Counting(ps.Perturbation):
    """A law that counts its steps, and climbs less and less."""

    def __init__(self) -> None:
        self.steps = 0

    def noise(self, space: Any) -> Tensor:
        self.steps += 1
        return space.direction(space.zeros()) / self.steps


class Remembering(ps.Perturbation):
    """A law that keeps an average of its gradients, in place."""

    def __init__(self) -> None:
        self.average: Any = None
        self.seen: list[int] = []

    def noise(self, space: Any) -> Tensor:
        u = space.gradient(space.zeros())
        self.average = torch.zeros_like(u) if self.average is None else self.average
        self.seen.append(len(self.seen))
        return self.average.mul_(0.5).add_(u / (1e-9 + u.norm())).clone() / len(self.seen)


class Drawing(ps.Perturbation):
    """A law with a random stream of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def noise(self, space: Any) -> Tensor:
        e = space.direction(space.zeros())
        return e + 0.1 * torch.randn(e.shape, dtype=e.dtype, generator=self.generator)


def hidden_by_a_set() -> World:
    names: set[str] = set()
    return simple(settings={"hide": names.__contains__}, knobs=Knobs(names=names))


# ---- settings

NOT_FOR_MEAN = {"previous": "scale_gradient='mean' is for ascent='fresh'"}
ROWS_BY_PARTICLE = {"vectorised": "Pyro allows each site as many dimensions as the particles' plate takes"}
ONLY_COMPILED = dict.fromkeys(
    ("lean", "vectorised", "previous", "particles"), "a guide of one's own takes ordinary steps"
)
LIFTED = dict.fromkeys(("vectorised", "previous"), "a lifted parameter is a latent that the guide lacks")
NO_NORM = {"vectorised": "vmap cannot write running statistics"}

SETTINGS = [
    Scenario("law replaced", simple, assign(perturbation=ps.Adversarial(1.0)), assign(perturbation=ps.Gaussian())),
    Scenario("law replaced by one without gradient", simple, assign(perturbation=ps.Mean())),
    Scenario("rho annealed", simple, assign(perturbation=ps.MixSAM(1.5)), assign(perturbation=ps.MixSAM(0.1))),
    Scenario(
        "own law's attribute annealed",
        lambda: simple(Own(0.2)),
        lambda world: setattr(world.elbo.perturbation, "rho", 1.5),
    ),
    Scenario(
        "own law's tensor annealed in place",
        lambda: simple(Own(torch.tensor(0.2))),
        lambda world: world.elbo.perturbation.rho.mul_(5.0),
    ),
    Scenario(
        "own law's dict annealed",
        lambda: simple(Nested()),
        lambda world: world.elbo.perturbation.options.update(rho=1.5),
    ),
    Scenario(
        "unhashable law annealed",
        lambda: simple(Unhashable(0.2)),
        lambda world: setattr(world.elbo.perturbation, "rho", 1.5),
    ),
    Scenario("own law's class annealed", lambda: simple(OfClass.again()), lambda world: setattr(OfClass, "rho", 1.5)),
    Scenario(
        "a global that a law reads annealed", lambda: simple(OfGlobal.again()), lambda world: RADIUS.update(rho=1.5)
    ),
    Scenario("own law's slot annealed", lambda: simple(InSlot()), lambda world: setattr(world.law, "size", 1.5)),
    Scenario("own law that counts its steps", lambda: simple(Counting()), nothing, tells=False),
    Scenario("own law that remembers", lambda: simple(Remembering()), nothing, tells=False),
    Scenario("own law that draws by itself", lambda: simple(Drawing()), nothing, tells=False),
    Scenario("kl_weight annealed", simple, assign(kl_weight=0.25), assign(kl_weight=0.7)),
    Scenario("kl_weight zero and back", simple, assign(kl_weight=0.0), assign(kl_weight=1.0)),
    Scenario("kl_weight from zero", lambda: simple(settings={"kl_weight": 0.0}), assign(kl_weight=1.0)),
    Scenario("scope site", simple, assign(scope="site"), assign(scope="event")),
    Scenario(
        "scale_gradient mean",
        lambda: simple(ps.Adversarial(0.5)),
        assign(scale_gradient="mean"),
        assign(scale_gradient="perturbed"),
        not_for=NOT_FOR_MEAN,
    ),
    Scenario("hide a site", simple, assign(hide=frozenset({"b"})), assign(hide=frozenset())),
    Scenario("hide by a predicate", simple, assign(hide=lambda name: name == "w")),
    Scenario("hide by a predicate that changes", hidden_by_a_set, lambda world: world.knobs.names.add("b")),
    Scenario(
        "num_particles",
        simple,
        assign(num_particles=4),
        assign(num_particles=2),
        not_for={"vectorised": "Pyro fixes the plate of particles when the estimator is made"},
    ),
    Scenario(
        "mixture of laws",
        lambda: simple(ps.Mixture([ps.Gaussian(), ps.Adversarial(0.5)], [0.5, 0.5])),
        assign(perturbation=ps.Mixture([ps.Mean(), ps.MixSAM(0.5)], [0.3, 0.7])),
    ),
    Scenario("two ascents", lambda: simple(ps.Adversarial(0.5, steps=2)), assign(perturbation=ps.AscendedSample(0.5))),
]

# ---- handlers around the step


def observed_scale(x: Tensor, y: Tensor) -> None:
    """A model with an observed site that a handler can change."""
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0), obs=torch.tensor(0.5))
    observe(x, y, product(x, two_weights()), s)


def with_param(x: Tensor, y: Tensor) -> None:
    s = pyro.param("s", torch.tensor(0.7), constraint=constraints.positive)
    observe(x, y, product(x, two_weights()), s)


def of_scale() -> World:
    return World(observed_scale)


HANDLERS = [
    Scenario("scale around", simple, under(lambda: poutine.scale(scale=0.3)), outside),
    Scenario(
        "another scale around", simple, under(lambda: poutine.scale(scale=0.3)), under(lambda: poutine.scale(scale=2.0))
    ),
    Scenario("mask around", simple, under(lambda: poutine.mask(mask=False)), outside, tells=True),
    Scenario(
        "mask of rows around",
        simple,
        under(lambda: poutine.mask(mask=torch.arange(ROWS) < 6)),
        then_reseed(outside),
        not_for=ROWS_BY_PARTICLE,
        fails=True,
    ),
    Scenario("mask of one number around", simple, under(lambda: poutine.mask(mask=torch.tensor(False))), outside),
    Scenario(
        "condition an observed site", of_scale, under(lambda: poutine.condition(data={"s": torch.tensor(2.0)})), outside
    ),
    Scenario("condition the data", simple, under(lambda: poutine.condition(data={"obs": data()[1] + 1})), outside),
    Scenario(
        "condition a latent",
        simple,
        under(lambda: poutine.condition(data={"b": torch.tensor(0.4)})),
        then_reseed(outside),
        fails=True,
    ),
    Scenario("do", of_scale, under(lambda: poutine.do(data={"s": torch.tensor(2.0)})), outside),
    Scenario("uncondition", simple, under(poutine.uncondition), then_reseed(outside), fails=True),
    Scenario(
        "substitute a parameter",
        lambda: World(with_param),
        under(lambda: poutine.substitute(data={"s": torch.tensor(2.0)})),
        outside,
    ),
    Scenario(
        "lift a parameter",
        lambda: World(with_param),
        under(lambda: poutine.lift(prior={"s": dist.Delta(torch.tensor(2.0))})),
        outside,
        not_for=LIFTED,
    ),
    Scenario("block around", of_scale, under(lambda: poutine.block(hide=["w"])), outside, tells=False),
    Scenario("trace around", simple, under(lambda: poutine.trace(param_only=True)), outside, tells=False),
    Scenario("validation switched off", simple, under(lambda: pyro.validation_enabled(False)), outside, tells=False),
    Scenario("a handler of one's own around", of_scale, under(lambda: Warmer()), outside),
    Scenario("a scale around from the start", lambda: _under_scale(), outside),
]


class Warmer(poutine.messenger.Messenger):
    """Widens every Normal that is observed."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and isinstance(msg["fn"], dist.Normal):
            msg["fn"] = dist.Normal(msg["fn"].loc, 2 * msg["fn"].scale)


def _under_scale() -> World:
    world = simple(initialised=False)
    world.around = lambda: poutine.scale(scale=0.3)
    return world


# ---- parameters


def replace_in_store(world: World) -> None:
    name, leaf = stored("locs.w")
    pyro.get_param_store()[name] = leaf.detach() + 0.5


def load_store(world: World) -> None:
    store = pyro.get_param_store()
    state = pickle.loads(pickle.dumps(store.get_state()))
    world.step()
    store.set_state(state)


def forget_constraint(world: World) -> None:
    del pyro.get_param_store()["s"]
    world.knobs.on = True


def constrained(knobs: Any) -> Tensor:
    constraint = constraints.interval(0.0, 4.0) if knobs.on else constraints.positive
    return two_weights() * pyro.param("s", torch.tensor(0.5), constraint=constraint)


def shared_gradients() -> World:
    """A guide whose two parameters get the same gradient."""

    def guide(x: Tensor, y: Tensor) -> None:
        loc = pyro.param("base", torch.zeros(2)) + pyro.param("offset", torch.zeros(2))
        pyro.sample("w", dist.Normal(loc, 0.1).to_event(1))

    return World(lambda x, y: observe(x, y, product(x, two_weights())), guide=guide)


def tied() -> World:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    net[2].weight = net[0].weight
    bnn = ps.BayesianModule(net)
    return World(lambda x, y: observe(x, y, bnn(x).sum(-1)), modules=[net])


def new_storage(leaf: Any) -> None:
    leaf.data = leaf.data.clone() + 0.5


def twice(world: World) -> None:
    """Sum the gradients of two calls."""

    def take(world: World) -> float:
        return accumulate(world) + accumulate(world)

    world.take = take


PARAMETERS = [
    Scenario(
        "loc frozen and thawed",
        simple,
        on_leaf("locs.w", lambda p: p.requires_grad_(False)),
        on_leaf("locs.w", lambda p: p.requires_grad_()),
    ),
    Scenario(
        "scale frozen and thawed",
        simple,
        on_leaf("scales.b", lambda p: p.requires_grad_(False)),
        on_leaf("scales.b", lambda p: p.requires_grad_()),
    ),
    Scenario(
        "whole guide frozen and thawed",
        simple,
        lambda world: world.guide.requires_grad_(False),
        lambda world: world.guide.requires_grad_(),
    ),
    Scenario(
        "model's parameter frozen",
        lambda: World(with_param),
        on_leaf("s", lambda p: p.requires_grad_(False)),
        on_leaf("s", lambda p: p.requires_grad_()),
    ),
    Scenario("loc edited in place", simple, on_leaf("locs.w", lambda p: p.add_(0.5))),
    Scenario("scale edited in place", simple, on_leaf("scales.w", lambda p: p.mul_(0.5))),
    Scenario("loc edited through data", simple, on_leaf("locs.w", lambda p: p.data.add_(0.5))),
    Scenario("loc's data replaced", simple, on_leaf("locs.w", new_storage)),
    Scenario("loc replaced in the store", simple, replace_in_store),
    Scenario(
        "loc replaced in the guide", simple, lambda world: setattr(world.guide.locs, "w", nn.Parameter(torch.ones(2)))
    ),
    Scenario(
        "scale assigned in the guide", simple, lambda world: setattr(world.guide.scales, "w", torch.full((2,), 0.05))
    ),
    Scenario("store cleared", simple, lambda world: pyro.clear_param_store(), tells=False),
    Scenario("store loaded", simple, load_store),
    Scenario(
        "guide's state loaded",
        simple,
        lambda world: world.guide.load_state_dict({n: v + 0.1 for n, v in world.guide.state_dict().items()}),
    ),
    Scenario("learning rate changed", simple, lambda world: setattr(world, "lr", 5e-3)),
    Scenario(
        "a hook on a parameter", simple, on_leaf("locs.w", lambda p: p.register_hook(lambda g: g.clamp(-0.1, 0.1)))
    ),
    Scenario("model's constraint changed", by_hand(constrained), forget_constraint),
    Scenario("model's parameter edited", lambda: World(with_param), on_leaf("s", lambda p: p.add_(0.5))),
    Scenario("gradients shared, then summed", shared_gradients, twice, not_for=ONLY_COMPILED),
    Scenario("tied weights edited", tied, on_leaf("0.weight", lambda p: p.mul_(0.5))),
]

# ---- modules


class Reader(PyroModule):
    """A model that reads a number, a buffer and a function off itself."""

    beta = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(2))
        self.function: Any = torch.tanh
        self.options = {"shift": 0.0}

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.function(product(x * self.mask, two_weights()))
        with poutine.scale(scale=self.beta):
            observe(x, y, mean + self.options["shift"])


class Running(nn.Module):
    """Statistics that move at every step, by a method of any name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros(()))

    def train_on(self, x: Tensor, y: Tensor) -> None:
        self.count += 1
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        observe(x, y, product(x - self.mean, two_weights()))

    def forward(self, x: Tensor, y: Tensor) -> None:
        self.train_on(x, y)


def running(by_method: bool) -> Callable[[], World]:
    def build() -> World:
        module = Running()
        world = World(module.train_on if by_method else module, modules=[module])
        world.model_of = lambda: module.train_on if by_method else module
        return world

    return build


def plain_network() -> World:
    """A network of torch's own in the model, trained by its own optimiser."""
    net = nn.Linear(2, 1)

    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        observe(x, y, net(x).squeeze(-1) + b)

    return World(model, modules=[net])


def registered_network() -> World:
    """The same behind pyro.module."""
    net = nn.Linear(2, 1)

    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        observe(x, y, pyro.module("net", net)(x).squeeze(-1) + b)

    return World(model, modules=[net])


def hidden_weights() -> World:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    bnn = ps.BayesianModule(net, hide="0")
    return World(lambda x, y: observe(x, y, bnn(x).squeeze(-1)), modules=[net, bnn])


def other_net(activation: Callable[[], nn.Module]) -> Change:
    def change(world: World) -> None:
        with torch.random.fork_rng():
            world.modules[1].net = nn.Sequential(nn.Linear(2, 3), activation(), nn.Linear(3, 1))

    return change


def copied_net(world: World) -> None:
    world.modules[1].net = copy.deepcopy(world.modules[0])


def forward_hook(world: World) -> None:
    world.knobs.handle = world.modules[0][0].register_forward_hook(lambda module, args, output: 2 * output)


def dropout() -> nn.Module:
    return nn.Dropout(0.4)


def norm() -> nn.Module:
    return nn.BatchNorm1d(3)


def put(name: str, value: Any) -> Change:
    return on_module(lambda module: setattr(module, name, value))


MODULES = [
    Scenario(
        "dropout to eval and back",
        layers(dropout),
        on_module(lambda net: net.eval()),
        on_module(lambda net: net.train()),
    ),
    Scenario("dropout's rate", layers(dropout), on_module(lambda net: setattr(net[1], "p", 0.1))),
    Scenario(
        "batch norm to eval and back",
        layers(norm),
        on_module(lambda net: net.eval()),
        on_module(lambda net: net.train()),
        not_for=NO_NORM,
    ),
    Scenario(
        "batch norm's momentum", layers(norm), on_module(lambda net: setattr(net[1], "momentum", 0.5)), not_for=NO_NORM
    ),
    Scenario(
        "batch norm's statistics reset",
        layers(norm),
        on_module(lambda net: net[1].reset_running_stats()),
        not_for=NO_NORM,
    ),
    Scenario(
        "layer replaced",
        layers(),
        on_module(lambda net: net.__setitem__(1, nn.ReLU())),
        on_module(lambda net: net.__setitem__(1, nn.Softplus())),
    ),
    Scenario("layer appended", layers(), on_module(lambda net: net.append(nn.Tanh()))),
    Scenario("net replaced", layers(), other_net(nn.ReLU)),
    Scenario(
        "net replaced by one that looks the same",
        layers(),
        copied_net,
        tells=False,
    ),
    Scenario("network's own weights edited", layers(), on_module(lambda net: net[0].weight.data.mul_(2)), tells=True),
    Scenario("hidden weights edited", hidden_weights, on_module(lambda net: net[0].weight.data.mul_(2))),
    Scenario(
        "hidden weights frozen",
        hidden_weights,
        on_module(lambda net: net[0].requires_grad_(False)),
        on_module(lambda net: net[0].requires_grad_()),
    ),
    Scenario("forward hook", layers(), forward_hook, lambda world: world.knobs.handle.remove()),
    Scenario("number that the model reads", around_module(Reader), put("beta", 0.1), put("beta", 2.0)),
    Scenario("function that the model calls", around_module(Reader), put("function", torch.sin)),
    Scenario("dict that the model reads", around_module(Reader), on_module(lambda m: m.options.update(shift=0.5))),
    Scenario(
        "buffer replaced", around_module(Reader), on_module(lambda m: setattr(m, "mask", torch.tensor([1.0, 0.2])))
    ),
    Scenario("buffer edited", around_module(Reader), on_module(lambda m: m.mask.mul_(0.5))),
    Scenario("buffer edited through data", around_module(Reader), on_module(lambda m: m.mask.data.mul_(0.5))),
    Scenario("statistics in forward", running(by_method=False), on_module(lambda m: m.mean.zero_())),
    Scenario("statistics in a method", running(by_method=True), on_module(lambda m: m.mean.zero_())),
    Scenario("plain network trained", plain_network, on_module(lambda net: net.weight.data.mul_(0.5))),
    Scenario(
        "plain network frozen",
        plain_network,
        on_module(lambda net: net.requires_grad_(False)),
        on_module(lambda net: net.requires_grad_()),
    ),
    Scenario(
        "registered network frozen",
        registered_network,
        on_module(lambda net: net.requires_grad_(False)),
        on_module(lambda net: net.requires_grad_()),
    ),
    Scenario(
        "registered network's weight replaced",
        registered_network,
        on_module(lambda net: setattr(net, "weight", nn.Parameter(torch.ones(1, 2)))),
    ),
]

# ---- where a model looks its numbers up


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 0.5


class Inherited:
    scale = 0.5


class Heir(Inherited):
    def __init__(self) -> None:
        Inherited.scale = 0.5


class Behind:
    """A number behind a property and the like, in a place that the model itself does not name."""

    def __init__(self, name: str) -> None:
        self.name, PLACE["scale"] = name, 0.5

    @property
    def scale(self) -> float:
        return _looked_up()


PLACE = {"scale": 0.5}
NAMESPACE: Any = ModuleType("users_settings")
CONTEXT: ContextVar[float] = ContextVar("scale")


class Attributed(dict[str, Any]):
    """A dictionary with an attribute."""


def _looked_up() -> float:
    return PLACE["scale"]


def _with_attribute() -> Any:
    _looked_up.scale = 0.5  # type: ignore[attr-defined]
    return _looked_up


def _in_namespace() -> Any:
    NAMESPACE.scale = 0.5


def _in_context() -> Any:
    CONTEXT.set(0.5)


def _cached() -> Any:
    PLACE["scale"] = 0.5
    return lru_cache(_looked_up)


def _uncache(knobs: Any) -> None:
    PLACE["scale"] = 2.0
    knobs.cache_clear()


def _attributed() -> Any:
    made = Attributed()
    made.scale = 0.5
    return made


def reading(make: Callable[[], Any], scale: Callable[[Any], Any]) -> Callable[[], World]:
    """Return a builder of a regression that looks its noise up somewhere."""

    def build() -> World:
        knobs = make()

        def model(x: Tensor, y: Tensor) -> None:
            observe(x, y, product(x, two_weights()), scale(knobs))

        return World(model, knobs=knobs)

    return build


def turn(function: Callable[[Any], Any]) -> Change:
    return lambda world: function(world.knobs)


class Sampled(PyroModule):
    """A layer of Pyro's own kind, its weight a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](2, 1, bias=False)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

    def forward(self, x: Tensor, y: Tensor) -> None:
        observe(x, y, self.layer(x).squeeze(-1))


def other_sample(world: World) -> None:
    world.model.layer.weight = PyroSample(dist.Normal(0.5, 3.0).expand([1, 2]).to_event(2))  # type: ignore[attr-defined]


def learn_closed_over(world: World) -> None:
    world.knobs.requires_grad_()
    before = world.leaves
    world.leaves = lambda: {**before(), "closed over": world.knobs}  # type: ignore[method-assign]


def global_hook(world: World) -> None:
    def louder(module: nn.Module, args: Any, output: Any) -> Any:
        return 1.5 * output if isinstance(module, nn.Tanh) else None

    world.knobs.handle = register_module_forward_hook(louder)


LOOKED_UP = [
    Scenario("a slot", reading(Slotted, lambda k: k.scale), turn(lambda k: setattr(k, "scale", 2.0))),
    Scenario(
        "an attribute of a base class",
        reading(Heir, lambda k: k.scale),
        turn(lambda k: setattr(Inherited, "scale", 2.0)),
    ),
    Scenario(
        "a global behind a property",
        reading(lambda: Behind("property"), lambda k: k.scale),
        turn(lambda k: PLACE.update(scale=2.0)),
    ),
    Scenario(
        "an attribute of a function",
        reading(_with_attribute, lambda k: k.scale),
        turn(lambda k: setattr(k, "scale", 2.0)),
    ),
    Scenario(
        "a module of settings",
        reading(_in_namespace, lambda k: NAMESPACE.scale),
        turn(lambda k: setattr(NAMESPACE, "scale", 2.0)),
    ),
    Scenario(
        "a context variable", reading(_in_context, lambda k: CONTEXT.get()), turn(lambda k: CONTEXT.set(2.0) and None)
    ),
    Scenario("a function with a cache", reading(_cached, lambda k: k()), turn(_uncache)),
    Scenario(
        "a dictionary of the user's own kind",
        reading(_attributed, lambda k: k.scale),
        turn(lambda k: setattr(k, "scale", 2.0)),
    ),
    Scenario(
        "a UserDict",
        reading(lambda: UserDict(scale=0.5), lambda k: k["scale"]),
        turn(lambda k: k.update(scale=2.0)),
    ),
    Scenario(
        "a large array",
        reading(lambda: np.full(20_000, 0.5), lambda k: float(k.mean())),
        turn(lambda k: k.fill(2.0)),
    ),
    Scenario("a tensor that comes to require grad", reading(lambda: torch.tensor(0.5), lambda k: k), learn_closed_over),
    Scenario(
        "a PyroSample",
        lambda: World(Sampled()),
        other_sample,
        not_for={"vectorised": "torch's linear layer takes one weight"},
    ),
    Scenario("a hook of all modules", layers(), global_hook, lambda world: world.knobs.handle.remove()),
]

# ---- priors


def wide(like: Tensor) -> Tensor:
    """Return a scale per weight of a scale per particle."""
    return like.unsqueeze(-1).expand(*like.shape, 2)


def with_sigma(knobs: Any) -> Tensor:
    return pyro.sample("w", dist.Normal(torch.zeros(2), knobs.sigma).to_event(1))


def student_with_sigma(knobs: Any) -> Tensor:
    return pyro.sample("w", dist.StudentT(3.0, torch.zeros(2), knobs.sigma).to_event(1))


def under_a_scale(knobs: Any) -> Tensor:
    with poutine.scale(scale=0.1 if knobs.on else 1.0):
        return two_weights()


def under_a_mask(knobs: Any) -> Tensor:
    with poutine.mask(mask=not knobs.on):
        return two_weights()


def student_under(handler: Callable[[], Any]) -> Callable[..., Tensor]:
    def weights(knobs: Any) -> Tensor:
        with handler() if knobs.on else nullcontext():
            return pyro.sample("w", dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1))

    return weights


def hierarchy(link: Callable[[Tensor, Any], Tensor], prior: Callable[..., Any] = dist.Normal) -> Callable[..., Tensor]:
    """Return weights whose prior scale is a link of another latent."""

    def weights(knobs: Any) -> Tensor:
        tau = pyro.sample("log_tau", dist.Normal(0.0, 0.5)).exp()
        return pyro.sample("w", prior(torch.zeros(2), wide(link(tau, knobs))).to_event(1))

    return weights


def student(loc: Tensor, scale: Tensor) -> Any:
    return dist.StudentT(3.0, loc, scale)


def only_later(tau: Tensor, knobs: Any) -> Tensor:
    return tau if knobs.on else torch.ones_like(tau)


def fixed_first(tau: Tensor, knobs: Any) -> Tensor:
    fixed = pyro.param("fixed", torch.tensor(1.2), constraint=constraints.positive)
    return (tau if knobs.on else fixed.expand_as(tau)) * 1.0


def cut(tau: Tensor, knobs: Any) -> Tensor:
    return tau.detach() if knobs.on else tau


def cut_first(tau: Tensor, knobs: Any) -> Tensor:
    return tau.detach()


def other_family(knobs: Any) -> Tensor:
    prior = dist.Laplace if knobs.on else dist.Normal
    return pyro.sample("w", prior(torch.zeros(2), 1.0).to_event(1))


def other_student(knobs: Any) -> Tensor:
    prior = dist.StudentT(8.0 if knobs.on else 2.0, torch.zeros(2), 1.0)
    return pyro.sample("w", prior.to_event(1))


def other_loc(knobs: Any) -> Tensor:
    return pyro.sample("w", dist.Normal(torch.full((2,), 1.5 if knobs.on else 0.0), 1.0).to_event(1))


def with_more(knobs: Any) -> Tensor:
    w = two_weights()
    return w if knobs.on else w + pyro.sample("more", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def with_unknown(knobs: Any) -> Tensor:
    w = two_weights()
    return w + pyro.sample("unknown", dist.Normal(torch.zeros(2), 1.0).to_event(1)) if knobs.on else w


def with_a_factor(knobs: Any) -> Tensor:
    w = two_weights()
    if knobs.on:
        pyro.factor("penalty", -(w**2).sum(-1))
    return w


def learnt_prior(knobs: Any) -> Tensor:
    scale = pyro.param("prior scale", torch.tensor(1.0), constraint=constraints.positive)
    return pyro.sample("w", dist.Normal(torch.zeros(2), scale).to_event(1))


def positive_weights(knobs: Any) -> Tensor:
    return pyro.sample("w", dist.Gamma(torch.full((2,), 3.0 if knobs.on else 2.0), 1.0).to_event(1))


def whole_model_scaled() -> World:
    knobs = Knobs()

    def model(x: Tensor, y: Tensor) -> None:
        with poutine.scale(scale=0.2 if knobs.on else 1.0):
            regression(x, y)

    return World(model, knobs=knobs)


def replace_prior(prior: Any) -> Change:
    return lambda world: setattr(world.modules[1], "prior", prior)


PRIORS = [
    Scenario(
        "bnn.prior replaced", layers(), replace_prior(dist.Normal(0.0, 3.0)), replace_prior(dist.Normal(1.0, 0.5))
    ),
    Scenario("bnn.prior replaced by a heavy one", layers(), replace_prior(dist.StudentT(3.0, 0.0, 1.0))),
    Scenario(
        "bnn.prior's tensor annealed in place",
        layers(prior=lambda k: dist.Normal(torch.tensor(0.0), k.sigma)),
        knob_of("sigma", lambda s: s.mul_(3)),
    ),
    Scenario(
        "bnn.prior's tensor annealed through data",
        layers(prior=lambda k: dist.Normal(torch.tensor(0.0), k.sigma)),
        knob_of("sigma", lambda s: s.data.mul_(3)),
    ),
    Scenario(
        "bnn.prior a function that reads a tensor",
        layers(prior=lambda k: lambda name, p: dist.Normal(torch.tensor(0.0), k.sigma)),
        knob_of("sigma", lambda s: s.data.mul_(3)),
    ),
    Scenario(
        "prior's tensor annealed in place",
        by_hand(with_sigma, sigma=lambda: torch.ones(2)),
        knob_of("sigma", lambda s: s.mul_(3)),
        knob_of("sigma", lambda s: s.mul_(0.1)),
    ),
    Scenario(
        "prior's tensor annealed through data",
        by_hand(with_sigma, sigma=lambda: torch.ones(2)),
        knob_of("sigma", lambda s: s.data.mul_(3)),
        knob_of("sigma", lambda s: s.data.mul_(0.1)),
    ),
    Scenario(
        "prior's tensor replaced",
        by_hand(with_sigma, sigma=lambda: torch.ones(2)),
        set_knob(sigma=torch.full((2,), 3.0)),
    ),
    Scenario(
        "heavy prior's tensor annealed through data",
        by_hand(student_with_sigma, sigma=lambda: torch.ones(2)),
        knob_of("sigma", lambda s: s.data.mul_(3)),
    ),
    Scenario("prior's loc", by_hand(other_loc), on, off),
    Scenario("prior under scale", by_hand(under_a_scale), on, off, tells=False),
    Scenario("prior under mask", by_hand(under_a_mask), on, off, tells=False),
    Scenario("heavy prior under scale", by_hand(student_under(lambda: poutine.scale(scale=0.1))), on, off),
    Scenario("heavy prior under mask", by_hand(student_under(lambda: poutine.mask(mask=False))), on, off),
    Scenario(
        "heavy prior under scale always",
        by_hand(student_under(lambda: poutine.scale(scale=0.1)), on=True),
        nothing,
        tells=False,
    ),
    Scenario(
        "heavy prior under mask always",
        by_hand(student_under(lambda: poutine.mask(mask=False)), on=True),
        nothing,
        tells=False,
    ),
    Scenario("whole model scaled", whole_model_scaled, on, off),
    Scenario("prior depends on a latent", by_hand(hierarchy(lambda tau, knobs: tau)), nothing, tells=False),
    Scenario("prior depends on a latent later", by_hand(hierarchy(only_later)), on, off),
    Scenario("prior from a parameter to a latent", by_hand(hierarchy(fixed_first)), on, off),
    Scenario("heavy prior from a parameter to a latent", by_hand(hierarchy(fixed_first, student)), on, off),
    Scenario("prior on a detached latent", by_hand(hierarchy(cut_first)), nothing, tells=False),
    Scenario("heavy prior on a detached latent", by_hand(hierarchy(cut_first, student)), nothing, tells=False),
    Scenario("prior's latent detached later", by_hand(hierarchy(cut, student)), on, off),
    Scenario("namespace that the model reads", by_hand(other_loc, kind=SimpleNamespace, on=False), on, off),
    Scenario("prior's family", by_hand(other_family), on, off),
    Scenario("heavy prior's degrees of freedom", by_hand(other_student), on, off),
    Scenario("prior of positive weights", by_hand(positive_weights), on, off),
    Scenario("prior with a learnt scale edited", by_hand(learnt_prior), on_leaf("prior scale", lambda p: p.add_(0.5))),
    Scenario("a site left out this time", by_hand(with_more), on, off),
    Scenario("a site that the guide lacks", by_hand(with_unknown), on, then_reseed(off), fails=True),
    Scenario("a factor more", by_hand(with_a_factor), on, off),
]

# ---- arguments


@dataclass
class Batch:
    x: Tensor
    y: Tensor


def of_batch(batch: Any) -> None:
    regression(batch.x, batch.y)


def of_mapping(batch: Any) -> None:
    regression(batch["x"], batch["y"])


def of_arrays(x: Any, y: Any) -> None:
    regression(torch.tensor(x), torch.as_tensor(y))


def autoencoder(x: Tensor, target: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    observe(x, target, w * x)


def in_order(x: Tensor, y: Tensor, **more: float) -> None:
    shift = sum((place + 1) * value for place, value in enumerate(more.values()))
    observe(x, y, product(x, two_weights()) + shift)


def typed(x: Tensor, y: Tensor, scalar: Any) -> None:
    scale = {int: 0.5, float: 1.0, bool: 2.0}[type(scalar)]
    observe(x, y, product(x, two_weights()), scale)


def with_number(x: Tensor, y: Tensor, scale: Any = 0.5) -> None:
    observe(x, y, product(x, two_weights()), scale)


def signed(x: Tensor, y: Tensor, number: float) -> None:
    observe(x, y, product(x, two_weights()) * math.copysign(1.0, number))


def complete_rows(x: Tensor, y: Tensor) -> None:
    there = ~y.isnan()
    regression(x[there], y[there])


def pieces(x: Tensor, y: Tensor, lengths: Any) -> None:
    lengths = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    parts = [part.mean(-1) for part in product(x, two_weights()).split(lengths, dim=-1)]
    observe(y[:3], y[:3], torch.stack(parts, -1))


def weighted(x: Tensor, y: Tensor, weights: Tensor | None) -> None:
    w = two_weights()
    with poutine.scale(scale=1.0 if weights is None else weights):
        observe(x, y, product(x, w))


def weighted_all(x: Tensor, y: Tensor, weights: Tensor | None) -> None:
    with poutine.scale(scale=1.0 if weights is None else weights):
        regression(x, y)


def masked(x: Tensor, y: Tensor, there: Tensor) -> None:
    w = two_weights()
    with poutine.mask(mask=there):
        observe(x, y, product(x, w))


def by_value(x: Tensor, y: Tensor, threshold: Tensor) -> None:
    w = two_weights()
    observe(x, y, product(x, w) if threshold > 0 else -product(x, w))


def of_list(batch: list[Tensor]) -> None:
    regression(batch[0], batch[1])


def of_prior(x: Tensor, y: Tensor, prior: Any) -> None:
    observe(x, y, product(x, pyro.sample("w", prior)))


def subsampled(x: Tensor, y: Tensor) -> None:
    """The plate draws rows of its own."""
    w = two_weights()
    with pyro.plate("data", len(x), subsample_size=5) as rows:
        pyro.sample("obs", dist.Normal(product(x[rows], w), 0.5), obs=y[rows])


def gaussian(loc: float) -> Any:
    return dist.Normal(torch.full((2,), loc), 1.0).to_event(1)


def first(x: Tensor, y: Tensor) -> Tensor:
    return x


def second(x: Tensor, y: Tensor) -> Tensor:
    return y


def of_own_tensor() -> World:
    """The model's own buffer is an argument too."""
    module = Reader()

    def model(x: Tensor, y: Tensor, mask: Tensor) -> None:
        observe(x, y, product(x * mask, two_weights()) + module.mask.sum())

    return World(model, *data(), module.mask, modules=[module])


def features() -> World:
    """An encoder of the user's own is trained through an argument."""
    encoder = nn.Linear(2, 2)
    world = World(regression, modules=[encoder], settings={"retain_graph": True})
    world.args_of = lambda: (encoder(world.args[0]), world.args[1])
    return world


def learn_argument(world: World) -> None:
    world.args = world.args[0].clone().requires_grad_(), world.args[1]


def refill(world: World) -> None:
    for array in world.args:
        array += 1


ARGUMENTS = [
    Scenario(
        "other batch sizes",
        simple,
        given(lambda x, y: x[:7], lambda x, y: y[:7]),
        given(lambda x, y: x[3:8], lambda x, y: y[3:8]),
    ),
    Scenario("one row", simple, given(lambda x, y: x[:1], lambda x, y: y[:1]), given(first, second)),
    Scenario("other values", simple, given(lambda x, y: x + 1, second), given(first, lambda x, y: y + 1)),
    Scenario("values refilled", simple, lambda world: world.args[0].mul_(2)),
    Scenario("other dtype", simple, given(lambda x, y: x.float(), second), given(first, second)),
    Scenario("whole numbers", simple, given(lambda x, y: x.round().long(), second), given(first, second)),
    Scenario("transposed view", simple, given(lambda x, y: (x + 1).t().contiguous().t(), second)),
    Scenario("expanded view", simple, given(lambda x, y: x[:1].expand(ROWS, 2), second)),
    Scenario("broadcast shape", simple, given(lambda x, y: x[:, :1], second), given(first, second)),
    Scenario("subsampled by the plate", free(subsampled, first, second), given(lambda x, y: x[:9], lambda x, y: y[:9])),
    Scenario("arrays refilled", free(of_arrays, lambda x, y: x.numpy(), lambda x, y: y.numpy()), refill),
    Scenario(
        "arrays replaced",
        free(of_arrays, lambda x, y: x.numpy(), lambda x, y: y.numpy()),
        given(lambda x, y: x.numpy() + 1, lambda x, y: y.numpy()),
    ),
    Scenario(
        "object's attribute",
        free(of_batch, lambda x, y: Batch(x, y)),
        lambda world: setattr(world.args[0], "y", data()[1] + 1),
    ),
    Scenario(
        "object replaced",
        free(of_batch, lambda x, y: Batch(x, y)),
        given(lambda x, y: Batch(x + 1, y)),
        given(lambda x, y: Batch(x[:5], y[:5])),
    ),
    Scenario(
        "dict's item",
        free(of_mapping, lambda x, y: {"x": x, "y": y}),
        lambda world: world.args[0].update(y=data()[1] + 1),
    ),
    Scenario(
        "list's item", free(of_list, lambda x, y: [x, y]), lambda world: world.args[0].__setitem__(1, data()[1] + 1)
    ),
    Scenario(
        "a namespace",
        free(of_batch, lambda x, y: SimpleNamespace(x=x, y=y)),
        lambda world: setattr(world.args[0], "x", data()[0] + 1),
    ),
    Scenario(
        "one tensor twice, then two",
        lambda: World(autoencoder, *[data()[1]] * 2),
        given(lambda x, y: y + x[:, 0], second),
    ),
    Scenario(
        "two tensors, then one twice",
        free(autoencoder, lambda x, y: y + 1, second),
        lambda world: setattr(world, "args", (data()[1],) * 2),
    ),
    Scenario(
        "two views of one tensor",
        free(autoencoder, lambda x, y: x[:, 0], lambda x, y: x[:, 1]),
        given(lambda x, y: x[:, 1], lambda x, y: x[:, 1]),
    ),
    Scenario(
        "model's own tensor, then another",
        of_own_tensor,
        lambda world: setattr(world, "args", (*data(), torch.tensor([1.0, 0.2]))),
    ),
    Scenario("model's own tensor edited", of_own_tensor, on_module(lambda m: m.mask.mul_(0.5))),
    Scenario("argument requires grad", simple, learn_argument, given(first, second)),
    Scenario("argument from an encoder", features, on_module(lambda net: net.weight.data.mul_(0.5))),
    Scenario(
        "kwargs in another order", free(in_order, first, second, a=0.1, b=0.3), given(first, second, b=0.3, a=0.1)
    ),
    Scenario("positional, then by name", simple, given(x=lambda x, y: x + 1, y=second), given(first, second)),
    Scenario("1, 1.0, True", free(typed, first, second, 1), given(first, second, 1.0), given(first, second, True)),
    Scenario("True, 1", free(typed, first, second, True), given(first, second, 1)),
    Scenario("0.0, -0.0", free(signed, first, second, 0.0), given(first, second, -0.0)),
    Scenario(
        "a number's value",
        free(with_number, first, second, 0.5),
        given(first, second, 0.7),
        given(first, second, torch.tensor(0.9)),
    ),
    Scenario("default argument given", free(with_number, first, second), given(first, second, scale=0.9)),
    Scenario(
        "a mask that leaves other rows",
        free(complete_rows, first, lambda x, y: y.where(x[:, 0] > 0, math.nan)),
        given(first, lambda x, y: y.where(x[:, 1] > 0.5, math.nan)),
        given(first, second),
    ),
    Scenario(
        "lengths in a tensor",
        free(pieces, first, second, torch.tensor([4, 4, 4])),
        given(first, second, torch.tensor([1, 2, 9])),
    ),
    Scenario("lengths in a list", free(pieces, first, second, [4, 4, 4]), given(first, second, [1, 2, 9])),
    Scenario(
        "None, then a tensor",
        free(weighted, first, second, None),
        given(first, second, lambda x, y: y.abs()),
        given(first, second, None),
    ),
    Scenario(
        "weights of rows around all sites",
        free(weighted_all, first, second, None),
        given(first, second, lambda x, y: y.abs()),
        then_reseed(given(first, second, None)),
        not_for=ROWS_BY_PARTICLE,
        fails=True,
    ),
    Scenario(
        "mask of rows as an argument",
        free(masked, first, second, torch.arange(ROWS) < 6),
        given(first, second, torch.arange(ROWS) % 3 == 0),
    ),
    Scenario(
        "a branch on a tensor's value",
        free(by_value, first, second, torch.tensor(1.0)),
        given(first, second, torch.tensor(-1.0)),
    ),
    Scenario(
        "a distribution as an argument",
        free(of_prior, first, second, lambda x, y: gaussian(0.0)),
        given(first, second, lambda x, y: gaussian(1.0)),
    ),
    Scenario(
        "not a number in the data",
        simple,
        given(first, lambda x, y: y * math.nan),
        then_reseed(given(first, second)),
        fails=True,
    ),
]

# ---- devices and dtypes


def in_single() -> World:
    torch.set_default_dtype(torch.float32)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        observe(x, y, product(x, w))

    return World(model, *(each.float() for each in data()))


def single(world: World) -> None:
    world.guide.to(torch.float32)
    world.args = tuple(each.float() for each in data())


def double(world: World) -> None:
    world.guide.to(torch.float64)
    world.args = data()


def by_matrix(cast: bool) -> Callable[[], World]:
    def build() -> World:
        torch.set_default_dtype(torch.float32)

        def model(x: Tensor, y: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(torch.zeros(2, 1), 1.0).to_event(2))
            observe(x, y, (x @ w).squeeze(-1).double())

        world = World(model, data()[0].float(), data()[1])
        world.around = autocast if cast else nullcontext
        return world

    return build


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def change_default(dtype: torch.dtype) -> Change:
    return lambda world: torch.set_default_dtype(dtype)


def explicit(knobs: Any) -> Tensor:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    return w + torch.tensor([1e8, 1e8]).add(0.3).sub(1e8).double()  # lost in single precision


DTYPES = [
    Scenario("guide to double precision", in_single, double, single, rtol=1e-4),
    Scenario("autocast on", by_matrix(cast=False), under(autocast), outside, rtol=1e-3),
    Scenario("autocast off", by_matrix(cast=True), outside, under(autocast), rtol=1e-3),
    Scenario(
        "default dtype", by_hand(explicit), change_default(torch.float32), change_default(torch.float64), rtol=1e-9
    ),
]

# ---- random streams


def drawn(draw: Callable[[Any], Any]) -> Callable[..., Tensor]:
    """Return a mean with noise of a stream of the model's choice."""

    def mean(x: Tensor, w: Tensor, knobs: Any) -> Tensor:
        return product(x, w) + float(draw(knobs))

    return mean


def torch_noise(x: Tensor, w: Tensor, knobs: Any) -> Tensor:
    noise = torch.randn(len(x)) if knobs.on else torch.rand(len(x))
    return product(x, w) + 0.3 * noise


def from_generator(x: Tensor, w: Tensor, knobs: Any) -> Tensor:
    return product(x, w) + 0.3 * torch.randn(len(x), generator=knobs.generator)


def from_numpy(x: Tensor, w: Tensor, knobs: Any) -> Tensor:
    return product(x, w) + 0.3 * torch.as_tensor(knobs.generator.normal(size=len(x)))


class Attending(nn.Module):
    """Attention between the numbers of a row: torch's operation for it could draw, for dropout, and draws nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(-1).expand(-1, -1, 4)
        return self.inner(h, h, h, need_weights=False)[0].mean(-1)


DRAWS_OF: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli": lambda mean: mean + torch.bernoulli(torch.sigmoid(mean.detach())),
    "bernoulli_": lambda mean: mean + torch.empty_like(mean).bernoulli_(torch.sigmoid(mean.detach())),
    "poisson": lambda mean: mean + torch.poisson(mean.detach().exp()),
    "normal": lambda mean: mean + torch.normal(mean.detach(), 0.3),
    "gamma": lambda mean: mean + dist.Gamma(mean.exp(), 1.0).rsample(),
    "rrelu": lambda mean: nn.functional.rrelu(mean, training=True),
    "dropout in one operation": lambda mean: torch.native_dropout(mean, 0.4, True)[0],
}


def drawn_of(kind: str) -> Callable[..., Tensor]:
    """Return a mean with random numbers whose distribution depends on the weights."""
    return lambda x, w, knobs: DRAWS_OF[kind](product(x, w))


def reseed(world: World) -> None:
    pyro.set_rng_seed(11)


def late(draw: Callable[[], Any], guide: Any = None) -> Callable[[], World]:
    """Return a builder of a network whose model comes to draw from a stream that it left alone when it was met."""

    def build() -> World:
        knobs, net = Knobs(), nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        bnn = ps.BayesianModule(net)

        def model(x: Tensor, y: Tensor) -> None:
            mean = bnn(x).squeeze(-1)
            observe(x, y, mean * float(draw()) if knobs.on else mean)

        return World(model, modules=[net, bnn], knobs=knobs, guide=guide and guide(model))

    return build


def numpy_normal() -> float:
    return np.random.normal(1.0)  # noqa: NPY002  # the global stream is meant; it keeps half a pair


def on_within_a_pair(world: World) -> None:
    numpy_normal()
    on(world)


STREAMS = [
    Scenario("torch's stream reseeded", by_hand(mean=torch_noise), reseed),
    Scenario("model draws otherwise", by_hand(mean=torch_noise), on, off),
    Scenario("NumPy's stream reseeded", by_hand(mean=drawn(lambda k: np.random.normal())), reseed),  # noqa: NPY002
    Scenario("Python's stream reseeded", by_hand(mean=drawn(lambda k: random.gauss(0, 1))), reseed),
    Scenario(
        "torch generator of one's own reseeded",
        by_hand(mean=from_generator, generator=lambda: torch.Generator().manual_seed(4)),
        knob_of("generator", lambda g: g.manual_seed(9)),
    ),
    Scenario(
        "NumPy generator of one's own advanced",
        by_hand(mean=from_numpy, generator=lambda: np.random.default_rng(4)),
        knob_of("generator", lambda g: g.normal()),
    ),
    Scenario(
        "namespace that holds a generator",
        by_hand(mean=from_generator, kind=SimpleNamespace, generator=lambda: torch.Generator().manual_seed(4)),
        knob_of("generator", lambda g: g.manual_seed(9)),
    ),
    Scenario("model comes to draw from NumPy's stream", late(numpy_normal), on, off),
    Scenario("model comes to draw half a pair from NumPy's stream", late(numpy_normal), on_within_a_pair, off),
    Scenario("model comes to draw from Python's stream", late(lambda: random.gauss(1.0, 1.0)), on, off),
    Scenario("model of an autoguide comes to draw from NumPy's stream", late(numpy_normal, AutoNormal), on, off),
    Scenario("attention", layers(Attending), reseed),
    *(Scenario(f"{kind} of what the weights give", by_hand(mean=drawn_of(kind)), reseed) for kind in DRAWS_OF),
    Scenario("dropout reseeded", layers(dropout), reseed),
    Scenario("a stream drawn from in between", layers(dropout), lambda world: torch.rand(3)),
]

# ---- writing in place


def doubled(x: Tensor, w: Tensor, knobs: Any) -> Tensor:
    if knobs.on:
        w *= 2
    return product(x, w)


def always_doubled(x: Tensor, w: Tensor, knobs: Any) -> Tensor:
    w *= 2
    return product(x, w)


def shifted_data(x: Tensor, w: Tensor, knobs: Any) -> Tensor:
    if knobs.on:
        w.data.add_(0.25)
    return product(x, w)


def always_shifted_data(x: Tensor, w: Tensor, knobs: Any) -> Tensor:
    w.data.add_(0.25)
    return product(x, w)


def embedding(max_norm: float | None) -> Callable[[], World]:
    def build() -> World:
        net = nn.Sequential(nn.Embedding(4, 2, max_norm=max_norm), nn.Linear(2, 1))
        bnn = ps.BayesianModule(net)

        def model(words: Tensor, y: Tensor) -> None:
            observe(words, y, bnn(words).squeeze(-1))

        return World(model, torch.arange(ROWS) % 4, data()[1], modules=[net])

    return build


IN_PLACE = [
    Scenario("model doubles its sample", by_hand(mean=doubled), on, off),
    Scenario("model always doubles its sample", by_hand(mean=always_doubled), nothing, tells=False),
    Scenario("model shifts its sample's data", by_hand(mean=shifted_data), on, off),
    Scenario("model always shifts its sample's data", by_hand(mean=always_shifted_data), nothing, tells=False),
    Scenario("embedding that renormalises", embedding(0.3), nothing, tells=False),
    Scenario(
        "embedding that renormalises later", embedding(None), on_module(lambda net: setattr(net[0], "max_norm", 0.3))
    ),
    *(
        Scenario(f"law writes to {start}", climbing(start), nothing, tells=False)
        for start in ("zeros", "gaussian", "gradient", "loc_and_scale", "groups")
    ),
]

# ---- between steps, and copies


def other_regression(x: Tensor, y: Tensor) -> None:
    regression(x + 1, y)


def evaluate_other(world: World) -> None:
    world.log.append({"other": world.elbo.loss(other_regression, world.guide, *world.args)})


def without_grad(world: World) -> None:
    with torch.no_grad():
        world.evaluate()


def in_inference_mode(world: World) -> None:
    with torch.inference_mode():
        world.evaluate()


def predict(world: World) -> None:
    found = ps.predict(predictive, world.guide, world.args[0], num_samples=3)
    world.log.append({"prediction": found.mean})


def predictive(x: Tensor, y: Tensor | None = None) -> None:
    regression(x, y)  # type: ignore[arg-type]


def call_guide(world: World) -> None:
    world.log.append({f"drawn {n}": v.detach() for n, v in world.guide(*world.args).items()})


def run_model(world: World) -> None:
    poutine.trace(world.model_of()).get_trace(*world.args)


def other_pair(world: World) -> None:
    """Train another guide of the same model with the same estimator."""
    other = ps.MeanFieldNormal(world.model, init_scale=0.2)
    other._pyro_name = "other"
    for _ in range(2):
        world.elbo.loss_and_grads(world.model, other, *world.args)


def copied(*names: str, by: Callable[[Any], Any] = copy.deepcopy) -> Change:
    def change(world: World) -> None:
        copies = by(tuple(getattr(world, name) for name in names))
        for name, value in zip(names, copies, strict=True):
            setattr(world, name, value)

    return change


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def reload_state(world: World) -> None:
    state = world.elbo.state_dict()
    world.step()
    world.elbo.load_state_dict(state)


def in_thread(world: World) -> None:
    thread = threading.Thread(target=world.step)
    thread.start()
    thread.join()


def failing(x: Tensor, w: Tensor, knobs: Any) -> Tensor:
    knobs.runs = getattr(knobs, "runs", 0) + 1
    if knobs.on:
        raise KeyError("in the middle")
    return product(x, w)


def fail_once(world: World) -> None:
    world.knobs.on = True
    world.step()
    world.knobs.on = False
    reseed(world)  # how far a step gets before it fails is nobody's business


def fail_in_second_pass(world: World) -> None:
    """Fail where the ascent is over: the second run of the model."""
    runs = itertools.count()
    inner = world.model

    def model(*args: Any) -> None:
        if next(runs) == 1:
            raise KeyError("in the second pass")
        inner(*args)

    with suppress(KeyError):
        world.elbo.loss_and_grads(model, world.guide, *world.args)
    for leaf in world.leaves().values():
        leaf.grad = None
    reseed(world)


def bound() -> World:
    """A model that is a method, a new object at every access."""

    class Owner:
        shift = 0.0

        def model(self, x: Tensor, y: Tensor) -> None:
            regression(x + self.shift, y)

    owner = Owner()
    world = World(owner.model, knobs=Knobs(owner=owner))
    world.model_of = lambda: owner.model
    return world


def differentiable(world: World) -> float:
    loss = world.elbo.differentiable_loss(world.model_of(), world.guide, *world.args_of(), **world.kwargs)
    (0.5 * loss).backward()
    return float(loss)


def differentiable_twice(world: World) -> float:
    """Form two losses first and take the gradient of a function of both."""
    one, two = (
        world.elbo.differentiable_loss(world.model_of(), world.guide, *world.args_of(), **world.kwargs)
        for _ in range(2)
    )
    (0.5 * one + 0.01 * two**2).backward()
    return float(one + two)


def module_loss(world: World) -> float:
    loss = world.elbo(world.model_of(), world.guide)(*world.args_of(), **world.kwargs)
    loss.backward()
    return float(loss)


def taken(take: Callable[[World], float]) -> Change:
    return lambda world: setattr(world, "take", take)


BETWEEN = [
    Scenario("evaluated", simple, World.evaluate, World.evaluate),
    Scenario("evaluated on fewer rows", simple, lambda world: world.evaluate(*(each[:5] for each in data()))),
    Scenario("evaluated without gradients", simple, without_grad, in_inference_mode),
    Scenario("network evaluated", layers(norm, dropout), World.evaluate, without_grad, not_for=NO_NORM),
    Scenario("another model evaluated", simple, evaluate_other, evaluate_other),
    Scenario("predicted", simple, predict, predict),
    Scenario("guide called", simple, call_guide),
    Scenario("model run", layers(norm, dropout), run_model, not_for=NO_NORM),
    Scenario("another guide trained", simple, other_pair),
    Scenario("guide not yet initialised", lambda: simple(initialised=False), nothing, tells=False),
    Scenario("elbo copied", simple, copied("elbo"), tells=False),
    Scenario("guide copied", simple, copied("guide"), tells=False),
    Scenario("elbo and guide copied", simple, copied("elbo", "guide"), tells=False),
    Scenario("elbo pickled", simple, copied("elbo", by=through_pickle), tells=False),
    Scenario("elbo, guide and model pickled", simple, copied("elbo", "guide", "model", by=through_pickle), tells=False),
    Scenario("estimator's state loaded", simple, reload_state),
    Scenario("a step in another thread", simple, in_thread),
    Scenario("a step that fails", by_hand(mean=failing), fail_once, fail_once, fails=True),
    Scenario("a step that fails in its second pass", simple, fail_in_second_pass, fail_in_second_pass),
    Scenario("a method as the model", bound, lambda world: setattr(world.knobs.owner, "shift", 0.5)),
    Scenario("gradients of two calls", layers(dropout), twice, taken(accumulate)),
    Scenario("differentiable loss", simple, taken(differentiable), taken(accumulate)),
    Scenario("two differentiable losses", simple, taken(differentiable_twice), taken(differentiable)),
    Scenario("Pyro's ELBOModule", simple, taken(module_loss), taken(accumulate), tells=False),
]

GUARDED = {
    "a step reads the estimator's settings and its law anew": SETTINGS,
    "handlers around a step reach its sites": HANDLERS,
    "parameters are looked up, frozen and given gradients as in an ordinary step": PARAMETERS,
    "a module's layers, buffers, modes, hooks and attributes are those of now": MODULES,
    "what the model looks up anywhere is what is there now": LOOKED_UP,
    "priors are those of this run: scaled, masked, of this family, on these latents": PRIORS,
    "arguments are told apart by type, value, layout and identity": ARGUMENTS,
    "precision and autocast are those of now": DTYPES,
    "passes share their draws, and leave every stream where an ordinary step does": STREAMS,
    "what a law or a model writes to is its own": IN_PLACE,
    "what happens between steps leaves them alone": BETWEEN,
}
SCENARIOS = [replace(each, guards=each.guards or why) for why, group in GUARDED.items() for each in group]
