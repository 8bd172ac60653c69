"""The loss of a training run: its settings as text, and the state that a checkpoint keeps of it."""

import inspect
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from pyro.infer import SVI

from pyro_sam.elbo import SAM_ELBO


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


def _text(value: Any) -> str:
    if isinstance(value, frozenset) and value:
        return f"frozenset({{{', '.join(sorted(map(repr, value)))}}})"  # strings are hashed anew in each process
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))
