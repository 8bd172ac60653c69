"""Time a training step of SAM_ELBO against hand-written loops, Pyro's estimators and other libraries.

Run it from the repository: ``make bench``, or ``python -m benchmarks.step_time --help``. All contenders run in one
process, one step each per round, so that the machine's ups and downs meet all alike.
"""

import argparse
import gc
import platform
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch

from benchmarks import report
from benchmarks.contenders import Contender, contenders
from benchmarks.measure import Figures, Timing, build, interleaved
from benchmarks.peers import peers
from benchmarks.problems import CASES, Problem
from benchmarks.scaling import SWEEPS, sweep
from benchmarks.targets import ratios
from pyro_sam.training.checkpoint import versions


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--contenders", nargs="+", default=[""], metavar="TEXT", help="only contenders whose name contains one of these"
    )
    parser.add_argument("--rounds", type=int, default=50, help="rounds of a case; a fifth of it at each scaling")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--skip-scaling", action="store_true", help="leave out the growth with sizes")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of the JSON file and the plot")
    return parser.parse_args(argv)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    is_cuda = args.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(args.device) if is_cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        **versions(),
    }


def run_case(
    problem: Problem, entries: Mapping[str, Contender], args: argparse.Namespace
) -> tuple[dict[str, tuple[Timing, Figures]], dict[str, str]]:
    """Return what was measured by contender, and why others cannot run this case."""
    steps, figures, failed = {}, {}, {}
    for name, contender in entries.items():
        try:
            make = partial(contender, problem)
            steps[name], figures[name] = build(make, args.device, compiled="compiled" in name)
        except (RuntimeError, NotImplementedError) as error:
            failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    times = interleaved(steps, args.rounds, args.device)
    return {name: (times[name], figures[name]) for name in times}, failed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    args, begin = parse(argv), time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.compile(lambda: None)  # its first call switches off validation for the whole process: now, not half-way
    pyro.enable_validation()  # Pyro's default
    args.out.mkdir(parents=True, exist_ok=True)
    there, missing = peers()
    entries = {n: c for n, c in {**contenders(), **there}.items() if any(text in n for text in args.contenders)}
    content: dict[str, Any] = {"environment": environment(args), "problems": {}, "missing": missing, "failed": {}}
    print(", ".join(f"{key} {value}" for key, value in content["environment"].items()))
    print("peers that are not installed:", ", ".join(missing) or "none")
    results = {}
    for case in args.cases:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        gc.collect()
        problem = CASES[case](args.device)
        print(f"\n{case}: {problem.parameters} parameters, {problem.sites} sites", flush=True)
        results[case], failed = run_case(problem, entries, args)
        content["problems"][case] = {"parameters": problem.parameters, "sites": problem.sites}
        content["failed"][case] = failed
        print(report.case_table(results[case]))
        for name, reason in failed.items():
            print(f"{name} cannot run it: {reason}")
    pyro.clear_param_store()
    sweeps = [] if args.skip_scaling else [sweep(name, max(1, args.rounds // 5), args.device) for name in SWEEPS]
    if sweeps:
        print(f"\nAdversarial, JointOptim\n{report.scaling_table(sweeps)}")
        report.plot(sweeps, args.out / "scaling.png")
    found = list(ratios(results, sweeps))
    print(f"\n{report.ratio_table(found)}")
    report.save_json({**content, **report.as_json(results, sweeps, found)}, args.out / "step_time.json")
    print(f"\n{args.out}, after {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
