"""The one place that remembers: what is known of a model and a guide."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.global_streams import GlobalStreams
from pyro_sam._base.random_state import Streams
from pyro_sam._base.recent import Recent
from pyro_sam._base.surroundings import Surroundings
from pyro_sam._step.call import Call, told_by
from pyro_sam._step.enumeration import Enumeration
from pyro_sam._step.memory import PreviousGradients
from pyro_sam._step.passes import Dependence
from pyro_sam._step.settings import Settings

_LIMIT = 64  # structures of one pair


@dataclass
class Pair:
    """What is known of one model and one guide. It keeps both alive.

    Attributes:
        model: The model.
        guide: The guide.
        valid: Signatures, and settings that the checks depend on, that were looked at.
        hidden: By kind of a run and what it saw: what was seen to depend on the noise at other noise.
        ends: By kind of a guide's run, likewise: whether only the values of its sites changed at other noise.
        enumeration: How the model is traced.
        plate_sizes: Sizes of plates, as first met.
        known: What flat passes know of the model, by kind of its run: whether they can take it.
        last_flat: What was known of the last flat step, and the signature of its sites.
        failures: How many steps in a row could not be flat though they were tried.
        memory: Gradients of earlier steps.
        graphs: Captured steps.
        uncaptured: Why the last step that could not be captured was not.
        restless: Laws that change what they hold, so that no step of theirs is captured.
        fast_steps: How many fast steps were taken.
        slow: Why only ordinary steps are taken, if so.
        lost: Replicas that have been warned of.
        unmappable: Why replicas run one after the other, if so.
        draws: Whether the model drew random numbers besides its plates' indices in the last run mapped over replicas;
            None if there was none.
        draws_elsewhere: Whether, with replicas, it drew from another stream than torch's, as each does by itself.
        writes: Whether a step was seen to write into its arguments.
        global_streams: Where Python's and NumPy's streams were at the start of the last flat step.
    """

    model: Any
    guide: Any
    valid: Recent[Hashable, bool] = field(default_factory=lambda: Recent(_LIMIT))
    hidden: Recent[Hashable, Dependence] = field(default_factory=lambda: Recent(_LIMIT))
    ends: Recent[Hashable, bool] = field(default_factory=lambda: Recent(_LIMIT))
    enumeration: Enumeration = field(default_factory=Enumeration)
    plate_sizes: dict[str, int] = field(default_factory=dict)
    known: Recent[Hashable, Any] = field(default_factory=lambda: Recent(_LIMIT))
    last_flat: tuple[Any, Hashable] | None = None
    failures: int = 0
    memory: PreviousGradients | None = None
    graphs: Recent[Hashable, Any] = field(default_factory=lambda: Recent(_LIMIT))
    uncaptured: str = ""
    restless: list[Any] = field(default_factory=list)
    fast_steps: int = 0
    slow: str = ""
    lost: set[int] = field(default_factory=set)
    unmappable: str = ""
    draws: bool | None = None
    draws_elsewhere: bool = False
    writes: bool = False
    global_streams: GlobalStreams = field(default_factory=GlobalStreams)
    _nesting: int | None = None
    _changes: int = 0
    _told: Hashable = ()
    _surroundings: Surroundings | None = None
    _streams: Streams | None = None

    def known_nesting(self, settings: Settings) -> float:
        """Return what is known of that number without a run: infinity if nothing."""
        known: float = settings.max_plate_nesting
        if known == math.inf and self._nesting is not None:
            known = self._nesting
        return known + (1 if settings.together > 1 else 0)

    def nesting(self, settings: Settings, call: Call) -> int:
        """Return the number of dimensions of nested plates, that of vectorised particles included."""
        if self.known_nesting(settings) == math.inf:
            guess: Any = Trace_ELBO()
            with kept_buffers(call.modules):
                guess._guess_max_plate_nesting(call.model, call.guide, call.args, call.kwargs)
            self._nesting = int(guess.max_plate_nesting)
        return int(self.known_nesting(settings))

    @property
    def seen(self) -> Surroundings:
        """What model and guide were seen to see at the start of this step, by :meth:`complete`."""
        known: Any = self._surroundings
        return known

    def view(self, call: Call) -> Hashable:
        """Return what model and guide may branch on: a number for what they see, and the look of their arguments."""
        return self._changes, call.look(), self._told

    def surroundings(self, call: Call) -> Surroundings:
        """Return what model and guide can see besides their arguments."""
        known = self._surroundings
        if known is None or not known.is_same():
            roots = [call.model] if isinstance(call.guide, AutoGuide) else [call.model, call.guide]
            self._surroundings = Surroundings(*roots)
            self._changes += 1
            if known is None or not known.acts_as(self._surroundings):  # say, another layer, which draws otherwise
                self._streams, self.known, self.last_flat = None, Recent(_LIMIT), None
            known = self._surroundings
        return known

    def complete(self, call: Call, *, fast: bool) -> Call:
        """Return the call with the streams and modules that its passes share.

        Args:
            call: The call.
            fast: Whether streams that the model was not seen to use may be left out.
        """
        seen = self.surroundings(call)
        # read here: while a step is captured or mapped, tensors do not tell
        self._told = told_by(tree_leaves((call.args, dict(call.kwargs), seen.tensors)))
        modules, generators = seen.modules, seen.generators
        if objects := call.objects():
            more = Surroundings(*objects)
            modules, generators = modules + more.modules, generators + more.generators
        streams = (self._streams if fast else None) or Streams()
        # an autoguide keeps its constants as buffers, and writes to none
        own = set(call.guide.modules()) if isinstance(call.guide, AutoGuide) else ()
        written = tuple(module for module in modules if module._buffers and module not in own)
        return replace(call, streams=replace(streams, own=tuple(generators)), modules=written)

    def note_streams(self, moved: Streams) -> None:
        """Note which streams a run moved: later fast steps share them, and need not copy the others."""
        known = self._streams or Streams(python=False, numpy=False)
        self._streams = Streams(python=known.python or moved.python, numpy=known.numpy or moved.numpy)


class Knowledge:
    """The pairs of model and guide that an estimator has met lately."""

    LIMIT = 8
    MOST = 64  # those that remember gradients included: a pair that forgets them climbs no more

    def __init__(self) -> None:
        self._pairs: Recent[Hashable, Pair] = Recent(self.LIMIT, _remembers, self.MOST)
        self._loaded: Mapping[str, Tensor] | None = None

    def of(self, call: Call) -> Pair:
        """Return what is known of a call's model and guide."""
        return self._pairs.get(call.key) or self._pairs.put(call.key, Pair(call.model, call.guide))

    def memory_of(self, pair: Pair) -> PreviousGradients:
        """Return a pair's gradients of earlier steps; a state that was loaded goes to the first that asks.

        A model under a handler that is made anew, as by ``pyro.condition(model, ...)`` at each step, goes on with those
        of the same model and guide.
        """
        if pair.memory is None:
            state = self._loaded if self._loaded is not None else self._of_same_core(pair)
            pair.memory, self._loaded = PreviousGradients(state), None
        return pair.memory

    def _of_same_core(self, pair: Pair) -> Mapping[str, Tensor] | None:
        core = _core(pair.model)
        if core is pair.model:
            return None
        for other in reversed(self._pairs.values()):
            same = other is not pair and other.guide == pair.guide and _core(other.model) == core
            if same and other.memory is not None:
                return other.memory.state_dict()
        return None

    def ascent(self) -> dict[str, Tensor]:
        """Return the gradients of earlier steps, of the pair that was trained last."""
        trained = [pair.memory for pair in self._pairs.values() if pair.memory is not None]
        return trained[-1].state_dict() if trained else dict(self._loaded or {})

    def load_ascent(self, state: Mapping[str, Tensor]) -> None:
        """Take over gradients of earlier steps; the next model and guide go on with them."""
        self._loaded = {name: average.detach().clone() for name, average in state.items()}
        for pair in self._pairs.values():
            pair.memory = None


def _core(model: Any) -> Any:
    """Return the function inside of Pyro's handlers and partial calls."""
    inner = poutine.unwrap(model)
    while isinstance(inner, partial):
        inner = poutine.unwrap(inner.func)
    return inner


def _remembers(pair: Pair) -> bool:
    return pair.memory is not None
