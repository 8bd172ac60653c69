"""The loss of one particle, or of all particles that are vectorised together: its back end and its checks."""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_sam._base.arguments import Numbers
from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.global_streams import GlobalStreams
from pyro_sam._base.random_state import RandomState, Streams
from pyro_sam._base.replicas import replicas_of
from pyro_sam._flat.passes import FlatPasses, KnownModel
from pyro_sam._flat.recorder import Surprise
from pyro_sam._flat.replicas import ReplicaPasses, say_unmappable
from pyro_sam._step import checks
from pyro_sam._step.call import Call
from pyro_sam._step.enumeration import enumerated_dims
from pyro_sam._step.knowledge import Pair
from pyro_sam._step.loss import latent_sites
from pyro_sam._step.memory import StepMemory
from pyro_sam._step.minibatch import follow_minibatch
from pyro_sam._step.ordinary import OrdinaryPasses
from pyro_sam._step.own_laws import LawState
from pyro_sam._step.passes import Loss, Passes
from pyro_sam._step.settings import Settings
from pyro_sam._step.side_by_side import SideBySide
from pyro_sam._step.signatures import kind_of_sites
from pyro_sam._step.space import Space, Terms
from pyro_sam.guide import MeanFieldNormal
from pyro_sam.perturbation import Gaussian, Perturbation

T = TypeVar("T")
PATIENCE = 3  # steps in a row that may fail to be flat before no more are tried


class Evaluated(NamedTuple):
    """A loss with its graph, its bare value, its terms, and what to call after its backward pass.

    Of replicas, loss, value and terms have shape ``(R,)``.
    """

    loss: Loss
    value: Loss
    terms: Terms
    finish: Callable[[], None]


