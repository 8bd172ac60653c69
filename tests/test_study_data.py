"""Data sets from packages, files and the network: read right, split right, refused with the file and the column."""

import gzip
import io
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest

from pyro_sam.study import sources
from pyro_sam.study.catalogue import CATALOGUE
from pyro_sam.study.datasets import load, load_splits
from pyro_sam.study.tables import DataError, Table, check, read_csv, read_idx, read_npz

RNG = np.random.default_rng(0)
IMAGES = {
    "x_train": RNG.integers(0, 256, (20, 28, 28), np.uint8),
    "y_train": np.arange(20, dtype=np.uint8) % 10,
    "x_test": RNG.integers(0, 256, (10, 28, 28), np.uint8),
    "y_test": np.arange(10, dtype=np.uint8),
}
IDX = {"x_train": "train-images-idx3", "y_train": "train-labels-idx1", "x_test": "t10k-images-idx3"}
IDX["y_test"] = "t10k-labels-idx1"


def idx(array: Any) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_npz(path: Path, **changed: Any) -> Path:
    np.savez(path, **{**IMAGES, **changed})
    return path.parent


def yacht_npz(folder: Path, **changed: Any) -> Path:
    test = np.zeros((30, 2), bool)
    test[:3, 0] = test[10:15, 1] = True
    arrays = {"yacht_X": RNG.normal(size=(30, 6)), "yacht_y": RNG.normal(size=30), "yacht_test": test}
    np.savez(folder / "uci_regression.npz", **{**arrays, **changed})
    return folder


@pytest.mark.parametrize(("name", "rows", "test"), [("digits", 1797, 360), ("breast-cancer", 569, 114)])
def test_classes_are_as_frequent_in_the_test_rows_as_in_the_training_rows(name: str, rows: int, test: int) -> None:
    data = load(name, seed=1)
    assert (len(data.x_train), len(data.x_test)) == (rows - test, test)
    shares = [np.bincount(y.numpy(), minlength=10) / len(y) for y in (data.y_train, data.y_test)]
    np.testing.assert_allclose(*shares, atol=1 / test)


