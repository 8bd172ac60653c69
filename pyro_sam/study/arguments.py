"""The command line's words, turned into checked values."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pyro_sam.study.catalogue import CATALOGUE
from pyro_sam.study.settings import Settings

if TYPE_CHECKING:
    from pyro_sam.study.datasets import Dataset

_DEFAULTS = Settings()
# the paper's methods; `map` is there for the asking
DEFAULT_METHODS = ("mfvi", "sam", "random-sam", "variational-sam", "mix-sam", "ascended")


class UsageError(ValueError):
    """An option that cannot be used; the message is one line."""


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def number(rule: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """Return a converter to a finite float that obeys a rule."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return convert


def whole(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


_positive = number("a positive number", lambda value: value > 0)
# far beyond any use; torch's optimisers fail in float32 somewhat above
_rate = number("a positive number of at most 1e6", lambda value: 0 < value <= 1e6)
_non_negative = number("a non-negative number", lambda value: value >= 0)
_finite = number("a finite number", lambda value: True)


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``pyro-sam compare``."""
    _add_shared(parser, DEFAULT_METHODS)
    add = parser.add_argument
    add("--tune", action="store_true", help="choose kl-weight and each method's number on held-out training rows first")
    add("--trials", type=whole, default=32, help="trials of each method with --tune [%(default)s]")
    add("--kappa", type=_non_negative, default=_DEFAULTS.kappa, help="random share of mix-sam [%(default)s]")


def add_tune(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``pyro-sam tune``."""
    _add_shared(parser, ("ascended",))
    add = parser.add_argument
    add(
        "--trials",
        type=whole,
        default=64,
        help="trials of each method, those of other processes included [%(default)s]",
    )
    parser.set_defaults(kappa=_DEFAULTS.kappa)


def _add_shared(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    add = parser.add_argument
    add("dataset", nargs="?", choices=CATALOGUE, metavar="DATASET", help=f"one of {', '.join(CATALOGUE)}")
    add("--data", type=Path, metavar="FILE", help="a CSV file with column names, or .npz, in the place of DATASET")
    add("--target", metavar="COLUMN", help="what --data is to predict [the last column, or the array y]")
    add("--task", choices=("classification", "regression"), help="of --data [by the target's values]")
    add("--out", type=Path, metavar="DIR", help="folder for the results [results/DATASET]")
    known = f"[{' '.join(methods)}]; also {', '.join(sorted({*DEFAULT_METHODS, 'map'} - set(methods)))}"
    add("--methods", nargs="+", metavar="NAME", default=list(methods), help=known)
    add(
        "--epochs",
        type=whole,
        default=_DEFAULTS.epochs,
        help="budget in gradients of the whole training set [%(default)s]",
    )
    add(
        "--seeds",
        nargs="+",
        default=["3"],
        metavar="N",
        help="how many seeds (3 means 0,1,2), or a list such as 0,5 [3]",
    )
    add("--device", default=_DEFAULTS.device, help="torch device, for example cuda [%(default)s]")
    add("--threads", type=whole, default=_DEFAULTS.threads, help="threads of torch on the CPU [%(default)s]")
    add("--batch-size", type=whole, default=_DEFAULTS.batch_size, help="[%(default)s]")
    hidden = " ".join(map(str, _DEFAULTS.hidden))
    add("--hidden", nargs="+", default=[hidden], metavar="WIDTH", help=f"widths of the hidden layers [{hidden}]")
    add("--lr", type=_rate, default=_DEFAULTS.lr, help="Adam's learning rate at the start [%(default)s]")
    add(
        "--kl-weight",
        type=_non_negative,
        default=_DEFAULTS.kl_weight,
        help="weight of the KL, 1 for the ELBO [%(default)s]",
    )
    add(
        "--prior-std",
        type=_positive,
        default=_DEFAULTS.prior_std,
        help="prior sd of a weight, times root fan-in [%(default)s]",
    )
    rho = "radius, for every method that has one (0.1) or by name (sam=0.1 variational-sam=1)"
    add("--rho", nargs="+", default=[], metavar="R", help=f"{rho}; see `pyro-sam methods` for units and defaults")
    add("--alpha", type=_finite, default=_DEFAULTS.alpha, help="climb of ascended, in posterior sd [%(default)s]")
    add(
        "--init-scale", type=_positive, default=_DEFAULTS.init_scale, help="first scale of a learnt guide [%(default)s]"
    )
    add("--num-samples", type=whole, default=_DEFAULTS.num_samples, help="weight samples of a prediction [%(default)s]")
    add("--data-dir", type=Path, metavar="DIR", help="folder with data files; see `pyro-sam datasets`")


def data(args: argparse.Namespace, seeds: Sequence[int]) -> "dict[int, Dataset]":
    """Return the splits of the data set that is named, or of the user's own file.

    Raises:
        UsageError: If none is named, or both.
        DataError: If the data cannot be had.
    """
    from pyro_sam.study.datasets import load_splits
    from pyro_sam.study.own import load_own

    if (args.dataset is None) == (args.data is None):
        raise UsageError("name a DATASET, or a file of your own with --data, and not both.")
    if args.data is not None:
        return load_own(args.data, args.target, seeds, args.task)
    if args.target or args.task:
        raise UsageError("--target and --task go with --data.")
    return load_splits(args.dataset, seeds, args.data_dir)


def words(values: Sequence[str]) -> list[str]:
    """Return what blanks and commas separate."""
    return [word for value in values for word in value.split(",") if word]


def methods(values: Sequence[str]) -> list[str]:
    """Return the methods that are named, each once.

    Raises:
        UsageError: If a name is unknown.
    """
    from pyro_sam.study.methods import METHODS

    names = list(dict.fromkeys(words(values)))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        got = repr(unknown[0]) if unknown else "none"
        raise UsageError(f"--methods must be among {', '.join(METHODS)}, got {got}.")
    return names


def seeds(values: Sequence[str]) -> list[int]:
    """Return the seeds: of one number that many, from 0; of several, or with a comma, these.

    Raises:
        UsageError: If one is no whole number.
    """
    names = words(values)
    if not names or not all(name.isdecimal() for name in names):
        raise UsageError(f"--seeds must be whole numbers, got {' '.join(values)!r}.")
    listed = len(names) > 1 or "," in values[0]
    numbers = [int(name) for name in names] if listed else list(range(int(names[0])))
    if not numbers or max(numbers) >= 2**32:
        raise UsageError(f"--seeds must name at least one seed below 2**32, got {' '.join(values)!r}.")
    return list(dict.fromkeys(numbers))


def radii(values: Sequence[str], chosen: Sequence[str]) -> dict[str, float]:
    """Return the radius of each chosen method that was given one.

    Raises:
        UsageError: If a value is no positive number, or a method is not chosen or has no radius.
    """
    from pyro_sam.study.methods import METHODS

    having = [name for name in chosen if METHODS[name].rho is not None]
    given: dict[str, float] = {}
    for word in words(values):
        name, equals, text = word.rpartition("=")
        if equals and name not in having:
            raise UsageError(f"--rho: of the chosen methods {', '.join(having) or 'none'} have a radius, got {name!r}.")
        try:
            value = _positive(text)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"--rho {error}.") from None
        given.update({name: value} if equals else dict.fromkeys(having, value))
    if values and not given:
        raise UsageError(f"--rho: none of the chosen methods ({', '.join(chosen)}) has a radius.")
    return given


def device(name: str) -> str:
    """Return ``name`` if torch can put a tensor there.

    Raises:
        UsageError: If it cannot.
    """
    import torch

    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name} cannot be used: {reason}") from error
    return name


def settings(args: argparse.Namespace, chosen: Sequence[str]) -> Settings:
    """Return the settings that the options ask for.

    Raises:
        UsageError: If an option cannot be used.
    """
    try:
        hidden = tuple(whole(word) for word in words(args.hidden))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--hidden {error}.") from None
    return Settings(
        epochs=args.epochs,
        batch_size=args.batch_size,
        hidden=hidden,
        lr=args.lr,
        kl_weight=args.kl_weight,
        prior_std=args.prior_std,
        rho=radii(args.rho, chosen),
        kappa=args.kappa,
        alpha=args.alpha,
        init_scale=args.init_scale,
        num_samples=args.num_samples,
        device=device(args.device),
        threads=args.threads,
    )
