"""What a study has found so far: one JSON line for each finished run, and who is at work on what."""

import fcntl
import json
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyro_sam.study.begun import BEGUN, require_same
from pyro_sam.study.results import finite
from pyro_sam.tuning.journal import journal

RUNS, FLATNESS, SENSITIVITY = "runs.jsonl", "flatness.jsonl", "sensitivity.jsonl"


class Records:
    """The files of a study, shared by its processes.

    Args:
        out: Folder; it is made if need be.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)

    def read(self, file: str = RUNS) -> list[dict[str, Any]]:
        """Return the finished runs; the end of a line that was being written at a kill is left out."""
        path = self.out / file
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = [row for line in lines if (row := _row(line)) is not None]
        key = operator.itemgetter("data", "method", "seed")
        return list({(*key(row), row.get("setting"), row.get("value")): row for row in rows}.values())

    def of(self, task: Mapping[str, str], begun_with: Mapping[str, Any], file: str = RUNS) -> list[dict[str, Any]]:
        """Return the finished runs of a task.

        Args:
            task: What its rows tell of it, by name, such as data and method.
            begun_with: What its runs are to be begun with.
            file: Where they are.
        Raises:
            OutputError: If there are runs that were begun with something else.
        """
        found = [row for row in self.read(file) if all(row.get(name) == each for name, each in task.items())]
        for row in found:
            require_same(f"{', '.join(task.values())} in {self.out / file}", row.get(BEGUN), begun_with)
        return found

    def add(self, rows: list[dict[str, Any]], file: str = RUNS) -> None:
        """Append runs in one piece."""
        path = self.out / file
        with path.open("a+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            broken = opened.tell() and path.read_bytes()[-1:] != b"\n"
            text = "".join(json.dumps(finite(row)) + "\n" for row in rows)
            opened.write((("\n" if broken else "") + text).encode())

    def tuning(self, data: str, method: str) -> Path:
        """Return the file of the search of a method on a data set."""
        return self._folder("tuning") / f"{data}.{method}.log"

    def trials(self) -> dict[tuple[str, str], list[tuple[float, float]]]:
        """Return ``kl_weight`` and validation NLL of finished trials, by data set and method, of searches with any."""
        import optuna

        found = {}
        for path in sorted((self.out / "tuning").glob("*.log")):
            data, _, method = path.stem.partition(".")
            trials = optuna.load_study(study_name="tune", storage=journal(str(path))).trials
            if finished := [(each.params["kl_weight"], float(each.values[0])) for each in trials if each.values]:
                found[data, method] = finished
        return found

    @contextmanager
    def claim(self, data: str, method: str) -> Iterator[bool]:
        """Take a task, unless another process is at it; the claim ends with the process, however that ends."""
        with (self._folder("busy") / f"{data}.{method}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _folder(self, name: str) -> Path:
        folder = self.out / name
        folder.mkdir(exist_ok=True)
        return folder


def _row(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
