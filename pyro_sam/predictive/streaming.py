"""The posterior predictive, streamed: one posterior sample at a time, so that no stack of weights is ever held."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader

from pyro_sam._base.arguments import flag, function, positive_int
from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.cures import explained
from pyro_sam._base.random_state import RandomState, rewound
from pyro_sam._base.replicas import has_own, replicas_of, speaking
from pyro_sam._step.handlers import ReplayMessenger
from pyro_sam.predictive.prediction import Prediction, SampledLikelihood

# the name that Predictive(parallel=True) gives its plate, so that BayesianModule knows it for the particles'
_PLATE = "_num_predictive_samples"


@explained
@torch.no_grad()
def predict(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 32,
    batch_size: int | None = None,
    site: str = "obs",
    samples_at_once: int = 1,
    progress: bool = False,
    replica: int | None = None,
) -> Prediction:
    """Return the posterior predictive of a model at new data.

    The guide is sampled ``num_samples`` times and the model run at each sample, unconditioned. Only the likelihoods
    are kept, not the weights: memory grows with ``num_samples`` times the outputs. Modules run in the mode that they
    are in, so call ``net.eval()`` first where there is dropout or BatchNorm; buffers stay as they are.

    Args:
        model: Pyro model; called with ``args``, so without the observations.
        guide: Its guide.
        *args: Arguments of both, also lists, tuples or dicts of tensors. The first tensor is data, rows along the first
            dimension; every tensor with as many rows is data too.
        num_samples: Number of posterior samples, at least 1.
        batch_size: Number of rows per run; None for all at once. Every batch sees the same posterior samples.
        site: Name of the observed site.
        samples_at_once: Number of posterior samples that run together, in a plate left of all others; more than 1 is
            faster for small networks, and needs memory for that many copies of the weights. A
            :class:`~pyro_sam.BayesianModule` is mapped over them by ``torch.func.vmap``; a model written by hand must
            broadcast, as for ``pyro.infer.Predictive(parallel=True)``.
        progress: Whether to show a progress bar; needs tqdm.
        replica: Number of the replica to predict with; None for all of them, mixed equally, with ``num_samples`` each.
            All replicas run together where ``samples_at_once`` is more than 1 and no latent is in a plate.
    Returns:
        The mixture of the likelihoods.
    Raises:
        ValueError: If a number is not positive, the model has no such site, the site has no batch dimension, a latent
            is missing from the guide, or the arguments hold a DataLoader.
        ImportError: If ``progress`` is asked for without tqdm.
    """
    positive_int("num_samples", num_samples)
    positive_int("samples_at_once", samples_at_once)
    flag("progress", progress)
    if batch_size is not None:
        positive_int("batch_size", batch_size)
    check_pair(model, guide)
    if any(isinstance(arg, DataLoader) for arg in args):
        raise ValueError(
            "args must be those of the model, such as a tensor of rows, got a DataLoader: give all rows, with "
            "batch_size= for the number to run at once, or call predict for each batch of the loader."
        )
    if has_own(args):
        raise ValueError(
            "predict takes the same rows for all replicas, got rows of their own (per_replica); predict with one at a "
            "time, predict(model, guide, x[r], replica=r)."
        )
    batches, number = list(_batches(args, batch_size)), replicas_of(guide)
    if number is None and replica is not None:
        raise ValueError(f"replica={replica!r} needs a guide with replicas, MeanFieldNormal(model, num_replicas=R).")
    sizes = _sizes(num_samples, samples_at_once)
    with kept_buffers():
        with speaking(guide, replica or 0):
            plan = _Plan.of(model, guide, batches[0], site)
        if number is not None and plan.has_plates:  # where a parameter's rows are replicas, Pyro looks for the plate
            sizes = [None] * num_samples
        if number is None or replica is not None:
            with speaking(guide, replica):
                return Prediction(plan.draw(model, guide, batches, _shown(sizes, progress)), plan.data_dim)
        replicas = _of_replicas(plan, model, guide, batches, sizes, number, progress)
    together = [[part for found in replicas for part in found[b]] for b in range(len(batches))]
    return Prediction(together, plan.data_dim, replicas)


def _of_replicas(
    plan: "_Plan", model: Any, guide: Any, batches: list[Any], sizes: list[Any], number: int, progress: bool
) -> list[list[list[SampledLikelihood]]]:
    """Return what each replica's samples give, for each batch of data."""
    replicas: list[list[list[SampledLikelihood]]] = []
    if None in sizes:
        for r in _shown(range(number), progress):
            with guide.as_replica(r):
                replicas.append(plan.draw(model, guide, batches, sizes))
        return replicas
    replicas = [[[] for _ in batches] for _ in range(number)]
    for size in _shown(sizes, progress):
        with guide.as_all_replicas(-1 - plan.nesting, size):
            drawn = plan.draw(model, guide, batches, [size * number])
        for r, found in enumerate(replicas):
            for parts, (part,) in zip(found, drawn, strict=True):
                parts.append(part.part(r, number))
    return replicas


