r"""Checkpoint files: one file, written whole or not at all, that says what is wrong with it and runs no code.

A file is a line ``pyro-sam checkpoint``, a line of JSON with the format's version and the payload's size and SHA-256,
and the payload: what ``torch.save`` makes of plain values and tensors, read back with ``weights_only=True``.
"""

import hashlib
import io
import json
import os
import pickle
import platform
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

MAGIC = b"pyro-sam checkpoint\n"
FORMAT = 1


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """Where :func:`pyro_sam.fit` keeps its state, and how often.

    Args:
        path: File to write; the one before it is kept beside it, as ``path`` with ``.previous`` added.
        every: Number of steps after which to write, in addition to the end of every epoch; None for epochs alone.
    Raises:
        ValueError: If ``path`` is a directory or lies in none, or ``every`` is not a positive whole number.
    """

    path: str | os.PathLike[str]
    every: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        path = Path(self.path)
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"path must be a file in a directory that exists, got path={str(path)!r}.")
        if self.every is not None and (type(self.every) is not int or self.every < 1):
            raise ValueError(f"every must be a positive whole number of steps or None, got every={self.every!r}.")


def previous(path: str | os.PathLike[str]) -> Path:
    """Return where the checkpoint before the last one is kept."""
    return Path(f"{os.fspath(path)}.previous")


def write(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a checkpoint beside ``path``, then put it in its place and keep the one that was there.

    Args:
        path: File to write.
        content: Plain values and tensors.
    Raises:
        OSError: If it cannot be written, say because the disk is full; what was there is as it was.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getvalue()
    header = {"format": FORMAT, "size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    path, beside = Path(path), Path(f"{os.fspath(path)}.part")
    try:
        with beside.open("wb") as file:
            file.write(MAGIC + json.dumps(header).encode() + b"\n" + payload)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if path.exists():
        path.replace(previous(path))
    beside.replace(path)
    _sync_directory(path.parent)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a checkpoint file.

    Raises:
        CheckpointError: If the file is foreign, of a newer format, truncated or corrupted.
        OSError: If it cannot be read.
    """
    data = Path(path).read_bytes()
    if not data.startswith(MAGIC):
        raise CheckpointError(f"{path} is no checkpoint of pyro_sam; choose another path, or move the file away.")
    line, _, payload = data[len(MAGIC) :].partition(b"\n")
    try:
        header = json.loads(line)
        version, size, digest = int(header["format"]), int(header["size"]), str(header["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is corrupted: its header cannot be read.") from error
    if version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, and this version of pyro_sam reads up to {FORMAT}; "
            "pip install --upgrade pyro-sam."
        )
    if len(payload) < size:
        raise CheckpointError(f"{path} is truncated: {len(payload)} of {size} bytes are there.")
    if hashlib.sha256(payload).hexdigest() != digest:
        raise CheckpointError(f"{path} is corrupted: its content does not have the checksum that it was written with.")
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds more than plain values and tensors, and is not loaded: {error}") from error


def read_last(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the content of the last usable checkpoint, None if none was ever written.

    A file that is not usable is named in a warning, and the previous one is read.

    Raises:
        CheckpointError: If there are files, and none is usable.
    """
    failure: CheckpointError | None = None
    for file in filter(Path.exists, (Path(path), previous(path))):
        try:
            content = read(file)
        except CheckpointError as error:
            failure = failure or error
        else:
            if failure is not None:
                warnings.warn(f"{failure} The previous checkpoint {file} is used.", stacklevel=3)
            return content
    if failure is not None:
        raise failure
    return None


def versions() -> dict[str, str]:
    """Return the versions of what a result may depend on."""
    installed = {name: metadata.version(name) for name in ("pyro-sam", "pyro-ppl", "numpy")}
    # torch's own word has the build too, such as +cu130, which a package's metadata may lack
    return {"python": platform.python_version(), "torch": str(torch.__version__), **installed}


def _sync_directory(directory: Path) -> None:
    """Make the renames last; not every system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
