"""Which site of a model observes a batch, what it observes, and how the model is called without it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Run = Callable[..., Trace]


@dataclass(frozen=True)
class Observation:
    """What a model observes of a batch.

    Args:
        site: Name of the observed site.
        value: The observations.
        args: Arguments to predict with: None in the place of the observations, if the model can do without.
    """

    site: str
    value: Tensor
    args: tuple[Any, ...]


def observation(runs: Iterable[Run], args: tuple[Any, ...], wanted: str | None) -> Observation:
    """Return what a model observes of a batch.

    Args:
        runs: Ways to run the model and trace it; the first that does not fail is taken.
        args: Arguments with the observations.
        wanted: Name of the observed site; None for the only one there is, or ``"obs"``.
    Raises:
        ValueError: If the model does not observe that site, or others.
        Exception: What the last way fails with, if all fail.
    """
    # a plate may be smaller than the batch while the observations are given; few rows tell where they are
    run, shown, trace = _first(runs, [args, _few(args)])
    site, value = _observed(trace, wanted)
    place = next((i for i, arg in enumerate(shown) if arg is value), None)
    if place is not None:
        without = tuple(None if i == place else arg for i, arg in enumerate(args))
        if can_run([run], without):
            return Observation(site, args[place], without)
    if shown is not args:
        run(*args)  # fails
    return Observation(site, value, args)


def _first(runs: Iterable[Run], choices: list[tuple[Any, ...]]) -> tuple[Run, tuple[Any, ...], Trace]:
    failure: Exception = ValueError("there is no way to run the model")
    for run in runs:
        for args in choices:
            try:
                return run, args, run(*args)
            except Exception as error:  # whatever a model may raise
                failure = error
    raise failure


def can_run(runs: Iterable[Run], args: tuple[Any, ...]) -> bool:
    """Return whether a way to run the model does not fail with these arguments, or with few rows of them."""
    try:
        _first(runs, [args, _few(args)])
    except Exception:  # whatever a model may raise
        return False
    return True


def _few(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the first rows of the arguments that have as many as the first tensor."""
    rows = next((len(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim()), 0)

    def few(leaf: Any) -> Any:
        return leaf[:2] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows else leaf

    found: tuple[Any, ...] = tree_map(few, args)
    return found


def _observed(trace: Trace, wanted: str | None) -> tuple[str, Tensor]:
    """Return name and value of the observed site."""
    sites: dict[str, Any] = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    observed = [name for name, site in sites.items() if site["is_observed"] and not site_is_subsample(site)]
    name = wanted or (observed[0] if len(observed) == 1 else "obs")
    if name not in observed:
        raise ValueError(
            f"validation must hold observations, as the training batches do: with its first batch the model observes "
            f"{', '.join(observed) or 'nothing'}, and is to observe one site, or one of name {name!r}. A tuple is one "
            "batch, such as (x, y); a list holds batches."
        )
    shape = sites[name]["fn"].shape()
    value: Tensor = sites[name]["value"]
    return name, value if value.shape == shape else value.expand(shape)
