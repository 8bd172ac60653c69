"""The command as a user runs it: what it prints, what it leaves behind, and the status it ends with."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyro_sam.study import cli

TINY = ["--epochs", "1", "--hidden", "4", "--num-samples", "2", "--seeds", "1"]


def start(*words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "import sys; from pyro_sam.study.cli import main; sys.exit(main())", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*words: str) -> tuple[int, str, str]:
    process = start(*words)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_compare_prints_a_table_and_writes_results_and_figure(tmp_path: Path) -> None:
    status, out, err = run("compare", "breast-cancer", *TINY, "--out", str(tmp_path))
    assert status == 0
    rows = re.findall(r"^(\S+) +0\.\d{4}", out, re.M)
    assert rows == ["mfvi", "sam", "random-sam", "variational-sam", "mix-sam", "ascended"]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert {run["gradients"] for run in kept["runs"]} == {8}
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert out.splitlines()[-1] == f"figure:  {tmp_path / 'compare.png'}"
    # the bar: share, time left, rate
    assert re.search(r"100%.* 48/48 \[\d\d:\d\d<\d\d:\d\d", err)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "compare.png"}


def test_a_run_that_diverges_ends_with_status_1_and_the_table_of_what_is_finished(tmp_path: Path) -> None:
    words = ["compare", "diabetes", *TINY, "--methods", "map", "sam", "--rho", "sam=1e30", "--out", str(tmp_path)]
    status, out, err = run(*words)
    assert status == 1
    assert re.search(r"^map ", out, re.M)
    assert re.search(r"stopped: sam, seed 0, step 1: .*; there was no finite loss\. Try a smaller", err)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [run["method"] for run in kept["runs"]] == ["map"]
    assert kept["stopped"]["step"] == 1


def test_control_c_in_mid_run_ends_with_status_130_and_keeps_the_finished_runs(tmp_path: Path) -> None:
    words = ["compare", "breast-cancer", "--epochs", "2000", "--hidden", "4", "--seeds", "1", "--out", str(tmp_path)]
    process = start(*words, "--num-samples", "2", "--methods", "map", "mfvi", "--batch-size", "500")
    stderr: Any = process.stderr
    seen = ""
    while "mfvi, seed 0" not in seen:
        piece = stderr.read(1)
        assert piece, seen
        seen += piece
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopped: mfvi, seed 0: interrupted" in err
    assert re.search(r"^map ", out, re.M)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [run["method"] for run in kept["runs"]] == ["map"]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["compare", "cifar"], r"argument DATASET: invalid choice: 'cifar'"),
        (["compare", "digits", "--methods", "sgd"], "--methods must be among map, .*got 'sgd'"),
        (["compare", "digits", "--out", os.devnull], f"--out {os.devnull} cannot be written to: File exists"),
        (["compare", "yacht", "--data-dir", "nowhere"], "--data-dir must be a folder, got nowhere"),
        ([], "the following arguments are required: compare"),
    ],
)
def test_what_cannot_start_ends_with_status_2_and_one_line(
    words: list[str], match: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status: Any = cli.main(words)
    except SystemExit as error:
        status = error.code
    err = capsys.readouterr().err
    assert status == 2
    assert re.search(match, err)
    assert err.count("\n") == 1


def test_labels_out_of_range_end_with_status_2_and_name_file_and_array(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = np.zeros((4, 28, 28), np.uint8), np.array([0, 1, 2, 11])
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    status = cli.main(["compare", "mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")])
    assert status == 2
    assert re.search(
        r"mnist\.npz, array 'y_train' must hold whole labels 0 to 9, got 11 in row 3", capsys.readouterr().err
    )


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_EXTRAS", ("torch", "not_a_package"))
    assert cli.main(["compare", "digits"]) == 2
    assert capsys.readouterr().err.endswith('not_a_package not installed: pip install "pyro-sam[bench]".\n')


def test_an_interrupt_before_training_ends_with_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_sam.study.arguments.seeds", interrupt)
    assert cli.main(["compare", "digits"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    process = start("datasets")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


def test_the_lists_name_every_data_set_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    from pyro_sam.study.catalogue import CATALOGUE
    from pyro_sam.study.methods import METHODS

    assert cli.main(["datasets"]) == cli.main(["methods"]) == 0
    first_words = [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()]
    assert {*CATALOGUE, *METHODS} <= set(first_words)
