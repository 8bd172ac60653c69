"""``pyro-sam study``: its options, and what it does."""

import argparse
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_sam.study import arguments
from pyro_sam.study.allocator import keep_freed_memory
from pyro_sam.study.output import OutputError
from pyro_sam.study.tables import DataError

if TYPE_CHECKING:
    from pyro_sam.study.survey.records import Records
    from pyro_sam.study.survey.sensitivity import Sweep

_NEEDED = {
    "matplotlib": "bench",
    "sklearn": "bench",
    "tabulate": "bench",
    "optuna": "study",
    "scikit_posthocs": "study",
    "statsmodels": "study",
}
TABLES = "study.md"
_NUMBERS = ("alpha", "rho", "kappa", "init_scale")  # that --at may give


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    option = parser.add_argument
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", const="quick", dest="size", help="ten minutes on two cores")
    size.add_argument(
        "--paper", action="store_const", const="paper", dest="size", help="five times the gradients, more of all"
    )
    parser.set_defaults(size="normal")
    option("--data", nargs="+", metavar="NAME", default=[], help="data sets of the study [those of the size]")
    option("--methods", nargs="+", metavar="NAME", default=[], help="methods of the study [all that are installed]")
    option("--seeds", type=arguments.whole, metavar="N", help="number of runs after tuning [that of the size]")
    option("--trials", type=arguments.whole, metavar="N", help="tuning trials of each method [those of the size]")
    option("--device", default="cpu", metavar="NAME", help="where torch runs it [%(default)s]; under torchrun, cuda is "
           "a GPU for each process, and the processes share the work")  # fmt: skip
    option("--autocast", action="store_true", help="train in bfloat16 where torch knows that to be safe")
    option("--gradients", type=arguments.whole, metavar="N", help="gradients of a run [those of data set and size]")
    option("--out", type=Path, default=Path("results/study"), metavar="DIR", help="folder of the study [%(default)s]; "
           "processes with one folder share the work, and a killed study goes on")  # fmt: skip
    option("--settings-of", type=Path, metavar="DIR", help="take the settings that the study in DIR has chosen, where "
           "it has any, and tune only the rest")  # fmt: skip
    option("--data-dir", type=Path, metavar="DIR", help="folder with data files; see `pyro-sam datasets`")
    option("--flatness", action="store_true", help="compare the flatness of some methods at the same settings instead")
    option("--sensitivity", nargs="*", metavar="SETTING", help="vary one setting at a time, the rest as the study in "
           "--out has chosen it, instead [all that are known]")  # fmt: skip
    option("--values", nargs="+", type=float, metavar="NUMBER", help="of the one setting of --sensitivity [its own]")
    option("--at", nargs="+", metavar="NAME=NUMBER", help="settings of a --sensitivity, in the place of those that the "
           "study has chosen: kl_weight=0.03 lr=0.001")  # fmt: skip
    option("--report", action="store_true", help="train nothing: make tables and figures of the runs that there are")


