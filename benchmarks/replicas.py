"""Time a step of R replicas against R steps of a single guide.

Run it from the repository: ``python -m benchmarks.replicas``. One thread, and all in one process, round by round.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from pyro.infer import SVI

import pyro_sam as ps
from benchmarks.contenders import joint_adam
from benchmarks.measure import WARM_UP, Step, interleaved
from benchmarks.problems import LastOfLSTM, Problem, classification, lenet, mlp

CPU = torch.device("cpu")
CASES: dict[str, tuple[Callable[[], Problem], tuple[int, ...]]] = {
    "64-50-50-10, batch 32": (
        lambda: classification(mlp(64, 50, 50, 10), 32, 64, device=CPU),
        (1, 2, 4, 8, 16, 32, 64),
    ),
    "784-400-400-10": (lambda: classification(mlp(784, 400, 400, 10), 128, 784, device=CPU), (2, 8)),
    "LeNet-5": (lambda: classification(lenet(), 64, 1, 28, 28, device=CPU), (2, 8)),
    "LSTM": (lambda: classification(LastOfLSTM(16, 64, 10), 32, 20, 16, device=CPU), (2, 8)),
}
LAWS = {"AscendedSample": ps.AscendedSample(), "Gaussian": ps.Gaussian()}


@dataclass(frozen=True)
class Row:
    """A case's figure: the time of a step of R replicas over R times that of a single guide, and percentiles."""

    case: str
    law: str
    replicas: int
    ratio: float
    low: float
    high: float


def make_step(problem: Problem, law: ps.Perturbation, replicas: int | None) -> Step:
    """Return the step of a guide, a single one for None."""
    kind = type(f"Guide{replicas}", (ps.MeanFieldNormal,), {})  # the param store knows a guide by its class
    guide = kind(problem.model, init_scale=0.02, num_replicas=replicas)
    svi = SVI(problem.model, guide, joint_adam(), ps.SAM_ELBO(law))
    return lambda: svi.step(problem.x, problem.y)


def measure(case: str, law: str, rounds: int) -> list[Row]:
    """Return the figures of a case."""
    make, numbers = CASES[case]
    pyro.clear_param_store()
    problem = make()
    steps = {str(n): make_step(problem, LAWS[law], n) for n in numbers} | {
        "single": make_step(problem, LAWS[law], None)
    }
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    timings = interleaved(steps, rounds, CPU)
    single = timings["single"].median
    return [
        Row(case, law, n, *(t / (n * single) for t in (found.median, found.low, found.high)))
        for n, found in ((n, timings[str(n)]) for n in numbers)
    ]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--laws", nargs="+", choices=LAWS, default=list(LAWS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | law | replicas | time / R single steps | 10 to 90 % |\n|---|---|---|---|---|")
    for case in args.cases:
        for law in args.laws:
            for row in measure(case, law, args.rounds):
                print(
                    f"| {row.case} | {row.law} | {row.replicas} | {row.ratio:.3f} | {row.low:.3f}-{row.high:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
