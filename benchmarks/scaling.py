"""How the time of an adversarial step grows with the network, the number of sites, of particles, and the batch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from benchmarks.contenders import joint_adam, sam
from benchmarks.measure import WARM_UP, Step, Timing, interleaved
from benchmarks.problems import Problem, classification, mlp


@dataclass(frozen=True)
class Sweep:
    """Timings along one size.

    Args:
        name: What grows.
        timings: By size.
    """

    name: str
    timings: Mapping[int, Timing]

    @property
    def slope(self) -> float:
        """Slope of the logarithm of time against the logarithm of size, by least squares: 1 is proportional growth."""
        sizes, times = zip(*((size, timing.median) for size, timing in self.timings.items()), strict=True)
        return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def _step(problem: Problem, particles: int = 1, vectorize: bool = False) -> Step:
    settings = {"num_particles": particles, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    step = sam(joint_adam, "Adversarial", **settings)(problem)
    for _ in range(WARM_UP):
        step()
    return step


def _of_parameters(parameters: int, device: torch.device) -> Step:
    # 64 w + w² + 10 w weights of an MLP 64-w-w-10
    width = round(-37 + math.sqrt(37**2 + parameters))
    return _step(classification(mlp(64, width, width, 10), 32, 64, device=device))


def _of_sites(sites: int, device: torch.device) -> Step:
    # a weight and a bias a layer; bounded, since perturbations would grow through 100 layers of ReLU
    net = mlp(*[16] * (sites // 2), 10, activation=nn.Tanh)
    return _step(classification(net, 32, 16, device=device))


def _of_batch(batch: int, device: torch.device) -> Step:
    return _step(classification(mlp(784, 64, 64, 10), batch, 784, device=device))


def _of_particles(vectorize: bool) -> Callable[[int, torch.device], Step]:
    def make(particles: int, device: torch.device) -> Step:
        return _step(classification(mlp(784, 64, 64, 10), 128, 784, device=device), particles, vectorize)

    return make


LOOPED, VECTORISED = "particles, looped", "particles, vectorised"

SWEEPS: dict[str, tuple[tuple[int, ...], Callable[[int, torch.device], Step]]] = {
    "parameters": ((10_000, 100_000, 1_000_000, 10_000_000), _of_parameters),
    "sites": ((4, 10, 20, 50, 100, 200), _of_sites),
    LOOPED: ((1, 2, 4, 8, 16, 32), _of_particles(False)),
    VECTORISED: ((1, 2, 4, 8, 16, 32), _of_particles(True)),
    "batch": ((16, 64, 256, 1024, 4096), _of_batch),
}


def sweep(name: str, rounds: int, device: torch.device) -> Sweep:
    """Time one sweep, all its sizes in every round."""
    sizes, make = SWEEPS[name]
    timings = interleaved({str(size): make(size, device) for size in sizes}, rounds, device)
    return Sweep(name, {size: timings[str(size)] for size in sizes})
