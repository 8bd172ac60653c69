"""The command ``pyro-sam``: ``compare`` methods on a data set, list ``datasets`` and ``methods``."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyro_sam as ps
from pyro_sam.study import arguments
from pyro_sam.study.catalogue import CATALOGUE
from pyro_sam.study.output import OutputError, prepare
from pyro_sam.study.survey import command as survey
from pyro_sam.study.tables import DataError

if TYPE_CHECKING:
    from pyro_sam.study.datasets import Dataset
    from pyro_sam.study.results import Results
    from pyro_sam.study.settings import Settings
    from pyro_sam.study.tuning import Choice

_EXTRAS = ("sklearn", "mlxtend", "matplotlib", "tabulate", "torchmetrics", "tqdm")
INTERRUPTED = 130  # what a shell reports of a command that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Words after ``pyro-sam``; those of the process by default.
    Returns:
        0 if all went well, 1 if a run was stopped, 2 if it could not start, 130 if interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader left, as `head` does; the interpreter's own last flush must not complain of it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\npyro-sam: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (arguments.UsageError, DataError, OutputError) as error:
        print(f"pyro-sam {args.command}: error: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(prog="pyro-sam", description="Sharpness-aware variational inference on real data.")
    parser.add_argument("--version", action="version", version=f"pyro-sam {ps.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare|tune|study|datasets|methods")
    compare = commands.add_parser("compare", help="train several methods at equal numbers of gradients")
    arguments.add_compare(compare)
    compare.set_defaults(run=_compare)
    tune = commands.add_parser("tune", help="choose the settings of methods by the NLL of held-out training rows")
    arguments.add_tune(tune)
    tune.set_defaults(run=_tune)
    study = commands.add_parser("study", help="tune and compare all methods of the study; resumes, and may be shared")
    survey.add(study)
    study.set_defaults(run=lambda args: survey.run(args, print))
    commands.add_parser("datasets", help="list the data sets").set_defaults(run=_datasets)
    commands.add_parser("methods", help="list the methods").set_defaults(run=_methods)
    return parser


def _compare(args: argparse.Namespace) -> int:
    missing = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise arguments.UsageError(f'{", ".join(missing)} not installed: pip install "pyro-sam[bench]".')
    chosen, seeds = arguments.methods(args.methods), arguments.seeds(args.seeds)
    settings = arguments.settings(args, chosen)

    import torch
    from tqdm import tqdm

    from pyro_sam.study.compare import compare, total_gradients
    from pyro_sam.study.results import FIGURE, RESULTS

    torch.set_num_threads(settings.threads)
    datasets = arguments.data(args, seeds)
    first = datasets[seeds[0]]
    out = prepare(args.out or Path("results") / first.name, (RESULTS, FIGURE))
    print(f"{first.name}: {len(first.y_train)} training and {len(first.y_test)} test rows ({first.source})")
    tuned = _choose(args, first, chosen, settings, out) if args.tune else {}
    with tqdm(total=total_gradients(datasets, chosen, settings), unit="gradient", mininterval=0.5) as bar:

        def advance(method: str, seed: int, cost: int, loss: float) -> None:
            bar.set_description(f"{method}, seed {seed}, loss {loss:.4g}", refresh=False)
            bar.update(cost)

        results = compare(
            datasets, chosen, settings, out, advance, {name: each.settings for name, each in tuned.items()}
        )
    return _report(results, out)


def _choose(
    args: argparse.Namespace, dataset: "Dataset", methods: Sequence[str], settings: "Settings", out: Path
) -> "dict[str, Choice]":
    if importlib.util.find_spec("optuna") is None:
        raise arguments.UsageError('optuna not installed: pip install "pyro-sam[tune]".')
    from pyro_sam.study.tuning import choose_all

    try:
        return choose_all(dataset, methods, settings, args.trials, out, print)
    except ValueError as error:
        raise arguments.UsageError(f"{error} (the search is in {out})") from error


def _tune(args: argparse.Namespace) -> int:
    missing = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise arguments.UsageError(f'{", ".join(missing)} not installed: pip install "pyro-sam[bench]".')
    chosen = arguments.methods(args.methods)
    settings = arguments.settings(args, chosen)

    import torch

    from pyro_sam.study.report import tuning
    from pyro_sam.study.results import TUNED, TUNED_FIGURE

    torch.set_num_threads(settings.threads)
    dataset = arguments.data(args, [0])[0]
    out = prepare(args.out or Path("results") / dataset.name, (TUNED, TUNED_FIGURE))
    print(f"{dataset.name}: {len(dataset.y_train)} training and {len(dataset.y_test)} test rows ({dataset.source})")
    print(tuning(dataset, _choose(args, dataset, chosen, settings, out), out))
    return 0


def _report(results: "Results", out: Path) -> int:
    from pyro_sam.study.report import figure, table
    from pyro_sam.study.results import RESULTS

    if results.runs:
        print(table(results))
        print(f"results: {out / RESULTS}\nfigure:  {figure(results, out)}")
    if results.stopped is None:
        return 0
    print(f"pyro-sam compare: stopped: {results.stopped['message']}", file=sys.stderr)
    print(f"The finished runs are in {out / RESULTS}.", file=sys.stderr)
    return INTERRUPTED if results.stopped["what"] == "interrupted" else 1


def _datasets(args: argparse.Namespace) -> int:
    for spec in CATALOGUE.values():
        print(f"{spec.name:15}{spec.task:16}{spec.summary:56}{spec.origin}")
    files = "NAME.npz or NAME/*-ubyte.gz for mnist and fashion-mnist; NAME.csv or uci_regression.npz for the others"
    print(f"Files in --data-dir: {files}.")
    return 0


def _methods(args: argparse.Namespace) -> int:
    from pyro_sam.study.methods import METHODS
    from pyro_sam.study.settings import Settings

    print(f"{'name':17}{'gradients a step':18}{'rho':6}")
    for method in METHODS.values():
        radius = "-" if method.rho is None else f"{method.rho:g}"
        print(f"{method.name:17}{method.cost(Settings()):<18}{radius:6}{method.summary}")
    print("rho counts posterior standard deviations in variational-sam, and is in the units of a weight elsewhere.")
    print(
        "The defaults were chosen on images. Regression with little noise (energy, yacht) wants about a tenth of them."
    )
    return 0