@dataclass(frozen=True)
class Particle:
    """One particle.

    Args:
        call: Model, guide and their arguments.
        pair: What is known of model and guide.
        settings: The estimator's settings.
        law: Chooses the noise.
        kl_weight: Weight of the KL: the setting, or a tensor.
        memory: Gradients of earlier steps, where the ascent climbs along them.
        fast: Whether a flat back end may be taken.
    """

    call: Call
    pair: Pair
    settings: Settings
    law: Perturbation
    kl_weight: Numbers | Tensor
    memory: StepMemory | None
    fast: bool

    def loss(self, *, graph: bool = True) -> Evaluated:
        """Return the loss with its graph, and its bare value.

        Args:
            graph: Whether the graph begins at the parameters. Otherwise their ``.grad`` is complete only when
                ``finish`` was called after the backward pass.

        Raises:
            ValueError: If a value is one that torch's checks refuse; buffers are then as they were.
        """
        # a new pair of model and guide is met under torch's own checks, which point at the user's own line
        # replicas run as one, under checks that are read afterwards
        checked = (len(self.pair.valid) or self._num_replicas) and checks.enabled()
        return self._shortest(self._checked_afterwards if checked else self._evaluate, graph=graph)

    def unchecked(self) -> tuple[Loss, Tensor | None]:
        """Return the loss with its graph, and whether what torch would have checked holds (None if nobody asked)."""

        def take(passes: Passes) -> tuple[Loss, Tensor | None]:
            terms, holds = self._take(passes, [])
            return terms.data + terms.kl, holds

        return self._shortest(take, graph=True)

    @property
    def _num_replicas(self) -> int | None:
        return replicas_of(self.call.guide)

    def ordinary(self) -> OrdinaryPasses | SideBySide:
        """Return new ordinary passes."""
        if self._num_replicas is None:
            return self._single()
        held: dict[str, Tensor] = {}
        return SideBySide([self._single(r, held) for r in range(self._num_replicas)])

    def _single(self, replica: int | None = None, held: dict[str, Tensor] | None = None) -> OrdinaryPasses:
        """Return ordinary passes of the guide, or of one of its replicas."""
        call = _all(self.call if replica is None else self.call.of_replica(replica))
        model, guide = call.model, follow_minibatch(call)
        here = call.with_functions(model, guide if replica is None else OneReplica(call.guide, guide, replica))
        if self.settings.together > 1:
            here = call.with_functions(self._vectorised(model, here), self._vectorised(guide, here))
        return OrdinaryPasses(
            here, self.pair, self.settings, self.law, lambda: -1 - self.pair.nesting(self.settings, here), held
        )

    def traces(self) -> tuple[Trace, Trace]:
        """Return the traces of model and guide at the law's noise."""
        passes = self._single()
        ran = passes.descend(self._space(passes).noise())
        return ran.model, ran.guide.trace

    # Which back end

    def _shortest(self, take: Callable[[Passes], T], *, graph: bool) -> T:
        """Take the step with flat passes where that is possible, else with ordinary ones; buffers stay if it raises.

        A kind of model that is new is met, and checked, in an ordinary run at the mean that leaves no trace. So the
        numbers of a training do not depend on which of its steps was the first, before or after an interruption.
        """
        pair = self.pair
        kinds = pair.known.values()
        can_be_flat = not kinds or any(known.has_all for known in kinds)  # a look is wasted on sums over latents
        if self.fast and pair.failures < PATIENCE and can_be_flat and (self._is_promising() or not self._met()):
            start = RandomState.capture(self.call.streams)
            for is_rehearsed in (False, True):
                if self._is_promising() and (found := self._take_flat(take, start, graph=graph)) is not None:
                    pair.failures = 0
                    return found[0]
                if torch.is_inference_mode_enabled():  # has no graph to find out from: it says nothing of the model
                    break
                if is_rehearsed:
                    pair.failures += 1
                    break
                self._rehearse()
        with kept_buffers(self.call.modules, on_error_only=True):
            return take(self.ordinary())

    def _take_flat(self, take: Callable[[Passes], T], start: RandomState, *, graph: bool) -> tuple[T] | None:
        passes = self._flat(graph=graph)
        if passes is None:
            return None
        buffers, law = passes.buffers, LawState(self.law)
        buffers.watch()
        others = self.pair.global_streams
        others.mark()
        try:
            found = take(passes)
            self._check_streams(start, others)
            return (found,)
        except Surprise:
            buffers.restore()
            others.restore()
            start.restore()
            law.restore()
            return None
        except BaseException:
            buffers.restore()
            raise
        finally:
            buffers.look_away()

    def _check_streams(self, start: RandomState, others: GlobalStreams) -> None:
        """Look at whether the step drew from streams that its passes, or its replicas, did not share as they should.

        Raises:
            Surprise: If it did.
        """
        moved, pair, shared = others.moved(), self.pair, self.call.streams
        if self._num_replicas is not None:
            own = RandomState.capture(shared).moved(start).own
            if moved.python or moved.numpy or own:
                pair.draws_elsewhere = True
                say_unmappable(pair, "the model draws random numbers that are not of torch's default stream")
                raise Surprise
        if moved.python > shared.python or moved.numpy > shared.numpy:
            pair.note_streams(moved)
            raise Surprise

    def _is_promising(self) -> bool:
        """Return whether any kind of run is known in which the KL at the law's noise is the KL."""
        unused = not isinstance(self.kl_weight, Tensor) and self.kl_weight == 0
        easy = unused or isinstance(self.law, Gaussian)
        return any(known.has_all and (easy or known.kl_ignores_noise) for known in self._met())

    def _met(self) -> list[KnownModel]:
        """Return what is known of runs in which the model saw what it sees now, or where that is nothing to it."""
        all_known: list[KnownModel] = self.pair.known.values()
        if all(known.is_free for known in all_known):
            return all_known
        view = self.pair.view(self.call)
        return [known for known in all_known if known.is_free or known.was_seen(view)]

    def _flat(self, *, graph: bool) -> FlatPasses | None:
        guide = self.call.guide
        flat = guide.flat(graph=graph) if isinstance(guide, MeanFieldNormal) else None
        if flat is None or not isinstance(guide, MeanFieldNormal):
            return None
        if flat.is_frozen and self.memory is not None:  # sites without a gradient remember none
            return None
        if self._num_replicas is not None and self.pair.draws_elsewhere:  # a draw for each of them
            return None
        call, lead = self.call, ()
        if self.settings.together > 1:
            call = call.with_functions(self._vectorised(call.model, call), guide)
            lead = self.settings.together, *[1] * (self.pair.nesting(self.settings, self.call) - 1)  # type: ignore[assignment]
        hand_out, kind = guide.hand_out, FlatPasses if self._num_replicas is None else ReplicaPasses
        return kind(call, flat, self.pair, self.settings, self.law, lead, lambda: hand_out(flat))

    def _rehearse(self) -> None:
        """Meet the model in an ordinary run at the mean, without a trace."""
        passes = self._single() if self._num_replicas is None else self._single(0)
        streams = _all(self.call).streams
        before = RandomState.capture(streams)
        with kept_buffers(self.call.modules):
            ran = passes.descend(passes.zeros())
            with torch.enable_grad():
                sees_noise = ran.sees_noise(ran.kl())
        latents = latent_sites(ran.model).keys()
        has_all = not enumerated_dims(ran.model) and set(ran.guide.sites) == set(latents)
        key = frozenset(kind_of_sites(ran.model.nodes.values()))
        ignores, old = not sees_noise.kl, self.pair.known.get(key)
        if old is None or (old.kl_ignores_noise, old.has_all) != (ignores, has_all):
            old = self.pair.known.put(key, KnownModel(kl_ignores_noise=ignores, has_all=has_all))
        old.views.put(self.pair.view(self.call), True)
        self.pair.note_streams(RandomState.capture(streams).moved(before))
        before.restore()

    def _vectorised(self, function: Callable[..., object], call: Call) -> Callable[..., object]:
        size, nesting = self.settings.together, self.pair.nesting(self.settings, call)

        def run(*args: object, **kwargs: object) -> object:
            with pyro.plate("num_particles_vectorized", size, dim=-nesting):
                return function(*args, **kwargs)

        return run

    # Its loss and its checks

    def _space(self, passes: Passes) -> Space:
        return Space(passes, self.law, self.settings, self.kl_weight, self.memory)

    def _evaluate(self, passes: Passes) -> Evaluated:
        space = self._space(passes)
        terms = space.loss(space.noise())
        return _evaluated(terms, passes)

    def _checked_afterwards(self, passes: Passes) -> Evaluated:
        noise: list[Tensor] = []
        try:
            terms, holds = self._take(passes, noise)
        except (IndexError, RuntimeError, ValueError):
            self.ordinary().check(noise[0] if noise else None)  # says it better, where a bad value is the cause
            raise
        found = _evaluated(terms, passes)
        if self._num_replicas is not None:
            return self._checked_by_row(found, holds, noise[0])
        if holds is None or not isinstance(found.loss, Tensor):
            return found
        # the step's one wait for the device
        value, all_hold = torch.stack([found.loss.detach(), holds.to(found.loss)]).tolist()
        if not (all_hold and math.isfinite(value)):
            self.ordinary().check(noise[0])
        return found._replace(value=value)

    def _checked_by_row(self, found: Evaluated, holds: Tensor | None, noise: Tensor) -> Evaluated:
        """Complain where no replica has values that pass the checks; warn of a single one, once."""
        loss: Any = found.loss
        good = loss.detach().isfinite() if holds is None else holds & loss.detach().isfinite()
        bad = {r for r, is_good in enumerate(good.tolist()) if not is_good}
        if len(bad) == len(good):
            self.ordinary().check(noise)
        if new := bad - self.pair.lost:
            self.pair.lost |= new
            warnings.warn(
                f"replica {', '.join(map(str, sorted(new)))} has values that torch's checks refuse, or a loss that is "
                "not finite; the others go on.",
                UserWarning,
                stacklevel=2,
            )
        return found

    def _take(self, passes: Passes, noise: list[Tensor]) -> tuple[Terms, Tensor | None]:
        """Return the loss's terms and whether its values hold; the noise is put into ``noise`` early."""
        space = self._space(passes)
        asked = checks.enabled()
        with checks.postponed() if asked else nullcontext() as conditions:
            with checks.silenced() if asked and not passes.runs_guide else nullcontext():
                noise.append(e := space.noise())
            terms = space.loss(e)
        holds = None if conditions is None else conditions.hold()
        if rows := getattr(passes, "rows", None):  # of replicas
            holds = torch.stack(rows).all(0) if holds is None else torch.stack(rows).all(0) & holds
        return terms, holds


@dataclass(frozen=True)
class OneReplica:
    """A guide that speaks as one of its replicas.

    Args:
        guide: The guide.
        run: What runs it.
        r: Number of the replica.
    """

    guide: Any
    run: Callable[..., Any]
    r: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        with self.guide.as_replica(self.r):
            return self.run(*args, **kwargs)


def _all(call: Call) -> Call:
    """Return a call whose passes share all random streams that they can draw from."""
    return replace(call, streams=Streams(own=call.streams.own))


def _evaluated(terms: Terms, passes: Passes) -> Evaluated:
    loss = terms.data + terms.kl
    return Evaluated(loss, loss.detach() if isinstance(loss, Tensor) else loss, terms, passes.finish)
