"""Other libraries' step for the same networks, where they are installed: what a user could take instead.

They compute related, not equal, things: mean-field VI with one gradient a step (SAM: two, and no posterior). Adam or
the method's own optimiser is left at the library's defaults, save for the learning rate.
"""

import copy
import importlib
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.contenders import Contender
from benchmarks.handwritten import INIT_SCALE, LEARNING_RATE
from benchmarks.measure import Step
from benchmarks.problems import Problem


def _load(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside of them
        return importlib.import_module(name)


def ivon(problem: Problem) -> Step:
    """Return a step of IVON (Shen et al. 2024): natural-gradient VI that takes the place of the optimiser."""
    net = copy.deepcopy(problem.net)
    optimizer = _load("ivon").IVON(net.parameters(), lr=LEARNING_RATE, ess=problem.size, weight_decay=1 / problem.size)

    def step() -> float:
        with optimizer.sampled_params(train=True):
            loss = problem.nll(net(problem.x), problem.y) / problem.size
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _with_adam(net: nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def bayesian_torch(problem: Problem) -> Step:
    """Return a step of Bayesian-Torch's reparameterised layers."""
    module = _load("bayesian_torch.models.dnn_to_bnn")
    net = copy.deepcopy(problem.net)
    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.9}
    module.dnn_to_bnn(net, {**settings, "type": "Reparameterization", "moped_enable": False})
    net.to(problem.x.device)
    return _with_adam(net, lambda: problem.nll(net(problem.x), problem.y) + module.get_kl_loss(net))


def torchbnn(problem: Problem) -> Step:
    """Return a step of torchbnn's layers; it has linear and convolutional ones."""
    library = _load("torchbnn")

    def bayesian(layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Linear):
            return library.BayesLinear(0.0, 1.0, layer.in_features, layer.out_features, bias=layer.bias is not None)
        if isinstance(layer, nn.Conv2d):
            sizes = layer.in_channels, layer.out_channels, layer.kernel_size[0]
            return library.BayesConv2d(0.0, 1.0, *sizes, stride=layer.stride, padding=layer.padding)
        if any(True for _ in layer.parameters()):
            raise NotImplementedError(f"torchbnn has no {type(layer).__name__}")
        return copy.deepcopy(layer)

    layers = problem.net if isinstance(problem.net, nn.Sequential) else [problem.net]
    net = nn.Sequential(*map(bayesian, layers)).to(problem.x.device)
    kl = library.BKLLoss(reduction="sum")
    return _with_adam(net, lambda: problem.nll(net(problem.x), problem.y) + kl(net).sum())


def posteriors(problem: Problem) -> Step:
    """Return a step of posteriors' diagonal VI."""
    diagonal, torchopt = _load("posteriors.vi.diag"), _load("torchopt")

    def log_posterior(weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        prior = sum((-0.5 * weight**2).sum() for weight in weights.values())
        output = functional_call(problem.net, weights, (x,))
        return prior - problem.nll(output, y), torch.tensor([])

    weights = {name: p.detach().clone() for name, p in problem.net.named_parameters()}
    start = torch.tensor(INIT_SCALE, device=problem.x.device).log().item()
    transform = diagonal.build(log_posterior, torchopt.adam(lr=LEARNING_RATE), init_log_sds=start)
    state = transform.init(weights)

    def step() -> float:
        nonlocal state
        state, _ = transform.update(state, (problem.x, problem.y))
        return float(state.nelbo)

    return step


def sam(problem: Problem) -> Step:
    """Return a step of pytorch_optimizer's SAM around Adam: two gradients of a plain network."""
    net = copy.deepcopy(problem.net)
    optimizer = _load("pytorch_optimizer").SAM(net.parameters(), torch.optim.Adam, lr=LEARNING_RATE)

    def loss() -> Tensor:
        return problem.nll(net(problem.x), problem.y) / problem.size

    def closure() -> Tensor:
        value = loss()
        value.backward()
        return value

    def step() -> float:
        value = closure()
        optimizer.step(closure)
        optimizer.zero_grad()
        return value.item()

    return step


# by the name of the distribution: the package to import, and the contender
PEERS: dict[str, tuple[str, Contender]] = {
    "ivon-opt": ("ivon", ivon),
    "bayesian-torch": ("bayesian_torch", bayesian_torch),
    "torchbnn": ("torchbnn", torchbnn),
    "posteriors": ("posteriors", posteriors),
    "pytorch_optimizer": ("pytorch_optimizer", sam),
}


def peers() -> tuple[dict[str, Contender], list[str]]:
    """Return the peers that are installed, by name, and the names of those that are not."""
    there = {name: entry for name, entry in PEERS.items() if find_spec(entry[0]) is not None}
    return {f"peer {name}": contender for name, (_, contender) in there.items()}, [n for n in PEERS if n not in there]
