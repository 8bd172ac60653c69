"""Who takes part: hand-written loops, Pyro's own estimators, and SAM_ELBO with each law and kind of optimiser."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.optim
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_sam as ps
from benchmarks.handwritten import INIT_SCALE, LEARNING_RATE, HandWritten
from benchmarks.measure import Step
from benchmarks.problems import Problem

Contender = Callable[[Problem], Step]

LAWS: dict[str, ps.Perturbation] = {
    "Gaussian": ps.Gaussian(),
    "Adversarial": ps.Adversarial(rho=1.0),
    "MixSAM": ps.MixSAM(rho=1.0),
    "Mixture": ps.Mixture((ps.Adversarial(rho=1.0), ps.Gaussian()), (0.5, 0.5)),
}

_numbers = itertools.count(1)


def make_guide(kind: type, problem: Problem) -> Any:
    """Return a guide that starts at the network's weights, with parameters that it shares with no other contender.

    The param store knows an autoguide by the name of its class, so each gets a class.
    """
    own = type(f"{kind.__name__}{next(_numbers)}", (kind,), {})
    return own(problem.model, init_scale=INIT_SCALE, init_loc_fn=ps.nn.init_to_module(problem.bnn))


def pyro_adam() -> Any:
    """Return Pyro's Adam: one torch optimiser per parameter."""
    return pyro.optim.Adam({"lr": LEARNING_RATE})


def joint_adam() -> Any:
    """Return one Adam for all parameters."""
    return ps.optim.JointOptim(torch.optim.Adam, {"lr": LEARNING_RATE})


def under_svi(problem: Problem, loss: Callable[[], Any], guide: type, optimizer: Callable[[], Any]) -> Step:
    """Return the step of Pyro's SVI."""
    svi = SVI(problem.model, make_guide(guide, problem), optimizer(), loss())
    return lambda: svi.step(problem.x, problem.y)


def as_module(problem: Problem, law: ps.Perturbation) -> Step:
    """Return the step of Pyro's ELBOModule under torch's Adam."""
    guide = make_guide(ps.MeanFieldNormal, problem).initialize(problem.x, problem.y)
    elbo = ps.SAM_ELBO(law)(problem.model, guide)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> float:
        loss = elbo(problem.x, problem.y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def by_hand(problem: Problem, law: Any, flat: bool) -> Step:
    """Return the step of a hand-written loop."""
    return HandWritten(problem, law, flat=flat).step


def sam(optimizer: Callable[[], Any], law: str, **settings: Any) -> Contender:
    """Return SAM_ELBO under SVI."""
    return partial(
        under_svi, loss=partial(ps.SAM_ELBO, LAWS[law], **settings), guide=ps.MeanFieldNormal, optimizer=optimizer
    )


def contenders() -> dict[str, Contender]:
    """Return all contenders but the peers, by name."""
    entries: dict[str, Contender] = {}
    for law in ("adversarial", "gaussian"):
        entries[f"hand-written {law}, flat"] = partial(by_hand, law=law, flat=True)
        entries[f"hand-written {law}, per tensor"] = partial(by_hand, law=law, flat=False)
    entries["Trace_ELBO, AutoNormal"] = partial(under_svi, loss=Trace_ELBO, guide=AutoNormal, optimizer=pyro_adam)
    entries["TraceMeanField_ELBO, MeanFieldNormal"] = partial(
        under_svi, loss=TraceMeanField_ELBO, guide=ps.MeanFieldNormal, optimizer=pyro_adam
    )
    for name, law in LAWS.items():
        entries[f"{name}, Pyro Adam"] = sam(pyro_adam, name)
        entries[f"{name}, JointOptim"] = sam(joint_adam, name)
        entries[f"{name}, ELBOModule"] = partial(as_module, law=law)
    entries["Adversarial previous, JointOptim"] = sam(joint_adam, "Adversarial", ascent="previous")
    for name in ("Adversarial", "Gaussian"):
        entries[f"{name} compiled, JointOptim"] = sam(joint_adam, name, compile=True)
    return entries
