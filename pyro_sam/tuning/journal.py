"""The journal file of a search, with a lock that ends with the process that holds it."""

import os
import threading
from typing import Any

from pyro_sam.tuning.space import optuna

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None  # type: ignore[assignment]


def journal(path: str) -> Any:
    """Return Optuna's storage in a file.

    Optuna's own lock outlives a process that is killed while it writes, by half a minute in which all others wait.
    """
    storages = optuna().storages
    lock = None if fcntl is None else Lock(f"{path}.flock")
    return storages.JournalStorage(storages.journal.JournalFileBackend(path, lock_obj=lock))


def kept(path: str, **settings: Any) -> Any:
    """Return the study that a file keeps, a new one where it keeps none.

    Args:
        path: The file.
        **settings: Its sampler and its pruner.
    """
    storage, name = journal(path), "tune"
    if name in optuna().get_all_study_names(storage):  # to create it writes to the file, even where it is there
        return optuna().load_study(study_name=name, storage=storage, **settings)
    return optuna().create_study(study_name=name, storage=storage, load_if_exists=True, **settings)


class Lock:
    """A lock of the operating system's, as Optuna's journal takes one.

    Args:
        path: A file beside the journal.
    """

    def __init__(self, path: str) -> None:
        self._path, self._held = path, threading.local()

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._held.file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._held.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Let others have it."""
        os.close(self._held.file)
