"""What a run is known by: its sites, their distributions and plates, with or without sizes."""

from collections.abc import Hashable, Iterable
from typing import Any

from pyro.poutine import Trace

from pyro_sam._base.vectorised import PARTICLE_PLATES


def signature(trace: Trace) -> Hashable:
    """Return what must change for a new look at a trace: sites, their distributions' kinds and shapes, and plates."""
    return signature_of_sites(trace.nodes.values())


def signature_of_sites(sites: Iterable[Any]) -> Hashable:
    """Return the same of some sites."""
    return tuple((*_kind(site), _sizes(site)) for site in _samples(sites))


def kind(trace: Trace) -> Hashable:
    """Return a trace's signature without sizes, which differ from batch to batch."""
    return kind_of_sites(trace.nodes.values())


def kind_of_sites(sites: Iterable[Any]) -> tuple[tuple[Hashable, ...], ...]:
    """Return the same of some sites, an entry each that begins with the site's name."""
    return tuple(map(_kind, _samples(sites)))


def _samples(sites: Iterable[Any]) -> Iterable[Any]:
    return (site for site in sites if site["type"] == "sample" and hasattr(site["fn"], "batch_shape"))


def _kind(site: Any) -> tuple[Hashable, ...]:
    fn, kinds = site["fn"], []
    while fn is not None:
        kinds.append(type(fn))
        fn = getattr(fn, "base_dist", None)
    frames = tuple((f.name, f.dim) for f in site["cond_indep_stack"] if f.name not in PARTICLE_PLATES)
    return site["name"], site["is_observed"], tuple(kinds), frames


def _sizes(site: Any) -> Hashable:
    fn = site["fn"]
    shapes = [getattr(site[name], "shape", None) for name in ("value", "mask", "scale")]  # log_prob has all of them
    return *shapes, fn.batch_shape, fn.event_shape, site["cond_indep_stack"]
