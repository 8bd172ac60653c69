"""Fetching a data set: from the package that ships it, a file in the data folder, or OpenML."""

import math
import socket
import warnings
from pathlib import Path

import numpy as np

from pyro_sam.study.catalogue import UCI_NPZ, Spec
from pyro_sam.study.tables import Array, DataError, Table, check, read_csv, read_idx, read_npz

Tables = tuple[Table, ...]
_TRAIN_IMAGES = 60_000
_IMAGE_PARTS = ("x_train", "y_train", "x_test", "y_test")
SYSTEM = Path("/usr/share/datasets")  # where Debian's packages put data sets
_NETWORK_PATIENCE = 20.0  # seconds


def fetch(spec: Spec, seed: int, data_dir: Path | None) -> tuple[Tables, str]:
    """Return a data set's checked tables, and where they came from.

    Args:
        spec: Which data set.
        seed: Picks the published split where a file has several.
        data_dir: Folder with files; None to go without.
    Returns:
        One table that is still to be split, or a training and a test table; and their origin.
    Raises:
        DataError: If the data cannot be had (the message says where to get them and where to put them) or used.
    """
    if spec.bundled is not None:
        return (check(spec.bundled(), spec.num_classes),), spec.origin
    found = local(spec, seed, data_dir)
    if found is not None:
        return found
    table = check(_openml(spec, data_dir), spec.num_classes)
    return (_published_parts(table) if spec.published_split else (table,)), f"OpenML {spec.openml_id}"


def local(spec: Spec, seed: int, data_dir: Path | None) -> tuple[Tables, str] | None:
    """Return what :func:`fetch` returns where files hold it, of the data folder or of a Debian package; else None.

    Raises:
        DataError: If ``data_dir`` is no folder, or a file cannot be used.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(f"--data-dir must be a folder, got {data_dir}.")
    if not spec.image:
        return None if data_dir is None else _regression(spec, data_dir, seed)
    folders = (folder for folder in (data_dir, SYSTEM) if folder is not None)
    return next((found for folder in folders if (found := _images(spec, folder)) is not None), None)


def _images(spec: Spec, data_dir: Path) -> tuple[Tables, str] | None:
    archive = data_dir / spec.npz[0]
    if archive.is_file():
        arrays = read_npz(archive, *_IMAGE_PARTS)
        return _image_tables(spec, *((arrays[name], f"{archive}, array {name!r}") for name in _IMAGE_PARTS))
    # MNIST and Fashion-MNIST share their file names: a bare folder counts only under the data set's own name
    folders = [data_dir / name for name in spec.files] + [data_dir] * (data_dir.name in spec.files)
    for folder in folders:
        paths = [_idx_path(folder, part) for part in ("train-images", "train-labels", "t10k-images", "t10k-labels")]
        present = [path for path in paths if path is not None]
        if len(present) == len(paths):
            return _image_tables(spec, *((read_idx(path), str(path)) for path in present))
    return None


def _idx_path(folder: Path, part: str) -> Path | None:
    stem = f"{part}-idx{3 if part.endswith('images') else 1}-ubyte"
    return next((folder / name for name in (stem, f"{stem}.gz") if (folder / name).is_file()), None)


def _image_tables(spec: Spec, *parts: tuple[Array, str]) -> tuple[Tables, str]:
    tables = []
    for (x, x_name), (y, y_name) in (parts[:2], parts[2:]):
        if x.dtype.kind not in "uif" or x.ndim < 2 or math.prod(x.shape[1:]) != spec.features:
            raise DataError(f"{x_name} must hold images of {spec.features} pixels, got shape {x.shape} of {x.dtype}.")
        table = Table(x.reshape(len(x), spec.features), _numbers(y, 1, y_name), x_name, y_name)
        tables.append(check(table, spec.num_classes))
    return tuple(tables), parts[0][1].partition(", array")[0]


def _regression(spec: Spec, data_dir: Path, seed: int) -> tuple[Tables, str] | None:
    path, key = data_dir / spec.npz[0], spec.npz[1]
    if path.is_file():
        names = [f"{key}_{part}" for part in ("X", "y", "test")]
        x, y, splits = read_npz(path, *names).values()
        label = [f"{path}, array {name!r}" for name in names]
        table = check(Table(_numbers(x, 2, label[0]), _numbers(y, 1, label[1]), label[0], label[1]), None)
        if splits.dtype != bool or splits.ndim != 2 or len(splits) != len(x):
            raise DataError(f"{label[2]} must be a mask of shape ({len(x)}, splits), got {splits.shape}.")
        if seed >= splits.shape[1]:
            raise DataError(f"{label[2]} has {splits.shape[1]} published splits: seeds run from 0, got seed={seed}.")
        test = splits[:, seed]
        return (table.rows(~test), table.rows(test)), f"{path}, published split {seed}"
    for name in spec.files:
        if (data_dir / name).is_file():
            return (check(read_csv(data_dir / name, spec.features), None),), str(data_dir / name)
    return None


def _numbers(array: Array, ndim: int, name: str) -> Array:
    if array.dtype.kind not in "uif" or array.ndim != ndim:
        raise DataError(f"{name} must hold numbers in {ndim} dimension(s), got {array.dtype} of shape {array.shape}.")
    return array


def _openml(spec: Spec, data_dir: Path | None) -> Table:
    from sklearn.datasets import fetch_openml

    if spec.openml_id is None:
        raise DataError(_how_to_get(spec, data_dir, "it is not at OpenML"))
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_PATIENCE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own cache
            frame = fetch_openml(data_id=spec.openml_id, as_frame=True, n_retries=1, delay=0.1, parser="auto")
        # some copies carry a second target behind the inputs
        x = np.asarray(frame.data.iloc[:, : spec.features], dtype=float)
        y = np.asarray(frame.target, dtype=float)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(_how_to_get(spec, data_dir, f"OpenML {spec.openml_id} failed ({error})")) from error
    finally:
        socket.setdefaulttimeout(patience)
    names = tuple(str(column) for column in frame.data.columns[: spec.features])
    origin = f"OpenML {spec.openml_id}"
    return Table(x, y, f"{origin}, inputs", f"{origin}, target", names)


def _published_parts(table: Table) -> Tables:
    order = np.arange(len(table.x))
    return table.rows(order[:_TRAIN_IMAGES]), table.rows(order[_TRAIN_IMAGES:])


def _how_to_get(spec: Spec, data_dir: Path | None, why: str) -> str:
    folder = data_dir or Path("DIR")
    if spec.image:
        put = f"{folder / spec.npz[0]}, with arrays {', '.join(_IMAGE_PARTS)}"
        if spec.files:
            put += f", or the four official *-ubyte.gz files as {folder / spec.files[0]}/"
    else:
        layout = f"{spec.features} input columns, then the target"
        put = f"{folder / spec.files[0]} ({layout}), or {folder / UCI_NPZ}"
    looked = f"no file in {data_dir}" if data_dir else "no --data-dir given"
    option = "" if data_dir else " and pass --data-dir DIR"
    return f"{spec.name} is not to be had: {looked}, and {why}. Get it from {spec.url}, put it at {put}{option}."
