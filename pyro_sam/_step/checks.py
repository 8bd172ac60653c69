"""Torch's checks of distribution arguments and observations, all in one tensor, so that a step waits for it once.

Torch checks every argument of every distribution as it is made, and waits for the device each time. Here the same
conditions are collected from the traces of a finished run; the caller reads them together with the loss.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints
from torch.distributions.utils import lazy_property

from pyro_sam._flat.recorder import Recorder

_INTEGERS = constraints.integer_interval(0, 1)
_NAN_SHOWS = (dist.Normal, dist.Laplace, dist.StudentT, dist.Categorical, dist.Bernoulli)
_TRUSTED: weakref.WeakSet[Distribution] = weakref.WeakSet()


def enabled() -> bool:
    """Return whether distributions check their arguments unless told otherwise."""
    return bool(Distribution._validate_args)


@contextmanager
def postponed() -> Iterator[None]:
    """Keep distributions made in the body from checking themselves."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def trust(fn: Any) -> Any:
    """Return ``fn``, which needs no check: its arguments are right by how they are made, or were looked at before."""
    _TRUSTED.add(fn)
    return fn


def conditions(*traces: Trace | Recorder) -> Tensor | None:
    """Return whether all that torch would have checked holds, as a scalar on the device; None if it asked nothing.

    Distributions that are made once are looked at once. One that was made with ``validate_args=False`` is looked at all
    the same: torch hands that setting on to every expanded copy, so it says nothing about the user's wish.
    """
    found = [
        condition
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site_is_subsample(site)
        for condition in _of_site(site)
        if not condition.is_meta
    ]
    if not found:
        return None
    device = found[0].device
    if len(found) == 1:
        return found[0].all()
    return torch.stack([condition.all().to(device) for condition in found]).all()


def _of_site(site: Any) -> Iterator[Tensor]:
    fn = site["fn"]
    support = _support(fn)
    nan_shows = _nan_shows(site)
    if not _is_real(support) or (site["is_observed"] and not nan_shows):
        yield from _holds(support, site["value"])
    while isinstance(fn, Distribution):
        if site["is_observed"]:  # most likely made anew at each run
            yield from _arguments(fn, nan_shows=nan_shows)
        elif fn not in _TRUSTED:
            trust(fn)
            yield from _arguments(fn, nan_shows=nan_shows)
        fn = getattr(fn, "base_dist", None)


def _nan_shows(site: Any) -> bool:
    """Return whether a NaN in a site's values or arguments makes its log probability NaN, and so the loss."""
    fn = site["fn"]
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return site["is_observed"] and site["mask"] is None and type(fn) in _NAN_SHOWS


def _arguments(fn: Distribution, *, nan_shows: bool) -> Iterator[Tensor]:
    try:
        arg_constraints = fn.arg_constraints
    except NotImplementedError:
        return
    for name, constraint in arg_constraints.items():
        if nan_shows and _is_real(constraint):
            continue
        computed = name not in vars(fn) and isinstance(getattr(type(fn), name, None), lazy_property)
        if not computed:
            yield from _holds(constraint, getattr(fn, name))


def _support(fn: Any) -> Any:
    try:
        return fn.support
    except (AttributeError, NotImplementedError):
        return None


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _is_plain_interval(constraint: Any) -> bool:
    """Return whether a constraint is that of whole numbers between two numbers."""
    if type(constraint) is not type(_INTEGERS):
        return False
    return not (isinstance(constraint.lower_bound, Tensor) or isinstance(constraint.upper_bound, Tensor))


def _holds(constraint: Any, value: Any) -> Iterator[Tensor]:
    if constraint is None or constraints.is_dependent(constraint) or not isinstance(value, Tensor):
        return
    if _is_plain_interval(constraint) and not (value.is_floating_point() or value.is_complex()) and value.numel():
        least, most = torch.aminmax(value)  # less to compute than for each
        yield (least >= constraint.lower_bound) & (most <= constraint.upper_bound)
    else:
        yield constraint.check(value)
