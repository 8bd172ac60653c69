"""The folder that results are written to: proved writable before training, each file whole or not at all."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

_PROBE_BYTES = 1 << 20  # more than any results file and figure take


class OutputError(RuntimeError):
    """A folder that results cannot be written to."""


def prepare(out: Path, names: Sequence[str]) -> Path:
    """Create the results folder and prove that files can be written to it.

    Args:
        out: The folder.
        names: Names of the files that will be written.
    Returns:
        ``out``.
    Raises:
        OutputError: If it cannot be done: no permission, no room, or something in the way.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out, prefix=".probe-") as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise OutputError(f"--out {out} cannot be written to: {error.strerror or error}.") from error
    for name in names:
        if (out / name).is_dir():
            raise OutputError(f"--out {out} cannot be used: {out / name} is a folder, where a file is to go.")
    return out


def write(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all.

    Args:
        path: The file; its folder exists.
        data: Its content.
    Returns:
        ``path``.
    Raises:
        OutputError: If it cannot be written; an earlier file is left as it was.
    """
    # a name of its own: another process may be writing the same file
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path