def test_inputs_and_targets_are_standardised_by_the_training_rows_alone() -> None:
    data = load("diabetes")
    np.testing.assert_allclose(data.x_train.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(data.x_train.std(0, correction=0), 1, atol=1e-6)
    assert abs(data.x_test.mean(0)).max() > 1e-3
    from sklearn.datasets import load_diabetes

    targets = np.concatenate([data.y_train, data.y_test]) * data.y_scale + data.y_loc
    np.testing.assert_allclose(np.sort(targets), np.sort(load_diabetes().target), rtol=1e-5)


def test_pixels_share_one_mean_so_that_blank_borders_stay_blank() -> None:
    data = load("digits")
    assert data.x_train[:, 0].unique().numel() == 1
    np.testing.assert_allclose([data.x_train.mean(), data.x_train.std()], [0, 1], atol=1e-4)


def test_a_seed_decides_the_split() -> None:
    assert load("digits", 3).x_test.equal(load("digits", 3).x_test)
    assert not load("digits", 3).x_test.equal(load("digits", 4).x_test)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(DataError, match=r"must be one of digits, .*got 'cifar'"):
        load("cifar")


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_and_npz_give_the_same_data(tmp_path: Path, packed: bool) -> None:
    (tmp_path / "mnist").mkdir()
    for part, stem in IDX.items():
        raw = idx(IMAGES[part])
        (tmp_path / "mnist" / f"{stem}-ubyte{'.gz' * packed}").write_bytes(gzip.compress(raw) if packed else raw)
    from_idx = load("mnist", data_dir=tmp_path)
    from_npz = load("mnist", data_dir=write_npz(tmp_path / "mnist.npz"))
    assert from_idx.x_train.equal(from_npz.x_train)
    assert from_idx.y_test.equal(from_npz.y_test)
    assert from_npz.source == str(tmp_path / "mnist.npz")


def test_a_published_split_is_read_once(tmp_path: Path) -> None:
    splits = load_splits("mnist", [0, 1], write_npz(tmp_path / "mnist.npz"))
    assert splits[0] is splits[1]
    assert load_splits("digits", [0, 1])[1].x_test.equal(load("digits", 1).x_test)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"y_train": np.full(20, 10)}, r"mnist.npz, array 'y_train' must hold whole labels 0 to 9, got 10 in row 0"),
        ({"y_test": np.arange(10) - 1}, r"array 'y_test' must hold whole labels 0 to 9, got -1 in row 0"),
        ({"y_test": np.arange(10) / 2}, r"array 'y_test' must hold whole labels 0 to 9, got 0.5 in row 1"),
        ({"y_test": np.full(10, np.nan)}, r"array 'y_test' must be finite, got nan in row 0"),
        ({"y_test": np.array(["a"] * 10)}, r"array 'y_test' must hold numbers in 1 dimension"),
        ({"y_test": np.eye(10)}, r"array 'y_test' must hold numbers in 1 dimension"),
        ({"y_test": np.arange(9)}, r"array 'x_test' has 10 rows, but .*array 'y_test' has 9"),
        ({"x_train": np.full((20, 784), np.inf)}, r"array 'x_train' must be finite, got inf in row 0, column 0"),
        ({"x_train": np.zeros((20, 8, 8))}, r"array 'x_train' must hold images of 784 pixels, got shape \(20, 8, 8\)"),
        ({"x_test": np.zeros((0, 28, 28)), "y_test": np.zeros(0)}, r"array 'x_test' is empty"),
    ],
)
def test_images_that_cannot_be_learnt_from_name_file_and_array(
    tmp_path: Path, changed: dict[str, Any], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        load("mnist", data_dir=write_npz(tmp_path / "mnist.npz", **changed))


def test_npz_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.arange(1000), o=np.array([{}], dtype=object))
    whole = path.read_bytes()
    with pytest.raises(DataError, match=r"a.npz has no array 'y'; it holds x, o"):
        read_npz(path, "x", "y")
    with pytest.raises(DataError, match=r"cannot be read as .npz: Object arrays"):
        read_npz(path, "o")
    unnamed = io.BytesIO()
    np.save(unnamed, np.zeros(3))
    start = zipfile.ZipFile(path).infolist()[0].header_offset + 60
    spoilt = whole[:start] + bytes(40) + whole[start + 40 :]
    for damaged in (b"", b"text", whole[: len(whole) // 2], unnamed.getvalue(), spoilt):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a.npz cannot be read as .npz: "):
            read_npz(path, "x")


def test_idx_files_that_are_damaged_are_refused(tmp_path: Path) -> None:
    good = idx(IMAGES["x_train"])
    cases = [
        ("a", good[:-1], "promises 15680 bytes of data, but has 15679"),
        ("a", good + b"0", "promises 15680 bytes of data, but has 15681"),
        ("a", b"", "no idx file of unsigned bytes"),
        ("a", good[:6], "no idx file of unsigned bytes"),
        ("a", b"\0\0\x0d" + good[3:], "no idx file of unsigned bytes"),
        ("a.gz", good, "cannot be unpacked"),
        ("a.gz", gzip.compress(good)[:-20], "cannot be unpacked"),
    ]
    for name, data, match in cases:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=match):
            read_idx(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["a,b,y\n1,2,3\n4,5,6\n", "1;2;3\n\n4;5;6", "1 2  3\n4 5 6", "1\t2\t3\n4\t5\t6", "\ufeff1,2,3,9\n4,5,6,9"]
)
def test_text_files_are_read_with_any_separator_and_with_or_without_a_heading(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    table = read_csv(tmp_path / "a.csv", features=2)
    np.testing.assert_array_equal(table.x, [[1, 2], [4, 5]])
    np.testing.assert_array_equal(table.y, [3, 6])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "a.csv is empty: a data set needs at least one row"),
        (b"a,b,y\n", "a.csv is empty: it has a heading and no row"),
        (b"1,2,3\n1,2", "a.csv, line 2: 3 columns are needed, got 2"),
        (b"a,b,y\n1,,3", "a.csv, line 2, column 'b': a finite number is needed, got ''"),
        (b"a,b,y\n1,2,3\n1,2,NaN", "a.csv, line 3, column 'y': a finite number is needed, got 'NaN'"),
        (b"1,2,3\n1,x,3", "a.csv, line 2, column 'column 2': a finite number is needed, got 'x'"),
        (b"1,2,inf", "a.csv, line 1, column 'column 3': a finite number is needed, got 'inf'"),
        (b"\xff\xfe\x00", "a.csv cannot be read as text"),
    ],
)
def test_text_files_that_cannot_be_used_name_line_and_column(tmp_path: Path, text: bytes, match: str) -> None:
    (tmp_path / "a.csv").write_bytes(text)
    with pytest.raises(DataError, match=match):
        read_csv(tmp_path / "a.csv", features=2)


