"""The words of the command line: what they mean, and how each is refused."""

import argparse
from typing import Any

import pytest

from pyro_sam.study import arguments
from pyro_sam.study.arguments import UsageError
from pyro_sam.study.methods import METHODS
from pyro_sam.study.settings import Settings


def parse(*words: str) -> argparse.Namespace:
    parser = arguments.Parser(prog="compare")
    arguments.add_compare(parser)
    return parser.parse_args(["digits", *words])


def test_without_options_the_settings_are_the_defaults() -> None:
    args = parse()
    assert arguments.settings(args, arguments.methods(args.methods)) == Settings()
    assert arguments.seeds(args.seeds) == [0, 1, 2]


def test_every_setting_can_be_given() -> None:
    words = "--epochs 7 --batch-size 9 --hidden 5,4 --lr 0.5 --kl-weight 0 --prior-std 3 --rho sam=0.3 --kappa 2"
    words += " --alpha -1 --init-scale 0.2 --num-samples 6 --threads 2"
    got = arguments.settings(parse(*words.split()), list(METHODS))
    assert got == Settings(
        epochs=7,
        batch_size=9,
        hidden=(5, 4),
        lr=0.5,
        kl_weight=0.0,
        prior_std=3.0,
        rho={"sam": 0.3},
        kappa=2.0,
        alpha=-1.0,
        init_scale=0.2,
        num_samples=6,
        threads=2,
    )


@pytest.mark.parametrize(
    ("words", "numbers"),
    [(["3"], [0, 1, 2]), (["5,"], [5]), (["0,5"], [0, 5]), (["7", "1"], [7, 1]), (["2", "2"], [2])],
)
def test_one_number_counts_seeds_and_several_list_them(words: list[str], numbers: list[int]) -> None:
    assert arguments.seeds(words) == numbers


@pytest.mark.parametrize("words", [["a"], ["-1"], ["1.5"], [","], ["0"], ["4294967296,"]])
def test_seeds_that_are_none_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="--seeds must"):
        arguments.seeds(words)


def test_methods_are_taken_once_each_in_the_order_given() -> None:
    assert arguments.methods(["sam,mfvi", "sam"]) == ["sam", "mfvi"]


@pytest.mark.parametrize(("words", "got"), [(["sgd"], "'sgd'"), ([","], "none")])
def test_unknown_methods_are_refused(words: list[str], got: str) -> None:
    with pytest.raises(UsageError, match=f"--methods must be among map, mfvi, .*got {got}"):
        arguments.methods(words)


def test_a_radius_without_a_name_goes_to_every_chosen_method_that_has_one() -> None:
    assert arguments.radii(["0.3"], ["mfvi", "sam", "mix-sam"]) == {"sam": 0.3, "mix-sam": 0.3}
    assert arguments.radii(["0.3", "sam=2"], ["sam", "mix-sam"]) == {"sam": 2.0, "mix-sam": 0.3}


@pytest.mark.parametrize(
    ("words", "chosen", "match"),
    [
        (["mfvi=1"], ["mfvi", "sam"], "of the chosen methods sam have a radius, got 'mfvi'"),
        (["1"], ["mfvi"], r"none of the chosen methods \(mfvi\) has a radius"),
        (["sam=0"], ["sam"], "--rho must be a positive number, got '0'"),
        (["x"], ["sam"], "--rho must be a positive number, got 'x'"),
    ],
)
def test_radii_that_no_method_can_use_are_refused(words: list[str], chosen: list[str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        arguments.radii(words, chosen)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--epochs", "0", "whole number of at least 1"),
        ("--batch-size", "1.5", "whole number of at least 1"),
        ("--lr", "nan", "a positive number of at most 1e6"),
        ("--lr", "1e7", "a positive number of at most 1e6"),
        ("--kl-weight", "-1", "a non-negative number"),
        ("--alpha", "inf", "a finite number"),
        ("--init-scale", "0", "a positive number"),
        ("--threads", "0", "whole number of at least 1"),
    ],
)
def test_an_option_out_of_range_ends_the_command_with_one_line(
    option: str, value: str, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(f"{option}={value}")
    text: Any = capsys.readouterr().err
    assert exit_.value.code == 2
    assert f"argument {option}: must be" in text
    assert rule in text
    assert text.count("\n") == 1


def test_a_width_that_is_no_whole_number_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--hidden must be a whole number of at least 1, got 'x'"):
        arguments.settings(parse("--hidden", "x"), ["mfvi"])


@pytest.mark.parametrize("name", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device {name} cannot be used: "):
        arguments.device(name)
