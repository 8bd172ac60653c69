r"""What a model says before it has seen data: networks drawn from the prior, as it is or wider."""

from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch import distributions as td

from pyro_sam._step.call import Call
from pyro_sam._step.sites import unwrap
from pyro_sam.diagnosis.measure import observed_sites

_SHIFTS = (1, 7, 31)  # rows between two inputs that are told apart


def draw(call: Call, factor: float = 1.0) -> Trace:
    """Run the model at a draw from the prior, the weights of its networks ``factor`` times as far from their mean."""
    with _Wider(factor):
        return poutine.trace(call.model).get_trace(*call.args, **call.kwargs)


def starting_weights(trace: Trace) -> dict[str, Tensor]:
    """Return the weights that a :class:`~pyro_sam.BayesianModule` proposes to start at, by site."""
    nodes: Any = trace.nodes.items()
    return {name: node["infer"]["init_value"] for name, node in nodes if _is_weight(node)}


def contrast(call: Call, factor: float, num_draws: int = 8) -> float | None:
    r"""Return by how much networks from the prior tell two inputs apart, in nats an observation.

    .. math:: J = E_{w \sim p,\, y \sim p(y \mid x_n, w)} \log \frac{p(y \mid x_n, w)}{p(y \mid x_m, w)}

    Returns:
        J; None where the observations are not alike, so that they cannot be exchanged.
    """
    found = []
    for _ in range(num_draws):
        for site in observed_sites(draw(call, factor)).values():
            fn, dim = site["fn"], len(site["fn"].batch_shape) - 1
            if dim < 0 or fn.batch_shape[dim] < 2:
                return None
            y = fn.sample()
            others = torch.stack([fn.log_prob(y.roll(shift % y.shape[dim] or 1, dim)) for shift in _SHIFTS])
            found.append(float((fn.log_prob(y) - others.mean(0)).mean()))
    return sum(found) / len(found) if found else None


class _Wider(Messenger):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def _pyro_post_sample(self, msg: Any) -> None:
        core = unwrap(msg["fn"])
        if self._factor != 1 and _is_weight(msg) and isinstance(core, td.Normal):
            msg["value"] = core.loc + self._factor * (msg["value"] - core.loc)


def _is_weight(node: Any) -> bool:
    return node["type"] == "sample" and not node["is_observed"] and "init_value" in (node["infer"] or {})
