"""The loss of a training run: its settings as text, the state that a checkpoint keeps of it, its value by replica."""

import inspect
import math
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from pyro.infer import SVI
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from pyro_sam._base import ranks as distributed
from pyro_sam._base.replicas import norms, number_in, replicas_of
from pyro_sam.elbo import SAM_ELBO
from pyro_sam.training.numbers import Number


def elbo_of(svi: SVI) -> Any:
    """Return the ELBO whose method the loss is; None for another function."""
    return getattr(svi.loss, "__self__", None)


def elbo_settings(svi: SVI) -> dict[str, str]:
    """Return the settings of the loss as text, the same in every process."""
    loss = elbo_of(svi)
    found = {name: value for name, value in vars(loss).items() if not name.startswith("_")} if loss else {}
    if isinstance(loss, SAM_ELBO):
        found.update({name: getattr(loss, name) for name in inspect.signature(SAM_ELBO).parameters})
    found.pop("max_plate_nesting", None)  # found out on the way
    return {"class": type(loss).__name__, **{name: _text(value) for name, value in found.items()}}


def elbo_state(svi: SVI) -> dict[str, Any]:
    """Return the state of the loss; empty for one of Pyro's."""
    elbo = elbo_of(svi)
    return dict(elbo.state_dict()) if isinstance(elbo, SAM_ELBO) else {}


def restore_elbo(
    svi: SVI, settings: Mapping[str, str], state: Mapping[str, Any], changing: Collection[str] = ()
) -> None:
    """Put the loss into a saved state, and warn of settings that were others; not of those that are to change."""
    here = elbo_settings(svi)
    known = (here.keys() & settings.keys()) - set(changing)  # an older version had fewer
    changed = [
        f"{name}: {settings[name]} then, {here[name]} now" for name in sorted(known) if here[name] != settings[name]
    ]
    if changed:
        warnings.warn(f"the loss is not the one of the checkpoint ({'; '.join(changed)}).", stacklevel=2)
    if state and state.keys() == elbo_state(svi).keys():
        elbo_of(svi).load_state_dict(state)


def loss_of_all(svi: SVI, loss: Any) -> Number:
    """Return the mean over ranks of a step's loss; of replicas, of each one's."""
    losses = None if replicas_of(svi.guide) is None else getattr(elbo_of(svi), "replica_losses", None)
    if losses is None:
        return distributed.mean_number(float(loss))
    return distributed.mean_over_ranks(losses.double()).tolist()


def norm_of_all(params: list[Tensor]) -> Number:
    """Return the norm of the gradient; of replicas, of each one's."""
    number = next((found for param in params if (found := number_in(param))), None)
    if number is None:
        return float(clip_grad_norm_(params, math.inf))  # changes nothing
    return norms([param.grad for param in params if param.grad is not None], number).tolist()


def _text(value: Any) -> str:
    if isinstance(value, frozenset) and value:
        return f"frozenset({{{', '.join(sorted(map(repr, value)))}}})"  # strings are hashed anew in each process
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))
