"""The processes that search together: who they are, and whether they live."""

import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

_searching: set[str] = set()  # the searches of this process


class Worker:
    """This search of this process, as the others see it in the study.

    One that searches in the same place is looked up among its processes. Of another a counter is watched that it moves
    on, by this process's own clock, so that clocks need not agree.

    Args:
        study: The study that all share.
        patience: Seconds without a sign of life after which a process elsewhere is taken for dead.
    """

    def __init__(self, study: Any, patience: float) -> None:
        self._study, self._patience = study, patience
        self._token = uuid4().hex
        self.name = json.dumps([self._token, _place(), os.getpid(), _started(os.getpid())])
        self._seen: dict[str, tuple[Any, float]] = {}

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give signs of life during the body."""
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        _searching.add(self._token)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            _searching.discard(self._token)

    def is_dead(self, name: str) -> bool:
        """Return whether another search has ended without an end."""
        with suppress(ValueError):
            token, place, pid, started = json.loads(name)
            if place is not None and place == _place():
                if pid == os.getpid():
                    return token not in _searching
                return started != _started(pid)
        beat, now = self._study.user_attrs.get(_key(name)), time.monotonic()
        known, since = self._seen.get(name, (None, now))
        if name not in self._seen or beat != known:
            self._seen[name] = (beat, now)
            return False
        return now - since > self._patience

    def _beat(self, stop: threading.Event) -> None:
        count = 0
        while True:
            count += 1
            with suppress(Exception):  # a storage that is away for a moment
                self._study.set_user_attr(_key(self.name), count)
            if stop.wait(self._patience / 4):
                return


def _key(name: str) -> str:
    return f"pyro_sam beat of {name}"


def _place() -> str | None:
    """Return what names the processes that this one can look up; None where it cannot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return when a process started, which tells it from a later one of the same number; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
