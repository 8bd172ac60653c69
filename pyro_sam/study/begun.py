"""What the results in a folder were begun with: other arguments, data or versions do not go on from them."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_sam.study.output import OutputError
from pyro_sam.training.checkpoint import versions
from pyro_sam.tuning.journal import kept

if TYPE_CHECKING:
    from torch import Tensor

BEGUN = "begun_with"
"""Name under which a row, or a search, keeps its arguments."""


def checksum(*parts: "Tensor") -> str:
    """Return a checksum of numbers, by which data of one name are told apart."""
    found = 0
    for part in parts:
        found = zlib.crc32(part.cpu().numpy().tobytes(), found)
    return f"{found:08x}"


def key(data: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that decides results: arguments, data, and the versions of torch, Pyro and this package.

    Args:
        data: Checksum of the data.
        arguments: The arguments by name.
    """
    installed = versions()
    installed["torch"] = installed["torch"].partition("+")[0]  # machines with and without a GPU share a study
    return {**arguments, "data": data, **{name: installed[name] for name in ("torch", "pyro-ppl", "pyro-sam")}}


def require_same(what: str, there: Mapping[str, Any] | None, here: Mapping[str, Any]) -> None:
    """Check that results may go on.

    Args:
        what: What they are and where, for the message.
        there: What they were begun with; None where they do not tell.
        here: What is asked for.
    Raises:
        OutputError: If the two differ.
    """
    if there is None:
        raise OutputError(
            f"{what} does not tell what it was begun with, an earlier version made it: give another --out."
        )
    asked = json.loads(json.dumps(here))
    for name in dict.fromkeys([*asked, *there]):
        if asked.get(name) != there.get(name):
            raise OutputError(
                f"{what} was begun with {name} {there.get(name)}, not {asked.get(name)}: "
                "give what it was begun with, or another --out."
            )


def search(file: Path, here: Mapping[str, Any], sampler: Any = None) -> Any:
    """Return the search that a file keeps, a new one where there is no file.

    Args:
        file: Optuna's journal.
        here: What decides a trial besides its settings.
        sampler: Optuna's sampler.
    Raises:
        OutputError: If the search was begun with something else.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = kept(str(file), sampler=sampler)
    there = study.user_attrs.get(BEGUN)
    if there is None and not study.trials:
        study.set_user_attr(BEGUN, dict(here))
    else:
        require_same(f"the search in {file}", there, here)
    return study
