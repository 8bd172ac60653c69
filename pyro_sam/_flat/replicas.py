r"""The flat passes of all replicas at once: the model runs a single time, mapped over them by ``torch.func.vmap``.

.. math:: \mathrm{loss} = \sum_r \mathrm{loss}_r

Where a run cannot be mapped (a value read as a number, a layer without a rule) it ends in
:class:`~pyro_sam._flat.recorder.Surprise`, and the replicas run one after the other.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_sam._base.random_state import RandomState, rewound
from pyro_sam._base.replicas import PerReplica, check_parameters
from pyro_sam._base.vectorised import mappable
from pyro_sam._flat.passes import FlatPasses, FlatRan, KnownModel, kl_terms
from pyro_sam._flat.place import Place, Where
from pyro_sam._flat.recorder import Recorder, Surprise
from pyro_sam._flat.vectors import FlatNormal
from pyro_sam._step import checks
from pyro_sam._step.call import Call
from pyro_sam._step.dependence import reaches
from pyro_sam._step.loss import data_loss_of
from pyro_sam._step.memory import Average
from pyro_sam._step.passes import Dependence, Loss

log = logging.getLogger(__name__)


class _Run(NamedTuple):
    """What came of the run: terms of each replica, shape (R,), and what is known of the model.

    Args:
        data: Data losses.
        kl: The part of the KLs that is no constant Normal prior's; 0 for none.
        known: What is known of such models.
        is_estimate: Whether some of ``kl`` is an estimate.
    """

    data: Tensor
    kl: Loss
    known: KnownModel
    is_estimate: bool


class ReplicaPasses(FlatPasses):
    """The passes of one step of all replicas of a mean-field guide; a row of noise is a replica's.

    Attributes:
        rows: Whether what torch would have checked holds, per replica; one entry a run.
    """

    rows: list[Tensor]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rows = []
        self._leaves, self._spec = tree_flatten((self._call.args, dict(self._call.kwargs)))

    @property
    def num_particles(self) -> int:
        """Number of replicas."""
        return self._layout.num_particles

    def zeros(self) -> Tensor:
        """Return the noise of the guides' means."""
        return torch.zeros_like(self.flat.loc, requires_grad=False)

    def gaussian(self) -> Tensor:
        """Draw standard normal noise."""
        return torch.randn(self.flat.loc.shape, dtype=self.flat.loc.dtype, device=self.flat.loc.device)

    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return the means and standard deviations."""
        return self.flat.loc.detach().clone(), self.flat.scale.detach().clone()

    def ascend(self, e: Tensor) -> "ReplicaRan":
        """Run the model at a chosen noise, without a trace."""
        leaf = self.flat.loc.detach().requires_grad_()
        values = Place.apply(leaf, self.flat.scale.detach(), e, Where(self._layout))
        ran = ReplicaRan(self, self._map(values, ends=False), e, leaf, values)
        self.buffers.restore()
        return ran

    def descend(self, e: Tensor, *, detach_scale: bool = False, average: Average | None = None) -> "ReplicaRan":
        """Run the model at a chosen noise for good.

        Raises:
            Surprise: If its run is not of a kind that is known, or cannot be mapped.
        """
        where = Where(self._layout, detach_scale, average, self._settings.ascent_decay)
        values = Place.apply(self.flat.loc, self.flat.scale, e, where)
        node = values[0].grad_fn
        return ReplicaRan(self, self._map(values, ends=True), e, None, values, node)

    def _map(self, values: Sequence[Tensor], *, ends: bool) -> Any:
        """Return what came of a run of all replicas: the data losses, and all of it where the pass ends the step."""
        found: list[Any] = []
        own = [leaf.values for leaf in self._leaves if isinstance(leaf, PerReplica)]
        q = (self.flat.loc, self.flat.scale) if ends else ()
        split = len(values), len(values) + len(q)

        def one(*tensors: Tensor) -> tuple[Any, ...]:
            call = self._call_with(tensors[split[1] :]) if own else self._call
            values = dict(zip(self._layout.names, tensors[: split[0]], strict=True))
            with checks.collected() as conditions:
                run = self._record(values, call, look=ends)
                data = data_loss_of(run.nodes.values())
                kl, *rest = self._kl_of(run, *tensors[split[0] : split[1]]) if ends else (0.0,)
            holds = None if conditions is None else conditions.hold()
            found[:] = rest, isinstance(kl, Tensor), holds is not None
            return tuple(t for t in (data, kl, holds) if isinstance(t, Tensor))

        try:
            with self._stream(), mappable(self._pair.seen.modules):
                outputs = list(vmap(one, randomness="different")(*values, *q, *own))
        except RuntimeError as error:  # if it is not the map's doing, the ordinary way says the same
            say_unmappable(self._pair, str(error).splitlines()[0])
            raise Surprise from error
        rest, has_kl, has_holds = found
        if has_holds:
            self.rows.append(outputs.pop())
        kl = outputs.pop() if has_kl else 0.0
        if len(outputs) != 1:
            raise Surprise  # a model without data
        return _Run(outputs[0], kl, *rest) if ends else outputs[0]

    def _call_with(self, own: Sequence[Tensor]) -> Call:
        """Return the call with what one replica gets of its own."""
        mine = iter(own)
        leaves = [next(mine) if isinstance(leaf, PerReplica) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return replace(self._call, args=args, kwargs=kwargs)

    def _record(self, values: Mapping[str, Tensor], call: Call, *, look: bool) -> Recorder:
        """Run the model; where asked, look at whether it draws. A capture reads nothing: a run before it has looked."""
        run = Recorder(values, self._held, self._bookmarks, self._looked_at, self.buffers)
        look = look and not torch._C._len_torch_dispatch_stack()
        if look:
            run.streams = RandomState.capture().fingerprint()
        with run:
            call.run_model()
        check_parameters(run.parameters)
        if look:
            run.look_at_streams()
            self._pair.draws = run.draws
        return run

    def _stream(self) -> AbstractContextManager[None]:
        if self._model_start is not None:
            return rewound(self._model_start, self._call.streams)
        if self._many_passes:
            self._model_start = RandomState.capture(self._call.streams)
        return nullcontext()

    def _kl_of(self, run: Recorder, loc: Tensor, scale: Tensor) -> tuple[Loss, KnownModel, bool]:
        """Return the KL of one replica without constant Normal priors, and whether it is an estimate."""
        known = self._look_up(run)
        single = FlatNormal(self.flat.layout.of_one(), loc, scale)
        terms, is_estimate = kl_terms(run, known.normal(run, single), single)
        return reduce(add, terms, 0.0), known, is_estimate


def say_unmappable(pair: Any, reason: str) -> None:
    """Say, once for a model and guide, why their replicas cannot run as one."""
    if not pair.unmappable:
        pair.unmappable = reason
        log.warning("replicas run one after the other, which is slow: %s", reason)


class ReplicaRan(FlatRan):
    """What came of a run of the model for all replicas.

    Args:
        passes: The passes.
        run: The run, or its data losses in an ascent.
        e: The noise.
        leaf: Where the graph begins, in an ascent.
        values: Values by site.
        node: The operation that they came of; None without a graph.
    """

    def __init__(
        self, passes: ReplicaPasses, run: Any, e: Tensor, leaf: Tensor | None, values: Any, node: Any = None
    ) -> None:
        self._passes, self._run, self._e, self._leaf, self._node = passes, run, e, leaf, node
        self.data_loss = run.data if isinstance(run, _Run) else run

    def kl(self) -> Loss:
        """Return the KLs, or their estimates at this run's values."""
        run, flat = self._run, self._passes.flat
        return reduce(add, run.known.priors[1].kl(flat), run.kl)

    def sees_noise(self, kl: Loss) -> Dependence:
        """Return what depends on the noise: in the graph of this run, or in an ordinary run of this kind."""
        run = self._run
        tensors = [run.kl] if isinstance(run.kl, Tensor) and run.kl.requires_grad else []
        seen = bool(tensors) and self._node is not None and reaches(tensors, [self._node])
        return Dependence(kl=seen or run.is_estimate or not run.known.kl_ignores_noise, prior=seen)
