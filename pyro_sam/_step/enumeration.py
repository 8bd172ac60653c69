r"""Discrete latent sites of the model that are summed out of its likelihood, as in ``TraceEnum_ELBO``.

.. math:: -\log p(x \mid w) = -\log \sum_z p(z \mid w) \, p(x \mid z, w)

These are the sites marked ``infer={"enumerate": "parallel"}``, for example by :func:`pyro.infer.config_enumerate`,
that the guide does not sample. Pyro's handler gives each a dimension of its own, Pyro's contraction sums over it.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from pyro import poutine
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.random_state import RandomState
from pyro_sam._step.call import Call


class EnumerableSite(Exception):
    """A run without enumeration has met a site that is to be summed out."""


def is_marked(msg: Any) -> bool:
    """Return whether a message is of a site to be summed out, unless the guide samples it."""
    if msg["type"] != "sample" or msg["is_observed"] or not msg["infer"]:
        return False
    exact = msg["infer"].get("enumerate") == "parallel" and msg["infer"].get("num_samples") is None
    return exact and getattr(msg["fn"], "has_enumerate_support", False)


def is_enumerated(site: Any) -> bool:
    """Return whether a traced site has all values of its support, along a dimension of its own."""
    return (site["infer"] or {}).get("_enumerate_dim") is not None


class Enumeration:
    """Traces a model, with enumeration from the first run on that meets a marked site."""

    def __init__(self) -> None:
        self._first_dim: int | None = None

    def trace(self, call: Call, first_dim: Callable[[], int]) -> Trace:
        """Return the model's trace.

        Args:
            call: The model and its arguments; the guide's values are replayed around it.
            first_dim: Finds the first dimension left of all plates.
        """
        if self._first_dim is None:
            start = RandomState.capture(call.streams)
            try:
                with kept_buffers(call.modules, on_error_only=True):
                    return poutine.trace(call.model).get_trace(*call.args, **call.kwargs)
            except EnumerableSite:
                start.restore()
                self._first_dim = first_dim()
        with EnumMessenger(self._first_dim):
            return poutine.trace(call.model).get_trace(*call.args, **call.kwargs)


def marginal_log_prob(model: Trace) -> Tensor | float:
    """Return the log probability of all observed sites, with the enumerated sites summed out, scaled and masked.

    A latent site of the guide whose prior depends on an enumerated site is part of the sum.

    Raises:
        ValueError: If sites that are summed over together differ in their scale.
    """
    trace: Any = _relevant(model)
    plates = {name: _plates(trace, site) for name, site in trace.nodes.items()}
    enumerated = [site for site in trace.nodes.values() if is_enumerated(site)]
    sum_dims: set[str] = set().union(*(site["packed"]["log_prob"]._pyro_dims for site in enumerated))
    sum_dims -= frozenset().union(*plates.values())
    total: Tensor | float = 0.0
    factors: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
    scales = []
    for name, site in trace.nodes.items():
        terms = site["packed"]
        if sum_dims.isdisjoint(terms["log_prob"]._pyro_dims):
            total = total + terms["log_prob"].sum()
            continue
        # the mask belongs inside of the sum, the scale outside
        mask = None if is_enumerated(site) else terms["mask"]
        factors.setdefault(plates[name], []).append(packed.scale_and_mask(terms["unscaled_log_prob"], mask=mask))
        scales.append(site["scale"])
    marginals = contract_tensor_tree(factors, sum_dims)
    marginal: Any = sum(term.sum() for terms in marginals.values() for term in terms)
    return total + _common(scales) * marginal


def enumerated_dims(model: Trace) -> list[int]:
    """Return the dimensions of the enumerated sites, counted from the right."""
    sites: list[Any] = [site for site in model.nodes.values() if site["type"] == "sample" and is_enumerated(site)]
    return [site["infer"]["_enumerate_dim"] for site in sites]


def depends_on(site: Any, dims: Sequence[int]) -> bool:
    """Return whether a site's distribution depends on the value of a site enumerated along one of ``dims``."""
    shape = getattr(site["fn"], "batch_shape", ())
    return any(size > 1 for size in shape[: len(shape) + 1 + max(dims)]) if dims else False


def _relevant(model: Trace) -> Trace:
    trace: Any = Trace()
    site: Any
    dims = enumerated_dims(model)
    for name, site in model.nodes.items():
        if site["type"] == "sample" and (site["is_observed"] or is_enumerated(site) or depends_on(site, dims)):
            # copies: Pyro writes its symbols into them
            trace.nodes[name] = {**site, "infer": dict(site["infer"])}
    trace.compute_log_prob()
    trace.pack_tensors()
    return trace


def _plates(trace: Any, site: Any) -> frozenset[str]:
    return frozenset(trace.plate_to_symbol[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized)


def _common(scales: Sequence[Any]) -> Any:
    first, *others = scales
    if any(isinstance(scale, Tensor) and scale.dim() for scale in scales):
        raise ValueError("poutine.scale must be a number at and below enumerated sites, got a tensor with dimensions.")
    if any(scale is not first and float(scale) != float(first) for scale in others):
        found = ", ".join(sorted({f"{float(scale):g}" for scale in scales}))
        raise ValueError(
            "Enumerated sites and all sites that depend on them must share one scale (of poutine.scale and of "
            f"subsampling plates), got {found}. Put them into the same plates."
        )
    return first
