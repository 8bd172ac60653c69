"""Parameters that a new guide finds in Pyro's store under its own names, left there by an earlier guide."""

import warnings
from collections.abc import Collection, Iterable
from typing import Any

import pyro
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_made = WeakIdKeyDictionary()  # parameters that guides of this process made


def left_by_others(prefix: str) -> set[str]:
    """Return the names in the store that begin with ``prefix`` and that a guide made; not those loaded from a file."""
    store = pyro.get_param_store()
    return {name for name in store if name.startswith(prefix) and store._params[name] in _made}


def names_of(guide: Any) -> set[str]:
    """Return the names that the store has, or will have, for the parameters of a guide."""
    return {f"{guide._pyro_name}.{name.removesuffix('_unconstrained')}" for name, _ in guide.named_parameters()}


def note_made(parameters: Iterable[Tensor]) -> None:
    """Note that a guide made these parameters, which the store holds from the guide's first call on."""
    for parameter in parameters:
        _made[parameter] = True


def warn_of(taken: Collection[str]) -> None:
    """Warn of parameters that a new guide took over, if there are any."""
    if taken:
        warnings.warn(
            f"the guide is new and took over {len(taken)} parameters that the param store held, such as "
            f"'{min(taken)}'. Call pyro.clear_param_store() first to start anew.",
            stacklevel=2,
        )
