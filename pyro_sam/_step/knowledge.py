"""What is found out once about a model and a guide: that they fit together, and what in the KL depends on the noise."""

import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_sam._flat.known import Known
from pyro_sam._step.enumeration import Enumeration, depends_on, enumerated_dims
from pyro_sam._step.loss import kl_loss, latent_sites, prior_log_prob
from pyro_sam._step.sites import NoiseSite

if TYPE_CHECKING:
    from pyro_sam._step.passes import GuideRun


@dataclass(frozen=True)
class Dependence:
    """Whether the KL, and the parameters of the priors, depend on the noise of the guide's sites."""

    kl: bool
    prior: bool


@dataclass
class Pair:
    """What is known of one model and one guide, by :func:`signature`. It keeps both alive, so that ids stay theirs."""

    model: Any
    guide: Any
    valid: set[Hashable] = field(default_factory=set)
    dependence: dict[Hashable, Dependence] = field(default_factory=dict)
    ends: dict[Hashable, bool] = field(default_factory=dict)
    enumeration: Enumeration = field(default_factory=Enumeration)
    plate_sizes: dict[str, int] = field(default_factory=dict)
    known: Known = field(default_factory=Known)

    def noise_ends_at_sites(self, run: "GuideRun", at: Callable[[Mapping[str, Tensor]], "GuideRun"]) -> bool:
        """Return whether only the values of the guide's Gaussian sites depend on the noise, as far as is known.

        Args:
            run: A run of the guide.
            at: Runs the guide at other noise, by site; used to find out.
        """
        if run.signature not in self.ends:
            if not run.tracked:
                return False
            elsewhere = at({name: site.noise + 1 for name, site in run.sites.items()})
            self.ends[run.signature] = _noise_ends_there(run.trace, elsewhere.trace, run.sites)
        return self.ends[run.signature]


class Structures:
    """The pairs of model and guide that an estimator has met lately."""

    LIMIT = 8

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, int], Pair] = {}

    def of(self, model: Callable[..., Any], guide: Callable[..., Any]) -> Pair:
        """Return what is known of ``model`` and ``guide``."""
        key = id(model), id(guide)
        if key not in self._pairs:
            if len(self._pairs) >= self.LIMIT:
                del self._pairs[next(iter(self._pairs))]
            self._pairs[key] = Pair(model, guide)
        return self._pairs[key]


def signature(trace: Trace) -> Hashable:
    """Return what must change for a new look at a trace: sites, their distributions' kinds and shapes, and plates.

    A distribution's kind has in it which operation each of its parameters came from, so that a prior whose parameter
    becomes another latent's value is met as a new one.
    """
    kept: Any = vars(trace)
    if "signature" not in kept:  # a trace is made anew at each run
        kept["signature"] = signature_of_sites(trace.nodes)
    return kept["signature"]


def signature_of_sites(sites: Mapping[str, Any]) -> tuple[tuple[Hashable, ...], ...]:
    """Return the signature of some sites, an entry each that begins with the site's name."""
    return tuple(
        (name, site["is_observed"], _shape(site), _kind(site["fn"]), site["cond_indep_stack"])
        for name, site in sites.items()
        if site["type"] == "sample" and hasattr(site["fn"], "batch_shape")
    )


def _shape(site: Any) -> Hashable:
    return getattr(site["value"], "shape", None)


def _kind(fn: Any) -> Hashable:
    kinds: list[Any] = [fn.batch_shape, type(fn), fn.event_shape]
    while (base := getattr(fn, "base_dist", None)) is not None:
        fn = base
        kinds += type(fn), fn.event_shape
    kinds.extend(type(value.grad_fn) for value in vars(fn).values() if isinstance(value, Tensor))
    return tuple(kinds)


def validate(guide: Trace, model: Trace, max_plate_nesting: float) -> None:
    """Check that sites and shapes of guide and model match, by Pyro's own rules.

    Raises:
        ValueError: If they do not.
    """
    if not is_validation_enabled():
        return
    nesting: Any = max_plate_nesting  # Pyro's annotation forgets infinity
    check_model_guide_match(model, guide, nesting)
    _warn_of_order(guide, model)
    for trace in map(prune_subsample_sites, (guide, model)):
        trace.compute_log_prob()
        for site in trace.nodes.values():
            if site["type"] == "sample":
                check_site_shape(site, nesting)


def refuse_enumerated_priors(model: Trace) -> None:
    """Refuse latents whose prior depends on an enumerated site: likelihood and KL are then one term.

    Raises:
        ValueError: If there is one.
    """
    dims = enumerated_dims(model)
    for name, site in latent_sites(model).items():
        if depends_on(site, dims):
            raise ValueError(
                f"the prior of latent site '{name}' depends on a site that is summed out, so that KL and likelihood "
                "are one term; only Gaussian() with kl_weight=1 can do that. Write the prior as a mixture, for "
                "example dist.MixtureSameFamily."
            )


def _warn_of_order(guide: Trace, model: Trace) -> None:
    latents = latent_sites(model)
    in_guide = [name for name in guide.nodes if name in latents]
    if in_guide != list(latents):
        warnings.warn(
            f"The guide samples its sites in the order {in_guide}, the model in the order {list(latents)}. A closed "
            "form KL is right only if a site's parents in the model are not its descendants in the guide; use the "
            "model's order in the guide to be sure.",
            stacklevel=2,
        )


def dependence(guide: Trace, model: Trace, noise: Sequence[Tensor]) -> Dependence:
    """Find out from the graph of a run with the noise as its leaves."""
    kl, prior = kl_loss(guide, model), prior_log_prob(guide, model)
    return Dependence(kl=_reach([kl], noise), prior=_reach([prior], noise))


def _noise_ends_there(guide: Trace, elsewhere: Trace, sites: Mapping[str, NoiseSite]) -> bool:
    """Find out whether nothing in a guide but the values of its Gaussian sites depends on the noise.

    Args:
        guide: Trace of a run with the noise as its leaves: the graph shows what depends on it.
        elsewhere: Trace of a run at other noise: a changed value shows what depends on it behind the graph's back.
        sites: The Gaussian sites of the first.
    """
    here, there = _besides(guide, sites), _besides(elsewhere, sites)
    if _reach(here, [site.noise for site in sites.values()]) or len(here) != len(there):
        return False
    return all(a.is_meta or torch.equal(a, b) for a, b in zip(here, there, strict=True))


def _besides(guide: Trace, sites: Collection[str]) -> list[Tensor]:
    """Return the parameters of all distributions, and the values of all sites but ``sites``."""
    found = []
    for name, node in guide.nodes.items():
        if node["type"] == "sample":
            found += _tensors(node["fn"])
            if name not in sites and isinstance(node["value"], Tensor):
                found.append(node["value"])
    return found


def _tensors(fn: Any) -> list[Tensor]:
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


def _reach(values: Sequence[Any], noise: Sequence[Tensor]) -> bool:
    """Return whether the graph of any of ``values`` has one of the leaves ``noise`` in it."""
    leaves = {id(leaf) for leaf in noise}
    tensors = [value for value in values if isinstance(value, Tensor)]
    if any(id(tensor) in leaves for tensor in tensors):
        return True
    todo, seen = [tensor.grad_fn for tensor in tensors], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in leaves:  # the graph's end at a leaf
            return True
        todo += [following for following, _ in node.next_functions]
    return False
