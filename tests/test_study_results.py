"""What a comparison keeps: the file after every run, the table, the figure; folders that cannot be written to."""

import dataclasses
import errno
import json
import multiprocessing
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyro_sam.study import compare as compare_module
from pyro_sam.study.compare import compare, total_gradients
from pyro_sam.study.datasets import Dataset, load
from pyro_sam.study.evaluate import METRICS
from pyro_sam.study.output import OutputError, prepare, write
from pyro_sam.study.report import figure, table
from pyro_sam.study.results import RESULTS, Results
from pyro_sam.study.settings import Settings
from pyro_sam.study.train import Diverged, Run

SETTINGS = Settings(rho={"sam": 0.3})


def a_run(method: str = "mfvi", seed: int = 0, name: str = "digits", **metrics: float) -> Run:
    values = dict.fromkeys(METRICS[load(name).task], 0.5) | metrics
    curve = [{"gradients": 10.0 * k, "loss": 9.0 / k, **values, "nll": 0.5 / k} for k in (1, 2)]
    return Run(method, seed, steps=10, gradients=20, seconds=2.0, metrics=values, curve=curve)


def results_of(*runs: Run, name: str = "digits") -> Results:
    seeds = dict.fromkeys(run.seed for run in runs) or {0: None}
    methods = dict.fromkeys(run.method for run in runs)
    results = Results(dict.fromkeys(seeds, load(name)), list(methods), SETTINGS)
    results.runs += runs
    return results


@pytest.fixture
def fake_train(monkeypatch: pytest.MonkeyPatch) -> dict[str, BaseException]:
    """Replaces training by a made-up run; what the returned dictionary holds for a method is raised instead."""
    failures: dict[str, BaseException] = {}

    def train(datasets: Mapping[int, Dataset], method: str, settings: Settings, on_step: Any) -> list[Run]:
        if method in failures:
            raise failures[method]
        for seed in datasets:
            on_step(seed, 2, 0.25)
        return [a_run(method, seed) for seed in datasets]

    monkeypatch.setattr(compare_module, "train_together", train)
    return failures


def stored(folder: Path) -> Any:
    return json.loads((folder / RESULTS).read_text())


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_the_summary_is_mean_and_sample_deviation_over_seeds() -> None:
    results = results_of(*(a_run(seed=k, accuracy=value) for k, value in enumerate((0.25, 0.5, 1.0))), a_run("sam"))
    moments = results.summary()["mfvi"]["accuracy"]
    mean = 1.75 / 3
    std = (((0.25 - mean) ** 2 + (0.5 - mean) ** 2 + (1 - mean) ** 2) / 2) ** 0.5
    assert moments == {"mean": pytest.approx(mean), "std": pytest.approx(std), "runs": 3}
    assert results.summary()["sam"]["accuracy"]["std"] is None


def test_the_file_holds_every_setting_seed_and_version(tmp_path: Path) -> None:
    results_of(a_run(seed=4), a_run("sam", seed=4)).save(tmp_path)
    kept = stored(tmp_path)
    assert set(kept["settings"]) == {"methods", "seeds", *(field.name for field in dataclasses.fields(Settings))}
    assert kept["settings"]["seeds"] == [4]
    assert kept["methods"]["sam"]["perturbation"].startswith("Adversarial(rho=0.3")
    assert kept["methods"]["sam"]["gradients_per_step"] == 2
    assert kept["dataset"]["splits"]["4"] == {"train": 1437, "test": 360, "source": "ships with scikit-learn"}
    import torch

    assert kept["versions"]["torch"] == torch.__version__
    assert {"python", "pyro-sam", "pyro-ppl", "numpy", "scikit-learn"} <= set(kept["versions"])


def test_numbers_that_json_has_no_word_for_are_null(tmp_path: Path) -> None:
    results_of(a_run(nll=float("inf"))).save(tmp_path)
    assert stored(tmp_path)["runs"][0]["metrics"]["nll"] is None