def test_blank_lines_do_not_shift_the_line_that_a_message_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b,y\n\n1,2,3\n\n1,2,?\n")
    with pytest.raises(DataError, match="line 5, column 'y'"):
        read_csv(tmp_path / "a.csv", features=2)


def test_a_column_that_is_not_finite_is_named() -> None:
    table = Table(np.array([[0.0, np.nan]]), np.zeros(1), "a file", "its target", ("age", "height"))
    with pytest.raises(DataError, match="a file must be finite, got nan in row 0, column 'height'"):
        check(table, None)


def test_a_published_regression_split_goes_by_the_seed(tmp_path: Path) -> None:
    yacht_npz(tmp_path)
    assert [len(load("yacht", seed, tmp_path).x_test) for seed in (0, 1)] == [3, 5]
    assert load("yacht", 1, tmp_path).source.endswith("uci_regression.npz, published split 1")


@pytest.mark.parametrize(
    ("seed", "changed", "match"),
    [
        (2, {}, "'yacht_test' has 2 published splits: seeds run from 0, got seed=2"),
        (0, {"yacht_test": np.zeros((9, 2), bool)}, r"'yacht_test' must be a mask of shape \(30, splits\)"),
        (0, {"yacht_test": np.zeros((30, 2))}, r"'yacht_test' must be a mask"),
        (0, {"yacht_X": np.zeros(30)}, r"'yacht_X' must hold numbers in 2 dimension"),
        (0, {"yacht_y": np.full(30, np.nan)}, r"'yacht_y' must be finite, got nan in row 0"),
    ],
)
def test_a_regression_archive_that_cannot_be_used_names_the_array(
    tmp_path: Path, seed: int, changed: dict[str, Any], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        load("yacht", seed, yacht_npz(tmp_path, **changed))


def test_too_few_rows_to_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "yacht.csv").write_text("1,2,3,4,5,6,7\n")
    with pytest.raises(DataError, match=r"yacht.csv cannot be split into training and test rows"):
        load("yacht", data_dir=tmp_path)


def test_a_data_dir_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data-dir must be a folder, got .*nowhere"):
        load("mnist", data_dir=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        (
            "mnist",
            r"OpenML 554 failed .*no network here.*"
            r"http://yann.lecun.com/exdb/mnist, put it at .*mnist.npz, "
            r"with arrays x_train, .*, or the four official .*/mnist/",
        ),
        (
            "yacht",
            r"OpenML 42370 failed .*no network here.*"
            r"https://archive.ics.uci.edu/dataset/243, put it at .*yacht.csv \(6 input columns, then the target\)",
        ),
        ("power-plant", r"not at OpenML. Get it from https://archive.ics.uci.edu/dataset/294, put it at "),
    ],
)
def test_without_file_and_network_the_error_says_where_to_get_it_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise URLError("no network here")

    monkeypatch.setattr("sklearn.datasets._openml.urlopen", no_network)
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=where):
        load(name, data_dir=tmp_path)
    with pytest.raises(DataError, match=r"no --data-dir given.*pass --data-dir DIR"):
        load(name)


def test_openml_rows_are_split_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    x = np.zeros((23, 784))
    x[20:] = 255.0
    x[:20, 0] = np.arange(20)
    frame = type("Bunch", (), {"data": pd.DataFrame(x), "target": pd.Series([str(k % 10) for k in range(23)])})
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda **kwargs: frame)
    monkeypatch.setattr(sources, "_TRAIN_IMAGES", 20)
    monkeypatch.setattr(sources, "SYSTEM", tmp_path)
    data = load("fashion-mnist")
    assert (len(data.x_train), len(data.x_test)) == (20, 3)
    assert data.y_test.tolist() == [0, 1, 2]
    assert data.source == f"OpenML {CATALOGUE['fashion-mnist'].openml_id}"
