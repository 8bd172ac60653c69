"""A user's own file: what it is read as, and what is said where it cannot be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_sam.study.own import load_own
from pyro_sam.study.tables import DataError


def rows(number: int = 40, name: Any = None) -> list[list[Any]]:
    names = name or ["oak", "elm"]
    return [[k, k % 7 / 2, names[k % len(names)]] for k in range(number)]


def write(path: Path, lines: list[list[Any]], heading: str = "height,width,kind", mark: str = ",") -> Path:
    path.write_text("\n".join([heading.replace(",", mark), *(mark.join(map(str, line)) for line in lines)]))
    return path


def test_text_targets_are_classes_in_the_order_of_the_alphabet(tmp_path: Path) -> None:
    data = load_own(write(tmp_path / "trees.csv", rows()), "kind", [0, 1])
    first = data[0]
    assert (first.name, first.task, first.num_classes) == ("trees", "classification", 2)
    assert first.x_train.shape == (32, 2)
    assert len(first.y_test) == 8
    x = torch.cat([first.x_train, first.x_test])[:, 0]
    y = torch.cat([first.y_train, first.y_test])[x.argsort()]
    assert y.tolist() == [1, 0] * 20  # oak, elm
    assert not torch.equal(data[1].x_test, first.x_test)
    assert abs(float(first.x_train.mean())) < 1e-6


@pytest.mark.parametrize(
    ("targets", "task", "found", "classes"),
    [
        ([3, 5, 7], None, "classification", 3),
        ([3, 5, 7], "regression", "regression", None),
        ([0.5, 1.5], None, "regression", None),
        ([0.5, 1.5], "classification", "classification", 2),
        (list(range(30)), None, "regression", None),
    ],
)
def test_the_target_decides_the_task_unless_it_is_given(
    targets: list[Any], task: Any, found: str, classes: int | None, tmp_path: Path
) -> None:
    data = load_own(write(tmp_path / "a.csv", rows(60, targets)), None, [0], task)[0]
    assert (data.task, data.num_classes) == (found, classes)
    if found == "regression":
        y = torch.cat([data.y_train, data.y_test]) * data.y_scale + data.y_loc
        assert y.sort().values.tolist() == pytest.approx(sorted((targets * 60)[:60]), rel=1e-5)


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_the_target_may_be_any_column_and_cells_may_be_quoted(mark: str, tmp_path: Path) -> None:
    lines = [[f'"a{mark} b"' if k % 2 else "c", k, k * k] for k in range(40)]
    data = load_own(write(tmp_path / "a.csv", lines, "kind,n,square", mark), "kind", [0])[0]
    assert data.num_classes == 2
    assert data.x_train.shape[1] == 2


def test_an_archive_holds_inputs_and_a_target(tmp_path: Path) -> None:
    x, y = np.arange(120.0).reshape(20, 2, 3), np.linspace(0, 1, 20)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.savez(tmp_path / "b.npz", inputs=x, price=y)
    a = load_own(tmp_path / "a.npz", None, [0])[0]
    b = load_own(tmp_path / "b.npz", "price", [0])[0]
    assert a.task == b.task == "regression"
    assert torch.equal(a.x_train, b.x_train)
    assert a.x_train.shape == (18, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: [1, "", "oak"]}, r"a\.csv, line 5, column 'width': a finite number is needed, got ''; fill it in"),
        ({3: [1, "NA", "oak"]}, r"line 5, column 'width': a finite number is needed, got 'NA'"),
        ({3: [1, "inf", "oak"]}, r"line 5, column 'width': a finite number is needed, got 'inf'"),
        ({0: ["tall", 1, "oak"]}, r"line 2, column 'height': a number is needed, got 'tall'; turn text into numbers"),
        ({2: [1, 2, ""]}, r"line 4, column 'kind': the target is missing; leave the line out"),
        ({2: [1, 2]}, r"line 4: 3 columns are needed, got 2"),
    ],
)
def test_a_cell_that_is_no_number_is_named_by_line_and_column(
    change: dict[int, list[Any]], message: str, tmp_path: Path
) -> None:
    lines = [change.get(k, line) for k, line in enumerate(rows())]
    with pytest.raises(DataError, match=message) as error:
        load_own(write(tmp_path / "a.csv", lines), "kind", [0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "target", "task", "message"),
    [
        ("", None, None, "is empty"),
        ("a,b\n", None, None, "is empty: a data set needs a line of column names and at least one row"),
        ("1,2\n3,4\n", None, None, "must begin with a line of column names, got 1, 2"),
        ("a,b\n1,2\n", "c", None, "has no column 'c' for a target; it has a, b: --target"),
        ("a,b\n1,x\n2,y\n", "b", "regression", "column 'b' must hold numbers for a regression, got 'x'"),
        ("a,b\n1,x\n2,x\n", "b", None, "must hold at least two classes, got 'x' alone"),
        ("a,b\n1,x\n2,y\n3,x\n", "b", None, "cannot be split into training and test rows"),
    ],
)
def test_files_that_are_no_data_set_say_why(text: str, target: Any, task: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_own(tmp_path / "a.csv", target, [0], task)


def test_bytes_and_missing_files_say_why(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00\x01")
    for name in ("a.csv", "none.csv"):
        with pytest.raises(DataError, match=f"{name} cannot be read as text"):
            load_own(tmp_path / name, None, [0])


@pytest.mark.parametrize(
    ("arrays", "target", "message"),
    [
        ({"x": np.ones((4, 2))}, None, "has no array 'y' for a target; it holds x: --target"),
        (
            {"a": np.ones((4, 2)), "b": np.ones(3), "y": np.ones(4)},
            None,
            "must hold the inputs as an array 'x'; it holds a, b, y",
        ),
        ({"x": np.ones(4), "y": np.ones(4)}, None, "must hold numbers, a row for each data point"),
        ({"x": np.ones((4, 2)), "y": np.ones((4, 2))}, None, "must hold a target for each data point"),
        ({"x": np.ones((4, 2)), "y": np.arange(3.5, 6)}, None, r"has 4 rows, but .* has 3"),
        ({"x": np.full((30, 2), np.nan), "y": np.arange(30.0)}, None, "must be finite, got nan in row 0, column 0"),
    ],
)
def test_archives_that_are_no_data_set_say_why(arrays: Any, target: Any, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_own(tmp_path / "a.npz", target, [0])