def test_results_are_kept_after_every_run(tmp_path: Path, fake_train: dict[str, BaseException]) -> None:
    kept: list[int] = []
    methods = ["mfvi", "sam"]
    datasets = {seed: load("digits", seed) for seed in (0, 1)}
    compare(datasets, methods, SETTINGS, tmp_path, lambda *step: kept.append(len(stored(tmp_path)["runs"])))
    assert kept == [0, 0, 2, 2]  # the seeds of a method are trained together
    assert len(stored(tmp_path)["runs"]) == 4
    assert total_gradients(datasets, methods, SETTINGS) == 4 * 60 * 23


def test_an_earlier_comparison_in_the_folder_does_not_pass_for_this_one(
    tmp_path: Path, fake_train: dict[str, BaseException]
) -> None:
    results_of(a_run("map")).save(tmp_path)
    fake_train["mfvi"] = KeyboardInterrupt()
    compare({0: load("digits")}, ["mfvi"], SETTINGS, tmp_path, lambda *step: None)
    assert stored(tmp_path)["runs"] == []


def test_a_run_that_diverges_ends_the_comparison_and_keeps_what_is_finished(
    tmp_path: Path, fake_train: dict[str, BaseException]
) -> None:
    fake_train["sam"] = Diverged("the loss is nan", "sam", 0, 12, 3.5)
    results = compare({0: load("digits")}, ["mfvi", "sam", "map"], SETTINGS, tmp_path, lambda *step: None)
    kept = stored(tmp_path)
    assert [run["method"] for run in kept["runs"]] == ["mfvi"]
    message = "sam, seed 0, step 12: the loss is nan; last finite loss 3.5. Try a smaller --lr or --rho."
    stopped = {"method": "sam", "seed": 0, "step": 12, "what": "the loss is nan", "last_finite_loss": 3.5}
    assert kept["stopped"] == results.stopped == {**stopped, "message": message}


def test_an_interrupt_ends_the_comparison_and_keeps_what_is_finished(
    tmp_path: Path, fake_train: dict[str, BaseException]
) -> None:
    fake_train["sam"] = KeyboardInterrupt()
    compare({0: load("digits")}, ["mfvi", "sam", "map"], SETTINGS, tmp_path, lambda *step: None)
    kept = stored(tmp_path)
    assert [run["method"] for run in kept["runs"]] == ["mfvi"]
    assert kept["stopped"]["message"] == "sam, seed 0: interrupted"


def test_a_write_that_fails_leaves_the_earlier_file_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a", b"before")

    def half(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OutputError, match="a cannot be written: No space left on device"):
        write(path, b"after")
    assert path.read_bytes() == b"before"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def write_often(path: Path, letter: bytes, start: Any) -> None:
    start.wait()
    for size in range(1, 500):
        write(path, letter * 1000 * size)


def test_two_processes_that_write_one_file_leave_it_whole(tmp_path: Path) -> None:
    path = tmp_path / RESULTS
    processes = multiprocessing.get_context("spawn")
    start = processes.Barrier(2)
    writers = [processes.Process(target=write_often, args=(path, letter, start)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            data = path.read_bytes()
            assert len(set(data)) == 1
            assert len(data) % 1000 == 0
            seen += 1
    assert seen > 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == [RESULTS]


def test_a_folder_is_made_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    assert list(prepare(tmp_path / "a" / "b", [RESULTS]).iterdir()) == []


def test_a_file_in_the_way_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    for out in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(OutputError, match=r"--out .*a.* cannot be written to: (File exists|Not a directory)"):
            prepare(out, [RESULTS])


def test_a_folder_in_the_way_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / RESULTS).mkdir()
    with pytest.raises(OutputError, match=r"results\.json is a folder, where a file is to go"):
        prepare(tmp_path, [RESULTS])


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path, "ro"), pytest.raises(OutputError, match="cannot be written to: Read-only file system"):
        prepare(tmp_path, [RESULTS])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written to: Permission denied"):
        prepare(tmp_path / "a", [RESULTS])


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path, "size=64k"), pytest.raises(OutputError, match="cannot be written to: No space left"):
        prepare(tmp_path, [RESULTS])


