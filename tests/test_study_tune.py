"""Settings chosen on held-out rows: what is searched, that test rows have no part, and the commands."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyro_sam.study import cli, tuning
from pyro_sam.study.datasets import Dataset, load
from pyro_sam.study.methods import METHODS
from pyro_sam.study.output import OutputError
from pyro_sam.study.settings import Settings

TINY = Settings(epochs=2, batch_size=16, hidden=(4,), num_samples=2, curve_points=1)
WORDS = ["--epochs", "2", "--hidden", "4", "--num-samples", "2", "--trials", "3"]


@pytest.fixture(autouse=True)
def single_precision() -> None:
    torch.set_default_dtype(torch.float32)


def tiny(name: str = "breast-cancer", rows: int = 60) -> Dataset:
    data = load(name)
    return dataclasses.replace(data, **{part: getattr(data, part)[:rows] for part in ("x_train", "y_train")})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_searched_and_plain_weights_are_in_it(method: str, tmp_path: Path) -> None:
    space = tuning.space(METHODS[method])
    assert space["kl_weight"].high == 1.0
    choice = tuning.choose(tiny(), method, TINY, trials=3, journal=tmp_path / "s", progress=False)
    assert choice.best.keys() == space.keys()
    assert choice.settings.kl_weight == choice.best["kl_weight"]
    assert choice.best == {name: choice.table[0][name] for name in space}
    if "rho" in space:
        assert METHODS[method].radius(choice.settings) == choice.best["rho"]
    if "alpha" in space:
        assert choice.settings.alpha == choice.best["alpha"]
    assert any(row["kl_weight"] == 1.0 for row in choice.table)
    assert dataclasses.replace(choice.settings, kl_weight=0.1, alpha=10.0, rho={}) == TINY


def test_test_rows_have_no_part_in_the_choice(tmp_path: Path) -> None:
    data = tiny()
    other = dataclasses.replace(data, x_test=data.x_test * float("nan"), y_test=data.y_test * 0)
    tables = [
        tuning.choose(each, "mfvi", TINY, trials=3, journal=tmp_path / str(k), progress=False).table
        for k, each in enumerate((data, other))
    ]
    first, second = ([row["nll"] for row in table if row["kl_weight"] == 1.0] for table in tables)
    assert first == second


def test_held_out_rows_are_a_fifth_and_no_longer_train() -> None:
    data = tiny()
    rest, (x, y) = tuning.held_out(data, 0)
    assert (len(rest.x_train), len(x), len(y)) == (48, 12, 12)
    assert torch.equal(torch.cat([rest.x_train, x]).sort(0).values, data.x_train.sort(0).values)
    assert not torch.equal(tuning.held_out(data, 1)[1][0], x)


def test_the_command_writes_choices_tables_and_picture_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", "breast-cancer", *WORDS, "--methods", "mfvi", "ascended", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "mfvi: kl_weight " in out
    kept = json.loads((tmp_path / "tune.json").read_text())
    assert kept["methods"].keys() == {"mfvi", "ascended"}
    for found in kept["methods"].values():
        assert len(found["trials"]) == 3
        assert found["test"].keys() == {"accuracy", "nll", "ece", "brier"}
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(words) == 0  # the searches are finished
    assert json.loads((tmp_path / "tune.json").read_text()) == kept
    assert cli.main([*words[:-2], "--epochs", "4", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "study was made with num_epochs=2" in err


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("mfvi", {"lr": 0.02}, "lr 0.01, not 0.02"),
        ("mfvi", {"hidden": (5,)}, r"hidden \[4\], not \[5\]"),
        ("mfvi", {"batch_size": 8}, "batch_size 16, not 8"),
        ("mfvi", {"init_scale": 0.1}, "init_scale 0.01, not 0.1"),
        ("mix-sam", {"kappa": 0.5}, "kappa 1.0, not 0.5"),
        ("mfvi", {"kl_weight": 0.2, "rho": {"sam": 0.3}, "num_samples": 3, "threads": 2}, None),
        ("mfvi", {"kappa": 0.5, "alpha": 3.0}, None),
        ("ascended", {"kappa": 0.5, "alpha": 3.0}, None),
        ("mix-sam", {"init_scale": 0.1}, None),
    ],
    ids=str,
)
def test_a_search_goes_on_with_the_settings_it_was_begun_with(
    method: str, change: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    def choose(settings: Settings, trials: int) -> tuning.Choice:
        return tuning.choose(tiny(), method, settings, trials=trials, journal=tmp_path / "s", progress=False)

    choose(TINY, 2)
    before = (tmp_path / "s").read_bytes()
    settings = dataclasses.replace(TINY, **change)
    if message is None:  # what has no part in a trial may differ
        assert len(choose(settings, 3).table) == 3
    else:
        with pytest.raises(OutputError, match=f"the search in .*/s was begun with {message}: give"):
            choose(settings, 3)
        assert (tmp_path / "s").read_bytes() == before


@pytest.mark.parametrize("part", ["x_train", "y_train"])
def test_a_search_goes_on_with_the_data_it_was_begun_with(part: str, tmp_path: Path) -> None:
    data = tiny()
    other = dataclasses.replace(data, **{part: getattr(data, part).roll(1, 0)})
    tuning.choose(data, "mfvi", TINY, trials=2, journal=tmp_path / "s", progress=False)
    with pytest.raises(OutputError, match=r"was begun with data [0-9a-f]{8}, not"):
        tuning.choose(other, "mfvi", TINY, trials=3, journal=tmp_path / "s", progress=False)


def test_compare_takes_what_was_chosen_for_each_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "compare",
        "breast-cancer",
        *WORDS,
        "--methods",
        "mfvi",
        "ascended",
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert cli.main([*words, "--tune"]) == 0
    kept = json.loads((tmp_path / "results.json").read_text())
    for method in ("mfvi", "ascended"):
        again = tuning.choose(
            load("breast-cancer"),
            method,
            dataclasses.replace(TINY, batch_size=64, curve_points=12),
            trials=3,
            journal=tmp_path / f"tune-{method}.log",
            progress=False,
        )
        assert kept["methods"][method]["kl_weight"] == again.best["kl_weight"]
        assert kept["methods"][method]["perturbation"] == repr(METHODS[method].perturbation(again.settings))
    assert len(kept["runs"]) == 2


def test_each_method_is_trained_with_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_sam.study import compare

    seen = {}

    def train(datasets: Any, method: str, settings: Settings, on_step: Any) -> list[Any]:
        seen[method] = settings
        return []

    monkeypatch.setattr(compare, "train_together", train)
    own = dataclasses.replace(TINY, kl_weight=0.7)
    compare.compare({0: tiny()}, ["mfvi", "sam"], TINY, tmp_path, lambda *args: None, {"sam": own})
    assert seen == {"mfvi": TINY, "sam": own}


@pytest.mark.parametrize("command", ["tune", "compare"])
def test_a_users_own_file_is_learnt_from(command: str, tmp_path: Path) -> None:
    lines = [f"{k},{k % 5},{'abc'[k % 3]}" for k in range(60)]
    (tmp_path / "own.csv").write_text("\n".join(["u,v,kind", *lines]))
    options = ["--methods", "mfvi", "--out", str(tmp_path / "out")]
    assert cli.main([command, "--data", str(tmp_path / "own.csv"), "--target", "kind", *WORDS, *options]) == 0
    name = {"tune": "tune.json", "compare": "results.json"}[command]
    kept = json.loads((tmp_path / "out" / name).read_text())
    assert kept["dataset"] == "own" if command == "tune" else kept["dataset"]["num_classes"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare"], "name a DATASET, or a file of your own with --data, and not both"),
        (["tune", "digits", "--data", "a.csv"], "name a DATASET, or a file of your own with --data, and not both"),
        (["compare", "digits", "--target", "y"], "--target and --task go with --data"),
        (["tune", "--data", "none.csv"], "none.csv cannot be read as text"),
        (["tune", "digits", "--methods", "sgd"], "--methods must be among"),
    ],
)
def test_what_cannot_start_ends_with_status_2_and_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_without_optuna_it_says_what_to_install(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    real = cli.importlib.util.find_spec  # type: ignore[attr-defined]
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "optuna" else real(name))  # type: ignore[attr-defined]
    assert cli.main(["tune", "breast-cancer", *WORDS, "--out", str(tmp_path)]) == 2
    assert 'optuna not installed: pip install "pyro-sam[tune]"' in capsys.readouterr().err
