"""Raw data from files: read, checked, and refused with the file's and the column's name."""

import csv
import gzip
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_IDX_OF_BYTES = b"\0\0\x08"


class DataError(ValueError):
    """A data set that cannot be had or used; the message names the file and the column or array."""


@dataclass(frozen=True)
class Table:
    """Inputs and targets of the same rows.

    Args:
        x: Inputs, shape ``(n, d)``, floating point.
        y: Targets, shape ``(n,)``: numbers or class labels.
        x_name: What messages call the inputs, for example ``"mnist.npz, array 'x_train'"``.
        y_name: The same for the targets.
        columns: Names of the ``d`` inputs where the file gives them.
    """

    x: Array
    y: Array
    x_name: str
    y_name: str
    columns: tuple[str, ...] = ()

    def rows(self, index: Array) -> "Table":
        """Return the rows that ``index`` (numbers or a mask) picks."""
        return Table(self.x[index], self.y[index], self.x_name, self.y_name, self.columns)


def check(table: Table, num_classes: int | None) -> Table:
    """Return ``table`` if it can be learnt from.

    Args:
        table: Rows as read.
        num_classes: Number of classes, or None for regression.
    Raises:
        DataError: If it is empty, its lengths differ, a number is not finite, or a label is out of range.
    """
    if len(table.x) == 0 or table.x.size == 0:
        raise DataError(f"{table.x_name} is empty: a data set needs at least one row and one column.")
    if len(table.x) != len(table.y):
        raise DataError(f"{table.x_name} has {len(table.x)} rows, but {table.y_name} has {len(table.y)}.")
    bad = np.argwhere(~np.isfinite(table.x))
    if len(bad):
        row, column = bad[0]
        name = f"column {table.columns[column]!r}" if table.columns else f"column {column}"
        raise DataError(f"{table.x_name} must be finite, got {table.x[row, column]} in row {row}, {name}.")
    _check_targets(table, num_classes)
    return table


def _check_targets(table: Table, num_classes: int | None) -> None:
    bad = np.argwhere(~np.isfinite(table.y))
    if len(bad):
        raise DataError(f"{table.y_name} must be finite, got {table.y[bad[0, 0]]} in row {bad[0, 0]}.")
    if num_classes is None:
        return
    bad = np.argwhere((table.y < 0) | (table.y >= num_classes) | (table.y != np.round(table.y)))
    if len(bad):
        row = bad[0, 0]
        rule = f"must hold whole labels 0 to {num_classes - 1}"
        raise DataError(f"{table.y_name} {rule}, got {table.y[row]} in row {row}.")


def read_npz(path: Path, *names: str) -> Mapping[str, Array]:
    """Return the named arrays of a ``.npz`` file, or all of them.

    Raises:
        DataError: If the file is no such archive, or an array is missing or no array of numbers.
    """
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} cannot be read as .npz: it holds one array without a name.")
            names = names or tuple(archive)
            missing = [name for name in names if name not in archive]
            if missing:
                held = ", ".join(archive) or "nothing"
                raise DataError(f"{path} has no array {missing[0]!r}; it holds {held}.")
            return {name: archive[name] for name in names}
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}") from error


def read_idx(path: Path) -> Array:
    """Return the bytes of an idx file, the format that MNIST is published in; ``.gz`` is unpacked.

    Raises:
        DataError: If the file is damaged, or holds anything but unsigned bytes.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from error
    if data[:3] != _IDX_OF_BYTES or len(data) < 4 + 4 * data[3]:
        raise DataError(f"{path} is no idx file of unsigned bytes.")
    head = 4 + 4 * data[3]
    shape = tuple(int(size) for size in np.frombuffer(data[4:head], ">u4"))
    if len(data) - head != math.prod(shape):
        raise DataError(f"{path} is damaged: it promises {math.prod(shape)} bytes of data, but has {len(data) - head}.")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def read_csv(path: Path, features: int) -> Table:
    """Return the first ``features`` columns of a text file as inputs and the next one as target.

    Commas, semicolons, tabs and blanks separate columns; a first line that is not all numbers is the heading.

    Raises:
        DataError: If the file is empty, a line is short, or a cell is no finite number (line and column are named).
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
    rows = [(place, _cells(line)) for place, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} is empty: a data set needs at least one row.")
    width = features + 1
    heading = rows.pop(0)[1] if any(number(cell) is None for cell in rows[0][1]) else []
    columns = (heading + [f"column {k + 1}" for k in range(len(heading), width)])[:width]
    if not rows:
        raise DataError(f"{path} is empty: it has a heading and no row.")
    values = np.array([_values(path, place, cells, columns) for place, cells in rows])
    return Table(values[:, :-1], values[:, -1], str(path), f"{path}, column {columns[-1]!r}", tuple(columns[:-1]))


def _cells(line: str) -> list[str]:
    for delimiter in (";", ",", "\t"):
        if delimiter in line:
            return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]
    return line.split()


def number(cell: str) -> float | None:
    """Return the number, NaN for a marker of a missing value, or None for other text."""
    if cell.lower() in ("", "?", "na", "n/a", "nan", "null"):
        return float("nan")
    try:
        return float(cell)
    except ValueError:
        return None


def _values(path: Path, line: int, row: list[str], columns: list[str]) -> list[float]:
    if len(row) < len(columns):
        raise DataError(f"{path}, line {line}: {len(columns)} columns are needed, got {len(row)}.")
    values = []
    for cell, column in zip(row, columns, strict=False):
        value = number(cell)
        if value is None or not np.isfinite(value):
            raise DataError(f"{path}, line {line}, column {column!r}: a finite number is needed, got {cell!r}.")
        values.append(value)
    return values