def test_a_disk_that_reports_no_room_only_when_it_is_made_to_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written to: No space left on device"):
        prepare(tmp_path, [RESULTS])


def test_the_table_has_a_line_per_method_with_mean_and_deviation_over_seeds() -> None:
    runs = (a_run(seed=0, accuracy=0.9), a_run(seed=1, accuracy=0.8), a_run("sam", accuracy=0.7))
    lines = table(results_of(*runs)).splitlines()
    assert lines[0].split() == ["method", "accuracy", "nll", "ece", "brier", "steps", "gradients", "seconds"]
    assert lines[2].split()[:4] == ["mfvi", "0.8500", "±", "0.0707"]
    assert lines[2].split()[-3:] == ["10", "20", "2.0"]
    assert lines[3].split()[:3] == ["sam", "0.7000", "0.5000"]
    assert lines[-1].startswith("accuracy: higher is better; nll: lower is better")


@pytest.mark.parametrize(("name", "metric"), [("digits", "nll"), ("diabetes", "rmse")])
def test_the_figure_shows_every_method_and_the_values(tmp_path: Path, name: str, metric: str) -> None:
    from matplotlib.image import imread

    def drawn(value: float, *methods: str) -> np.ndarray[Any, Any]:
        runs = [a_run(method, seed, name, **{metric: value + seed}) for method in methods for seed in (0, 1)]
        return imread(figure(results_of(*runs, name=name), tmp_path))[..., :3]

    pixels = drawn(0.5, "mfvi", "sam")
    assert pixels.shape[0] >= 400
    assert pixels.shape[1] >= 1400
    for color in ((31, 119, 180), (255, 127, 14)):
        near = (abs(pixels - np.array(color) / 255) < 0.02).all(-1)
        thirds = np.array_split(near, 3, axis=1)
        assert all(third.sum() > 50 for third in thirds)
    assert (pixels == drawn(0.5, "mfvi", "sam")).all()
    assert (pixels != drawn(0.7, "mfvi", "sam")).any()


def text_boxes(axis: Any) -> list[Any]:
    """Return where an axis puts its name and the labels of the ticks in view, in pixels."""
    low, high = sorted(axis.get_view_interval())
    along = 0 if axis.axis_name == "x" else 1
    labels = [label for label in axis.get_ticklabels() if low <= label.get_position()[along] <= high]
    texts = [text for text in (*labels, axis.label) if text.get_visible() and text.get_text()]
    return [text.get_window_extent() for text in texts]


def test_no_text_of_the_figure_is_clipped_or_covers_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    kept: list[Figure] = []

    def savefig(self: Figure, *args: Any, **kwargs: Any) -> None:
        self.canvas.draw()
        kept.append(self)

    monkeypatch.setattr(Figure, "savefig", savefig)
    methods = ("map", "mfvi", "sam", "random-sam", "variational-sam", "mix-sam", "ascended")
    figure(
        results_of(*(a_run(m, nll=0.0786 + k / 300, accuracy=0.975 + k / 900) for k, m in enumerate(methods))), tmp_path
    )
    boxes = [box for axes in kept[0].axes for axis in (axes.xaxis, axes.yaxis) for box in text_boxes(axis)]
    whole = kept[0].bbox
    assert len(boxes) > 20
    assert all(b.x0 >= whole.x0 and b.x1 <= whole.x1 and b.y0 >= whole.y0 and b.y1 <= whole.y1 for b in boxes)
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    names = [axes.xaxis.label.get_window_extent() for axes in kept[0].axes]
    assert all(right.x0 - left.x1 > 40 for left, right in pairwise(names))


def test_the_dots_of_seeds_do_not_hide_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: kept.append(self))
    figure(results_of(*(a_run("sam", seed) for seed in range(5))), tmp_path)
    dots, _ = kept[0].axes[0].lines
    assert len(set(dots.get_xdata())) == 1  # the same value
    assert len(set(dots.get_ydata())) == 5
    assert max(abs(dots.get_ydata())) < 0.5  # in the method's own row