def run(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Run a study, or go on with it, and make its tables and figures.

    Raises:
        UsageError: If a name is unknown, or a package is missing.
        OutputError: If the folder cannot be written to.
        DataError: If a data set cannot be had.
    """
    missing = {name: extra for name, extra in _NEEDED.items() if importlib.util.find_spec(name) is None}
    if missing:
        extras = ",".join(dict.fromkeys(missing.values()))
        raise arguments.UsageError(f'{", ".join(missing)} not installed: pip install "pyro-sam[{extras}]".')

    import torch

    from pyro_sam.study.survey.figures import draw
    from pyro_sam.study.survey.records import FLATNESS, RUNS, SENSITIVITY, Records
    from pyro_sam.study.survey.tables import report

    if args.sensitivity is None and (args.values or args.at):
        raise arguments.UsageError("--values and --at go with --sensitivity, such as --sensitivity alpha.")
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        records = Records(args.out)
        if not args.report:
            _train(args, records, say)
        if int(os.environ.get("RANK", "0")):  # the first of torchrun's processes makes the report
            return 0
        rows, flat, swept = map(records.read, (RUNS, FLATNESS, SENSITIVITY))
        if not (rows or flat or swept):
            raise arguments.UsageError(f"--report needs finished runs, and {args.out} has none.")
        text = report(rows, flat, swept)
        (args.out / TABLES).write_text(text)
        say(f"{text}\n{', '.join(map(str, [args.out / TABLES, *draw(records)]))}")
    except OSError as error:
        raise OutputError(f"--out {args.out} cannot be written to: {error}") from error
    return 0


def _train(args: argparse.Namespace, records: "Records", say: Callable[[str], None]) -> None:
    from pyro_sam.study.survey.flat import at_equal_settings
    from pyro_sam.study.survey.problems import SOURCES, Draws
    from pyro_sam.study.survey.sensitivity import SWEEPS, sensitivity
    from pyro_sam.study.survey.sizes import SIZES
    from pyro_sam.study.survey.studying import study

    given = {"seeds": args.seeds, "trials": args.trials, "equal_budget": args.gradients, "autocast": args.autocast}
    size = dataclasses.replace(SIZES[args.size], **{name: value for name, value in given.items() if value})
    size = dataclasses.replace(size, device=_device(args.device))
    data = _known("--data", args.data, SOURCES) or _there(size.data, args.data_dir, say)
    methods = _methods(args.methods, say)
    if args.flatness:
        for name in data:
            at_equal_settings(records, Draws(SOURCES[name], args.data_dir, size.test_rows, size.device), size)
    elif args.sensitivity is not None:
        settings, at = _known("--sensitivity", args.sensitivity, SWEEPS) or list(SWEEPS), _at(args.at)
        sweeps = {name: _sweep(SWEEPS[name], args, methods, len(settings)) for name in settings}
        for name in data:
            draws = Draws(SOURCES[name], args.data_dir, size.test_rows, size.device)
            sensitivity(records, draws, sweeps, size, say, at)
    else:
        study(data, methods, size, records, args.data_dir, say, _kept(args.settings_of))


def _sweep(known: "Sweep", args: argparse.Namespace, methods: Sequence[str], number: int) -> "Sweep":
    """Return a sweep with the values and the methods that are asked for."""
    if args.values and number > 1:
        raise arguments.UsageError("--values goes with one setting: --sensitivity alpha --values 0 1 3.")
    values = tuple(args.values or known.values)
    return known._replace(methods=tuple(name for name in known.methods if name in methods), values=values)


def _at(words: Sequence[str] | None) -> dict[str, float] | None:
    """Return settings as given; the weight of the KL and the learning rate must be among them."""
    if words is None:
        return None
    try:
        found = {name: float(value) for name, _, value in (word.partition("=") for word in words)}
    except ValueError as error:
        raise arguments.UsageError(f"--at takes NAME=NUMBER, such as lr=0.001, got {' '.join(words)}.") from error
    if not found.keys() >= {"kl_weight", "lr"} or not found.keys() <= {"kl_weight", "lr", *_NUMBERS}:
        raise arguments.UsageError(
            f"--at must give kl_weight and lr, and may give {', '.join(_NUMBERS)}, got {' '.join(words)}."
        )
    return found


def _device(name: str) -> str:
    """Return the device of this process; under torchrun each has a GPU of its own."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise arguments.UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    local = os.environ.get("LOCAL_RANK")
    return f"{name}:{local}" if local and device.type != "cpu" and device.index is None else name


def _there(names: Sequence[str], data_dir: Path | None, say: Callable[[str], None]) -> list[str]:
    """Return the data sets of a size that can be had here."""
    from pyro_sam.study.survey.problems import SOURCES, Draws

    found = []
    for name in names:
        try:
            Draws(SOURCES[name], data_dir).final(1)
            found.append(name)
        except DataError as error:
            say(f"left out {name}: {error}")
    return found


def _kept(folder: Path | None) -> "Records | None":
    from pyro_sam.study.survey.records import RUNS, Records

    if folder is None:
        return None
    if not (folder / RUNS).is_file():
        raise arguments.UsageError(f"--settings-of {folder} is the folder of no study: it has no {RUNS}.")
    return Records(folder)


def _methods(given: list[str], say: Callable[[str], None]) -> list[str]:
    """Return the methods asked for, or all whose packages are installed."""
    from pyro_sam.study.survey.methods import METHODS

    found, cure = _known("--methods", given, METHODS), 'not installed: pip install "pyro-sam[outside]".'
    lacking = [name for name in found or METHODS if not METHODS[name].is_installed]
    if lacking:
        packages = ", ".join(str(METHODS[name].needs) for name in lacking)
        if found:
            raise arguments.UsageError(f"--methods {', '.join(lacking)} needs {packages}, {cure}")
        say(f"left out {', '.join(lacking)}, which needs {packages}, {cure}")
    return [name for name in found or METHODS if name not in lacking]


def _known(option: str, given: list[str], names: object) -> list[str]:
    found = list(dict.fromkeys(arguments.words(given)))
    known = list(names)  # type: ignore[call-overload]
    unknown = [name for name in found if name not in known]
    if unknown:
        raise arguments.UsageError(f"{option} must be among {', '.join(known)}, got {unknown[0]!r}.")
    return found
