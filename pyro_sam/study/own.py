"""A user's own data: a CSV file with a heading, or an ``.npz`` archive, and the name of the target."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyro_sam.study.catalogue import Spec, Task
from pyro_sam.study.datasets import Dataset, split
from pyro_sam.study.tables import Array, DataError, Table, check, number, read_npz

_CLASSES = 20  # whole numbers of no more values than this are classes, unless --task says otherwise


def load_own(path: Path, target: str | None, seeds: Sequence[int], task: Task | None = None) -> dict[int, Dataset]:
    """Return the splits of a user's own file, one for each seed.

    Args:
        path: A text file whose first line names the columns, or an ``.npz`` archive with an array of the inputs, ``x``
            or the only one besides the target's, and one of the targets.
        target: Name of the column, or of the array; None for the last column, or the array ``y``.
        seeds: Equal seeds give equal splits.
        task: ``"classification"`` or ``"regression"``; None for classification where the target is text, or whole
            numbers of at most 20 values.
    Raises:
        DataError: If the file cannot be read, has no such target, or a cell that is no finite number.
    """
    x, y, columns, x_name, y_name = (_archive if path.suffix == ".npz" else _text)(path, target)
    classes = np.unique(y)
    if task is None:
        task = "classification" if y.dtype.kind in "USb" or _is_whole(y, classes) else "regression"
    if task == "regression" and y.dtype.kind in "USb":
        raise DataError(f"{y_name} must hold numbers for a regression, got {str(classes[0])!r}.")
    if task == "classification":
        y = np.searchsorted(classes, y)
        if len(classes) < 2:
            raise DataError(f"{y_name} must hold at least two classes, got {str(classes[0])!r} alone.")
    num_classes = len(classes) if task == "classification" else None
    table = check(Table(x, y.astype(float), x_name, y_name, columns), num_classes)
    spec = Spec(path.stem, task, f"{len(x)} rows", num_classes=num_classes, features=x.shape[1])
    return {seed: split(spec, (table,), str(path), seed) for seed in seeds}


def _is_whole(y: Array, classes: Array) -> bool:
    return len(classes) <= _CLASSES and bool(np.isfinite(classes).all() and (classes == np.round(classes)).all())


def _archive(path: Path, target: str | None) -> tuple[Array, Array, tuple[str, ...], str, str]:
    arrays = read_npz(path)
    name = target or "y"
    others = [each for each in arrays if each != name]
    if name not in arrays:
        raise DataError(
            f"{path} has no array {name!r} for a target; it holds {', '.join(arrays) or 'nothing'}: --target."
        )
    inputs = "x" if "x" in others else others[0] if len(others) == 1 else None
    if inputs is None:
        raise DataError(f"{path} must hold the inputs as an array 'x'; it holds {', '.join(arrays)}.")
    x, y = arrays[inputs], arrays[name]
    x_name, y_name = f"{path}, array {inputs!r}", f"{path}, array {name!r}"
    if x.dtype.kind not in "buif" or x.ndim < 2:
        raise DataError(f"{x_name} must hold numbers, a row for each data point, got {x.dtype} of shape {x.shape}.")
    if y.dtype.kind not in "buifUS" or y.ndim != 1:
        raise DataError(f"{y_name} must hold a target for each data point, got {y.dtype} of shape {y.shape}.")
    return x.reshape(len(x), -1).astype(float), y, (), x_name, y_name


def _text(path: Path, target: str | None) -> tuple[Array, Array, tuple[str, ...], str, str]:
    heading, rows = _lines(path)
    name = heading[-1] if target is None else target
    if name not in heading:
        raise DataError(f"{path} has no column {name!r} for a target; it has {', '.join(heading)}: --target.")
    place = heading.index(name)
    cells = [row[place] for _, row in rows]
    values = [number(cell) for cell in cells]
    empty = next((k for k, value in enumerate(values) if value is not None and np.isnan(value)), None)
    if empty is not None:
        raise DataError(f"{path}, line {rows[empty][0]}, column {name!r}: the target is missing; leave the line out.")
    y = np.array(cells if None in values else values)
    x = [[_input(path, line, heading[k], cell) for k, cell in enumerate(row) if k != place] for line, row in rows]
    columns = (*heading[:place], *heading[place + 1 :])
    return np.array(x).reshape(len(rows), -1), y, columns, str(path), f"{path}, column {name!r}"


def _lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the heading, and each row with the number of its line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            delimiter = max(",;\t", key=first.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
    if len(lines) < 2:
        raise DataError(f"{path} is empty: a data set needs a line of column names and at least one row.")
    (_, heading), *rows = lines
    if all(number(cell) is not None for cell in heading):
        raise DataError(f"{path} must begin with a line of column names, got {', '.join(heading[:5])}.")
    for line, row in rows:
        if len(row) != len(heading):
            raise DataError(f"{path}, line {line}: {len(heading)} columns are needed, got {len(row)}.")
    return heading, rows


def _input(path: Path, line: int, column: str, cell: str) -> float:
    value = number(cell)
    if value is None:
        raise DataError(
            f"{path}, line {line}, column {column!r}: a number is needed, got {cell!r}; turn text into numbers, or "
            "leave the column out."
        )
    if not np.isfinite(value):
        raise DataError(
            f"{path}, line {line}, column {column!r}: a finite number is needed, got {cell!r}; fill it in, or leave "
            "the line out."
        )
    return value
