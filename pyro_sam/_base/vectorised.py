"""Run a network once with weights of its own, or for all particles of a vectorised estimator at once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_sam._base.recurrent import RecurrentByRow

# what Pyro's ELBOs, Predictive, ReweightedWakeSleep and SMCFilter call the plate of their particles
PARTICLE_PLATES = frozenset(
    {"num_particles_vectorized", "_num_predictive_samples", "num_sleep_particles_vectorized", "particles"}
)


class ParticlePlate(Messenger):
    """Reads off the sites inside it which plate is around them.

    Attributes:
        dim: Distance of the plate from the right, so 2 for a plate at dimension -2; 0 where there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dim = 0

    def _pyro_post_sample(self, msg: Any) -> None:
        plates = [frame for frame in msg["cond_indep_stack"] if frame.vectorized]
        self.dim = max((-plate.dim for plate in plates), default=0)
        for plate in plates:
            inside_data = plate.dim == -1 and plate.name not in PARTICLE_PLATES
            if inside_data or (plate.size > 1 and -plate.dim < self.dim):
                raise ValueError(
                    f"BayesianModule was called inside the plate '{plate.name}' (dim={plate.dim}), which would give"
                    f" each of its {plate.size} elements its own network. Call the module before you enter the plate."
                )


def no_checkpointing() -> AbstractContextManager[None]:
    """Refuse checkpointing: it would run layers again in the backward pass, by then with the network's own weights."""
    return disable_saved_tensors_hooks(
        "Activation checkpointing (torch.utils.checkpoint) and other hooks on saved tensors do not work in or around a "
        "BayesianModule: the second run would not see the sampled weights. Switch them off."
    )


def run(net: nn.Module, weights: Mapping[str, Tensor], plate_dim: int, args: Any, kwargs: Any) -> Any:
    """Return the network's output with ``weights`` in place of its parameters, which are not written to.

    Args:
        net: The network.
        weights: A value for every parameter: of its shape, or with dimensions to the left of it, at most one of which
            (the particles') is larger than 1.
        plate_dim: Distance of the particles' plate from the right; 0 for none.
        args: Positional arguments of the network, shared by all particles.
        kwargs: Keyword arguments of the network, shared by all particles.
    Returns:
        The network's output. If a weight has dimensions to the left, every tensor in it gets the particles' dimension
        at the left, and dimensions of size 1 next to it until its own first dimension is at distance 1 in the batch.
    Raises:
        ValueError: If a weight has another shape, or the network cannot run for several particles at once.
        RuntimeError: If activation checkpointing is active.
    """
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    leading = {name: _leading_shape(name, weight.shape, shapes[name]) for name, weight in weights.items()}

    def call(one: dict[str, Tensor]) -> Any:
        return functional_call(net, one, args, kwargs)

    with no_checkpointing():
        if not any(leading.values()):
            return call(dict(weights))
        _check_buffers(net)
        size = _num_particles(leading)
        mapped = {name for name, shape in leading.items() if shape and shape.numel() == size}
        flat = {
            name: weight.reshape((size, *shapes[name]) if name in mapped else shapes[name])
            for name, weight in weights.items()
        }
        dim = max(plate_dim, *(_distance(shape) for shape in leading.values()))
        with mappable(net.modules()):
            return _run_each(call, flat, mapped, size, dim - 2)


def _leading_shape(name: str, shape: torch.Size, own: torch.Size) -> torch.Size:
    split = len(shape) - len(own)
    if split < 0 or shape[split:] != own:
        raise ValueError(
            f"Site '{name}' has a value of shape {tuple(shape)}, the network's parameter has shape {tuple(own)}: the "
            "value may have more dimensions to the left, but no others."
        )
    if sum(n > 1 for n in shape[:split]) > 1:
        raise ValueError(
            f"Site '{name}' has the dimensions {tuple(shape[:split])} to the left of its parameter's {tuple(own)}; only"
            " one of them, the particles', may be larger than 1. Call the module outside of all other plates."
        )
    return shape[:split]


def _num_particles(leading: Mapping[str, torch.Size]) -> int:
    sizes = {name: shape.numel() for name, shape in leading.items() if shape.numel() != 1}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The weights differ in their numbers of particles, {sizes}: give all of them the same.")
    return next(iter(sizes.values()), 1)


def _distance(leading: torch.Size) -> int:
    larger = [i for i, n in enumerate(leading) if n > 1]
    return len(leading) - (larger[0] if larger else 0)


def _check_buffers(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if module.training and getattr(module, "running_mean", None) is not None:
            raise ValueError(
                f"{type(module).__name__} '{name}' cannot keep running statistics of several particles at once. Put it"
                " in eval mode, build it with track_running_stats=False, or do without vectorize_particles (or"
                " Predictive's parallel)."
            )


def _run_each(
    call: Callable[[dict[str, Tensor]], Any],
    weights: dict[str, Tensor],
    mapped: set[str],
    size: int,
    singletons: int,
) -> Any:
    structure: list[Any] = []

    def tensors(one: dict[str, Tensor]) -> list[Tensor]:
        leaves, spec = tree_flatten(call(one))
        structure[:] = leaves, spec
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    with _named_limits():
        in_dims = ({name: 0 if name in mapped else None for name in weights},)
        outputs = iter(vmap(tensors, in_dims=in_dims, randomness="different")(weights))
    leaves, spec = structure
    index = (slice(None), *[None] * singletons)
    return tree_unflatten([next(outputs)[index] if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


@contextmanager
def mappable(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep torch from kernels that ``torch.func.vmap`` cannot map, where modules have such ones."""
    recurrent = any(isinstance(module, nn.RNNBase | nn.RNNCellBase) for module in modules)
    with _no_fused_attention(), RecurrentByRow() if recurrent else nullcontext():
        yield


@contextmanager
def _no_fused_attention() -> Iterator[None]:
    # under vmap a weight does not tell that it requires grad, so torch would choose a kernel that has no gradient
    switch = getattr(torch.backends, "mha", None)  # torch 2.1 lacks it
    before = switch is None or switch.get_fastpath_enabled()
    try:
        if switch is not None:
            switch.set_fastpath_enabled(False)
        yield
    finally:
        if switch is not None:
            switch.set_fastpath_enabled(before)


def unmapped() -> AbstractContextManager[Any]:
    """Run the body outside of a map over replicas, if there is one: what it draws is shared by all."""
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    return temporarily_pop_interpreter_stack() if inside else nullcontext()


@contextmanager
def _named_limits() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "vmap" in str(error) or "atching rule" in str(error):
            raise ValueError(
                "torch cannot run this network for several particles at once; do without vectorize_particles (or "
                f"Predictive's parallel). Its reason: {str(error).splitlines()[0]}"
            ) from error
        raise
