"""The handler of a model's run whose structure is known: it hands out the guide's values and notes what it meets.

Where nothing else listens, a module with many sites is served at one go (:func:`lone_recorder`), not by a message each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.plate_messenger import PlateMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_sam._base.buffers import Buffers
from pyro_sam._base.random_state import RandomState
from pyro_sam._step.handlers import Bookmarks, hold_subsample


class Surprise(Exception):
    """A run was not what was known of it: it must be done again in the ordinary way."""


class Recorder(Messenger):
    """Give a model the values of its latent sites.

    Args:
        values: Values by site.
        held: Indices of subsampling plates. Filled by the first run, used by later ones.
        bookmarks: Where the random streams are after each draw of such indices, likewise; None for a single run.
        looked_at: What modules have found to be as it was, likewise.
        buffers: Watches the modules that are called.
        lead: Dimensions that vectorised particles put at the left of a value, the number of particles first.
    Attributes:
        values: The values by site.
        nodes: The sites that sent a message, by name.
        batches: The priors that were served at one go.
        streams: Where the random streams were at the start or after the last draw of indices, to find out of draws of
            the model's own; None where nobody asks.
        draws: Whether there was one, so far.
        parameters: The names of the parameters that the model has of its own.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        held: dict[str, Tensor],
        bookmarks: Bookmarks | None,
        looked_at: set[Any],
        buffers: Buffers,
        lead: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.values, self._held, self._bookmarks = values, held, bookmarks
        self.looked_at, self.buffers, self.lead = looked_at, buffers, lead
        self.nodes: dict[str, Any] = {}
        self.batches: list[Mapping[str, Any]] = []
        self.streams: tuple[bytes, ...] | None = None
        self.draws = False
        self.parameters: list[str] = []

    def take(self, priors: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the values of the sites with these priors, as if each had been sampled."""
        if any(priors.keys() & batch.keys() for batch in self.batches):  # a network that is called twice
            raise Surprise
        self.batches.append(priors)
        try:
            return {name: self.values[name] for name in priors}
        except KeyError as name:
            raise Surprise from name

    def priors(self) -> dict[str, Any]:
        """Return the priors that were served at one go."""
        return {name: prior for batch in self.batches for name, prior in batch.items()}

    def latents(self) -> dict[str, Any]:
        """Return the latent sites among the nodes."""
        return {name: site for name, site in self.nodes.items() if name in self.values}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            return
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
        elif not site_is_subsample(msg):
            raise Surprise
        elif msg["value"] is None:
            self.look_at_streams()
            hold_subsample(msg, self._held, self._bookmarks)
            self.streams = self.streams and RandomState.capture().fingerprint()

    def look_at_streams(self) -> None:
        """Note whether the model has drawn something of its own since the last look."""
        if self.streams is not None:
            self.draws = self.draws or self.streams != RandomState.capture().fingerprint()

    def _pyro_post_param(self, msg: Any) -> None:
        self.parameters.append(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.nodes or any(msg["name"] in priors for priors in self.batches):
            raise Surprise
        self.nodes[msg["name"]] = msg.copy()


class Silence(BlockMessenger):
    """Hides all statements inside from the handlers around it."""

    def __init__(self) -> None:
        super().__init__(hide_all=True)


def listeners() -> list[Any]:
    """Return the handlers that hear a statement made here, the outermost first."""
    stack = _PYRO_STACK
    for i in range(len(stack) - 1, -1, -1):
        if type(stack[i]) is Silence:
            return stack[i + 1 :]
    return stack


def only_parameters_are_traced() -> bool:
    """Return whether nothing listens but traces of parameters, such as SVI's."""
    return all(map(_traces_parameters, listeners()))


def lone_recorder() -> Recorder | None:
    """Return the recorder that runs the present code, if nothing else listens but traces of parameters.

    The plate of an estimator's vectorised particles does not count.
    """
    heard_by = listeners()
    if not heard_by:
        return None
    *others, innermost = heard_by
    if _is_plate_of_particles(innermost) and others:
        *others, innermost = others
    return innermost if type(innermost) is Recorder and all(map(_traces_parameters, others)) else None


def _is_plate_of_particles(handler: Any) -> bool:
    return isinstance(handler, PlateMessenger) and handler.name == "num_particles_vectorized"


def _traces_parameters(handler: Any) -> bool:
    return type(handler) is TraceMessenger and handler.param_only
