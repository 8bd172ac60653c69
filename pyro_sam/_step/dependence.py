"""What in a step depends on the noise, seen in the graph of a run and in what changes at other noise."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_sam._step.loss import latent_sites


def reaches(values: Iterable[Any], goals: Sequence[Any]) -> bool:
    """Return whether the graph of any of ``values`` leads through one of ``goals``: leaves, or nodes of the graph."""
    leaves = {id(goal) for goal in goals if isinstance(goal, Tensor)}
    nodes = {goal for goal in goals if not isinstance(goal, Tensor)}
    tensors = [value for value in values if isinstance(value, Tensor)]
    if any(id(tensor) in leaves for tensor in tensors):
        return True
    # at its ends a graph has leaves
    return any(node in nodes or id(getattr(node, "variable", None)) in leaves for node in graph_of(tensors))


def graph_of(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Go through the nodes of the graph that some tensors come from, each once."""
    todo: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo += [following for following, _ in node.next_functions]


def prior_parameters(model: Trace) -> list[Tensor]:
    """Return the tensors that the priors of a model's latents are made of."""
    return [tensor for site in latent_sites(model).values() for tensor in tensors_of(site["fn"])]


def besides(guide: Trace, sites: Collection[str]) -> list[Tensor]:
    """Return the parameters of all distributions of a guide, and the values of all its sites but ``sites``."""
    found = []
    for name, node in guide.nodes.items():
        if node["type"] == "sample":
            found += tensors_of(node["fn"])
            if name not in sites and isinstance(node["value"], Tensor):
                found.append(node["value"])
    return found


def are_equal(here: Sequence[Any], there: Sequence[Any]) -> bool:
    """Return whether two runs gave the same; tensors without values are taken to be."""
    return len(here) == len(there) and all(map(_equal, here, there))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and (a.is_meta or torch.equal(a, b))
    return bool(a == b)


def tensors_of(fn: Any) -> list[Tensor]:
    """Return the tensors that a distribution, the ones inside it and their transforms hold."""
    found, seen, todo = [], set(), [fn]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, list | tuple):
            todo += item
        elif isinstance(item, Distribution | Transform) and id(item) not in seen:
            seen.add(id(item))
            # a transform's cache holds the last value that went through it, not what it is made of
            todo += [value for name, value in vars(item).items() if not name.startswith("_cached")]
    return found
