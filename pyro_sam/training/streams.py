"""Random streams of a training run, as plain values that a checkpoint can hold, and looks that leave no trace."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.random_state import RandomState, Streams, set_state_of, state_of
from pyro_sam._base.surroundings import Surroundings


def random_states(own: Sequence[Any] = ()) -> dict[str, Any]:
    """Return the states of the random streams of torch, CUDA, numpy and Python, and of others, as plain values.

    Args:
        own: Random streams of a model's own.
    """
    torch_state = RandomState.capture()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # models may draw from the global stream
    return {
        "torch": torch_state.cpu,
        "cuda": list(torch_state.cuda),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
        "own": [_plain(state_of(stream)) for stream in own],
    }


def restore_random_states(states: dict[str, Any], own: Sequence[Any] = ()) -> None:
    """Put all random streams into states that :func:`random_states` returned; ``own`` are those of the same model."""
    cuda = states["cuda"] if torch.cuda.is_available() else []
    RandomState(states["torch"], tuple(cuda)).restore()
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    for stream, state in zip(own, states.get("own", ()), strict=False):  # an older version kept none
        set_state_of(stream, _unplain(state))


def own_streams(model: Any, guide: Any) -> list[Any]:
    """Return the random streams that model and guide can see, such as a generator in a closure."""
    return Surroundings(model, guide).generators


@contextmanager
def untouched(model: Any, guide: Any, others: Sequence[Any] = ()) -> Iterator[None]:
    """Leave random streams and buffers as they were, those that the model draws from or writes to by itself too.

    Args:
        model: The model.
        guide: The guide.
        others: More random streams.
    """
    seen = Surroundings(model, guide)
    now = RandomState.capture(Streams(own=(*seen.generators, *others)))
    try:
        with kept_buffers(seen.modules):
            yield
    finally:
        now.restore()


_ARRAY = "array of"


def _plain(state: Any) -> Any:
    """Return a state of which only plain values and tensors are left."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    if isinstance(state, np.ndarray):
        return {_ARRAY: state.dtype.str, "values": state.tolist()}
    return state.item() if isinstance(state, np.generic) else state


def _unplain(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    if _ARRAY in state:
        return np.array(state["values"], state[_ARRAY])
    return {name: _unplain(value) for name, value in state.items()}