@dataclass(frozen=True)
class _Plan:
    """What a first run tells: where the data points lie, and which guide sites are theirs.

    Args:
        site: Name of the observed site.
        free: It, and the names of other sites of single data points that the guide does not have: they were observed
            while training.
        batch_dim: Number of the observed site's batch dimensions.
        data_dim: The one that the data points lie along.
        nesting: Number of dimensions that plates take.
        shared: Names of the guide's sites that do not belong to single data points.
        is_local: Whether the guide has others.
        has_plates: Whether any of the guide's sites is in a plate.
    """

    site: str
    free: frozenset[str]
    batch_dim: int
    data_dim: int
    nesting: int
    shared: frozenset[str]
    is_local: bool
    has_plates: bool

    @classmethod
    def of(cls, model: Callable[..., Any], guide: Callable[..., Any], batch: Any, site: str) -> "_Plan":
        with rewound(RandomState.capture()):
            values = poutine.trace(guide).get_trace(*batch)
            trace = poutine.trace(poutine.replay(model, trace=values)).get_trace(*batch)
        _check_site(trace, site)
        frames = {name: [f for f in node["cond_indep_stack"] if f.vectorized] for name, node in _sites(trace)}
        guides = {name: [f for f in node["cond_indep_stack"] if f.vectorized] for name, node in _sites(values)}
        rows = _rows(batch)
        # a model without plates has its data along the last dimension
        data_dim, plate = max([(f.dim, f.name) for f in frames[site] if f.size == rows], default=(-1, None))
        shared = frozenset(name for name, within in guides.items() if plate not in [f.name for f in within])
        fn: Any = trace.nodes[site]["fn"]
        batch_dim = len(fn.batch_shape)
        return cls(
            site=site,
            free=frozenset(name for name, within in frames.items() if within and name not in guides) | {site},
            batch_dim=batch_dim,
            data_dim=data_dim,
            nesting=max([batch_dim, *(-f.dim for within in (*frames.values(), *guides.values()) for f in within)]),
            shared=shared,
            is_local=len(shared) < len(guides),
            has_plates=any(guides.values()),
        )

    def draw(
        self, model: Any, guide: Any, batches: list[Any], sizes: Iterable[int | None]
    ) -> list[list[SampledLikelihood]]:
        """Return the likelihoods of each batch at posterior samples, of which there run so many at once."""
        found: list[list[SampledLikelihood]] = [[] for _ in batches]
        for size in sizes:
            for parts, fn in zip(found, self.likelihoods(model, guide, batches, size), strict=True):
                parts.append(SampledLikelihood(fn, size, self.batch_dim))
        return found

    def likelihoods(
        self, model: Callable[..., Any], guide: Callable[..., Any], batches: list[Any], size: int | None
    ) -> Iterator[Any]:
        """Draw posterior samples, one or ``size`` at once, and yield the likelihood of each batch."""

        def plate() -> Any:
            return nullcontext() if size is None else pyro.plate(_PLATE, size, dim=-1 - self.nesting)

        with plate():
            values = poutine.trace(guide).get_trace(*batches[0])
        shared = values.copy()
        for name in set(values.nodes) - self.shared:
            shared.remove_node(name)
        # back to here after the batches, so that the samples do not depend on batch_size
        with rewound(RandomState.capture()):
            for number, batch in enumerate(batches):
                if number and self.is_local:
                    with plate(), poutine.replay(trace=shared):
                        values = poutine.trace(guide).get_trace(*batch)
                with plate(), ReplayMessenger(values.nodes, {}, free=self.free):
                    trace = poutine.trace(model).get_trace(*batch)
                yield trace.nodes[self.site]["fn"]


def _sites(trace: Trace) -> Iterator[tuple[str, Any]]:
    return (
        (name, node) for name, node in trace.nodes.items() if node["type"] == "sample" and not site_is_subsample(node)
    )


def _check_site(trace: Trace, site: str) -> None:
    names = [name for name, _ in _sites(trace)]
    if not isinstance(site, str) or site not in names:
        raise ValueError(
            f"site must be a site of the model, got site={site!r}; the model's sites are {', '.join(names)}."
        )
    fn: Any = trace.nodes[site]["fn"]
    if not fn.batch_shape:
        raise ValueError(
            f"site '{site}' has no batch dimension to tell data points apart (its event shape is "
            f"{tuple(fn.event_shape)}). Sample it inside pyro.plate, without to_event over the data."
        )


def _rows(args: Any) -> int | None:
    """Return the number of rows of the first tensor in the arguments."""
    tensors = (leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor) and leaf.dim())
    return next((len(tensor) for tensor in tensors), None)


def _batches(args: tuple[Any, ...], batch_size: int | None) -> Iterator[Any]:
    rows = _rows(args)
    if batch_size is None or rows is None or rows <= batch_size:
        yield args
        return

    def is_data(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == rows

    for start in range(0, rows, batch_size):
        rows_now = slice(start, start + batch_size)
        yield tree_map(lambda leaf, now=rows_now: leaf[now] if is_data(leaf) else leaf, args)


def _sizes(num_samples: int, at_once: int) -> list[int | None]:
    if at_once == 1:
        return [None] * num_samples
    return [min(at_once, num_samples - start) for start in range(0, num_samples, at_once)]


def _shown(sizes: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return sizes
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError('progress=True needs tqdm: pip install "pyro-sam[progress]"') from error
    return tqdm(sizes, desc="predict", unit="run")


def check_pair(model: Any, guide: Any) -> None:
    """Check what is asked of the posterior of a trained guide.

    Raises:
        ValueError: If model or guide cannot be called, come in another order, or the guide has no parameters yet.
    """
    if isinstance(model, SVI):
        raise ValueError("model must be a Pyro model, got an SVI: give svi.model, and svi.guide after it.")
    function("model", model, "a Pyro model")
    function("guide", guide, "a Pyro guide")
    guide = poutine.unwrap(guide)
    if isinstance(poutine.unwrap(model), AutoGuide) and not isinstance(guide, AutoGuide):
        raise ValueError("model must come first and its guide second, got the guide first: change their order.")
    if isinstance(guide, AutoGuide) and getattr(guide, "prototype_trace", True) is None:
        raise ValueError(
            f"guide {type(guide).__name__} has no parameters yet, and without observations it would take the observed "
            "site for a latent. Train it first, or call it once with the observations too: guide(x, y)."
        )
