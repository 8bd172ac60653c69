"""Train with everything at its default, and with settings tuned by hand, at kl_weight=1 on many problems.

Run it from the repository: ``python -m benchmarks.defaults``. Runs that share network, prior and learning rate are
trained side by side as replicas of one guide; each finished group is a line of a file, and is not trained again. The
run tuned by hand is the best of a grid over prior, learning rate, initial scale and law, by NLL on validation data. The
table is of the test NLL of the posterior predictive, a mean over initial weights that the choice has not seen.
"""

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from tabulate import tabulate
from torch import Tensor, nn

import pyro_sam as ps
from benchmarks.default_problems import PROBLEMS, Problem, nll

DEFAULT = "default"


def by_fan_in(site: Any, share: float) -> float:
    """Return a share of one over the root of the fan-in."""
    return share / math.sqrt(max(site["fn"].event_shape[1:].numel(), 1))


def by_prior(site: Any, share: float) -> float:
    """Return a share of the prior's own standard deviation, where it is Normal."""
    fn = site["fn"]
    while not isinstance(fn, dist.Normal) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return share * float(fn.scale.flatten()[0]) if isinstance(fn, dist.Normal) else share


def smaller(site: Any, constant: float, share: float) -> float:
    """Return the smaller of a constant and a share of the prior's standard deviation."""
    return min(constant, by_prior(site, share))


def capped(name: str, parameter: Any, std: float) -> Any:
    """Return a fan-in prior that is nowhere wider than the standard Normal."""
    return dist.Normal(0.0, min(1.0, std / math.sqrt(max(parameter.shape[1:].numel(), 1))))


PRIORS: dict[str, Any] = {
    "N(0, 1)": dist.Normal(0.0, 1.0),
    **{f"min(1, {std}/root fan-in)": partial(capped, std=std) for std in (2.0, 3.0, 3.5, 4.0, 5.0)},
    **{f"fan_in({std})": ps.nn.fan_in_normal(std) for std in (1.0, 1.4, 2.0, 3.0, 4.0)},
}
SCALES: dict[str, Any] = {
    **{str(scale): scale for scale in (0.1, 0.02, 0.005)},
    **{f"{share}/root fan-in": partial(by_fan_in, share=share) for share in (0.3, 0.1, 0.03, 0.01)},
    **{f"{share} prior": partial(by_prior, share=share) for share in (0.1, 0.05, 0.02, 0.01)},
    **{f"min(.02, {share} prior)": partial(smaller, constant=0.02, share=share) for share in (0.1, 0.05)},
}
LAWS: dict[str, tuple[type[ps.Perturbation], dict[str, float]]] = {
    **{f"AscendedSample({alpha:g})": (ps.AscendedSample, {"alpha": alpha}) for alpha in (0.0, 1.0, 3.0)},
    **{f"Adversarial({rho:g})": (ps.Adversarial, {"rho": rho}) for rho in (0.1, 0.3, 1.0, 3.0, 10.0)},
    "MixSAM()": (ps.MixSAM, {}),
}


@dataclass(frozen=True)
class Setting:
    """What a run is told, by name; ``"default"`` is what the library does untold.

    Args:
        prior: Name in ``PRIORS``.
        lr: Factor of the problem's own learning rate.
        scale: Name in ``SCALES``.
        law: Name in ``LAWS``; ``AscendedSample(0)`` is ``Gaussian()``.
    """

    prior: str = DEFAULT
    lr: float = 1.0
    scale: str = DEFAULT
    law: str = DEFAULT

    def __str__(self) -> str:
        return f"{self.prior}; {self.scale}; {self.law}; lr x {self.lr:g}"


@dataclass(frozen=True)
class Group:
    """Runs that train side by side: one prior, one learning rate, one kind of law.

    Args:
        problem: Name in ``PROBLEMS``.
        settings: Setting of each.
        seed: Seed of the first one's initial weights, the noise and the minibatches.
        longer: Factor of the problem's number of epochs.
    """

    problem: str
    settings: tuple[Setting, ...]
    seed: int = 0
    longer: int = 1

    @property
    def key(self) -> str:
        """What the group is, as a line of text; what the defaults are is a part of it."""
        first = self.settings[0]
        defaults = {
            "prior": ps.BayesianModule(nn.Linear(1, 1)).prior,
            "scale": getattr(scale := ps.MeanFieldNormal(lambda: None).init_scale, "__name__", scale),
            "law": ps.SAM_ELBO().perturbation,
        }
        meant = "; ".join(str(value) for name, value in defaults.items() if getattr(first, name) == DEFAULT)
        names = " | ".join(map(str, self.settings))
        return f"{self.problem}: {names}: seed {self.seed}, epochs x {self.longer} {meant}".strip()


def initial_scale(settings: Sequence[Setting]) -> dict[str, Any]:
    """Return the guide's argument, with the scale of each replica."""
    if settings[0].scale == DEFAULT:
        return {}

    def init_scale(site: Any) -> Tensor:
        rules = [SCALES[setting.scale] for setting in settings]
        scales = torch.tensor([rule(site) if callable(rule) else rule for rule in rules])
        return scales.view(-1, *[1] * len(site["fn"].shape()))

    return {"init_scale": init_scale}


def law(settings: Sequence[Setting]) -> dict[str, Any]:
    """Return the estimator's argument, with the number of each replica."""
    if settings[0].law == DEFAULT:
        return {}
    kinds = [LAWS[setting.law][0] for setting in settings]
    names = LAWS[settings[0].law][1]
    numbers = {name: [LAWS[setting.law][1][name] for setting in settings] for name in names}
    return {"perturbation": kinds[0](**numbers)}


def train(problem: Problem, group: Group, x: Tensor, y: Tensor) -> tuple[Any, Any]:
    """Return model and guide after training."""
    first = group.settings[0]
    prior = {} if first.prior == DEFAULT else {"prior": PRIORS[first.prior]}
    model = problem.model(ps.BayesianModule(problem.net(), **prior), len(x))
    guide = ps.MeanFieldNormal(model, num_replicas=len(group.settings), **initial_scale(group.settings))
    optim = ps.optim.JointOptim(torch.optim.Adam, {"lr": problem.lr * first.lr})
    svi = SVI(model, guide, optim, loss=ps.SAM_ELBO(**law(group.settings)))
    for _ in range(problem.epochs * group.longer):
        for rows in torch.randperm(len(x)).split(problem.batch):
            svi.step(x[rows], y[rows])
    return model, guide


def measure(group: Group, folder: Path) -> list[dict[str, float]]:
    """Train a group and return the scores of each."""
    problem = PROBLEMS[group.problem]
    data = problem.data(folder)
    pyro.clear_param_store()
    pyro.set_rng_seed(group.seed)
    model, guide = train(problem, group, *data.train)
    scores = []
    for r in range(len(group.settings)):
        one = guide.replica(r)
        validation, test = (nll(problem, model, one, pair) for pair in (data.validation, data.test))
        elbo = -np.mean([ps.SAM_ELBO().loss(model, one, *data.train) for _ in range(4)]) / len(data.train[0])
        scores.append({"validation": validation[0], "test": test[0], "score": test[1], "elbo": float(elbo)})
    return scores


class Log:
    """Groups that were trained, a line of a file each."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.scores = {line["key"]: line["scores"] for line in map(json.loads, lines)}

    def run(self, group: Group) -> list[dict[str, float]]:
        """Return the scores of a group, after training it if that was not done before."""
        if group.key not in self.scores:
            start = time.perf_counter()
            scores = measure(group, self.folder)
            line = {"key": group.key, "seconds": round(time.perf_counter() - start, 1), "scores": scores}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.scores[group.key] = scores
        return self.scores[group.key]


@dataclass(frozen=True)
class Grid:
    """What the settings tuned by hand are chosen from.

    Args:
        priors: Names of priors.
        scales: Names of initial scales.
        laws: Names of laws; every combination is trained at the problem's own learning rate.
        rates: Factors of it to train the best prior with, too.
    """

    priors: tuple[str, ...]
    scales: tuple[str, ...]
    laws: tuple[str, ...]
    rates: tuple[float, ...] = (1 / 3, 3.0)

    def group(self, problem: str, prior: str, lr: float) -> Group:
        """Return the combinations of one prior and one learning rate."""
        settings = (Setting(prior, lr, scale, law) for scale in self.scales for law in self.laws)
        return Group(problem, tuple(settings))


WIDE = "min(1, 4.0/root fan-in)"
LIGHT = Grid(
    ("N(0, 1)", "fan_in(1.0)", "fan_in(2.0)", "fan_in(4.0)", "min(1, 3.0/root fan-in)", WIDE),
    ("0.02", "0.1/root fan-in", "0.03/root fan-in", "0.01/root fan-in"),
    ("AscendedSample(0)", "AscendedSample(1)", "AscendedSample(3)"),
)
HEAVY = Grid(
    ("N(0, 1)", "fan_in(2.0)", "fan_in(4.0)", WIDE),
    ("0.005", "0.03/root fan-in", "0.01/root fan-in"),
    ("AscendedSample(0)", "AscendedSample(1)"),
)
SHORT = replace(HEAVY, priors=("N(0, 1)", "fan_in(2.0)", WIDE), rates=())
FEW = replace(HEAVY, priors=("N(0, 1)", WIDE), rates=())


SCALE = "0.01/root fan-in"
BEFORE = Setting("N(0, 1)", 1.0, "0.1", "Adversarial(1)")  # the defaults before they were measured
ADVERSARIES = (
    tuple(Setting(WIDE, 1.0, SCALE, name) for name in LAWS if name.startswith("Adversarial")),
    (Setting(WIDE, 1.0, SCALE, "MixSAM()"),),
)
GRIDS = {"light": LIGHT, "medium": SHORT, "heavy": HEAVY, "heaviest": FEW}


def tune(log: Log, problem: str) -> Setting:
    """Return the best of the grid, by NLL on validation data."""
    grid = GRIDS[PROBLEMS[problem].cost]
    found: dict[Setting, float] = {}

    def run(prior: str, lr: float) -> None:
        group = grid.group(problem, prior, lr)
        found.update({s: r["validation"] for s, r in zip(group.settings, log.run(group), strict=True)})

    for prior in grid.priors:
        run(prior, 1.0)
    best = min(found, key=lambda setting: found[setting])
    for lr in grid.rates:
        run(best.prior, lr)
    return min(found, key=lambda setting: found[setting])


def scores(log: Log, problem: str, setting: Setting) -> dict[str, float]:
    """Return mean scores over initial weights that :func:`tune` has not seen, and the standard error of the NLL's."""
    number = {"heavy": 3, "heaviest": 2}.get(PROBLEMS[problem].cost, 5)
    found = log.run(Group(problem, (setting,) * number, seed=1))
    mean = {name: float(np.mean([one[name] for one in found])) for name in ("test", "score", "elbo")}
    return {**mean, "error": float(np.std([one["test"] for one in found], ddof=1) / math.sqrt(number))}


def row(log: Log, name: str) -> list[Any]:
    """Return a problem's row of the table."""
    problem = PROBLEMS[name]
    best = tune(log, name)
    tuned, default, before = (scores(log, name, setting) for setting in (best, Setting(), BEFORE))
    chance = problem.chance(problem.data(log.folder))
    worse = f"{100 * (default['test'] / tuned['test'] - 1):+.0f} %"
    if tuned["test"] > 0.95 * chance:
        worse = "at kl_weight=1 the prior is the optimum"
    numbers = [f"{each['test']:.3f} ± {each['error']:.3f}" for each in (tuned, default, before)]
    return [name, f"{chance:.2f}", *numbers, worse, f"{default['elbo']:.1f}", str(best)]


def law_row(log: Log, name: str) -> list[Any]:
    """Return the test NLL of the laws that ascend from the mean, at the default prior and scale."""
    found = [result["test"] for group in ADVERSARIES for result in log.run(Group(name, group))]
    return [name, *(f"{value:.2f}" for value in found)]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", nargs="+", default=[""], metavar="TEXT", help="only those that start with a text")
    parser.add_argument(
        "--data-dir",
        default=os.environ.get("PYRO_SAM_DATA"),
        help="folder with mnist.npz and uci_regression.npz [$PYRO_SAM_DATA]; without them their problems are left out",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch [1]")
    parser.add_argument("--laws", action="store_true", help="a table of laws instead, at the default prior and scale")
    parser.add_argument("--out", type=Path, default=Path("results/defaults/runs.jsonl"), help="file of finished runs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, and print the table."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    folder = Path(args.data_dir or ".")
    log = Log(args.out, folder)
    rows = []
    for name, problem in PROBLEMS.items():
        if not any(name.startswith(text) for text in args.problems):
            continue
        if problem.needs and not (folder / problem.needs).exists():
            print(f"{name} is left out: there is no {problem.needs} in --data-dir {args.data_dir}.")
            continue
        rows.append(law_row(log, name) if args.laws else row(log, name))
        print(*rows[-1], sep=" | ", flush=True)
    headers = [
        "problem",
        "chance",
        "tuned by hand",
        "default",
        "before",
        "default is worse by",
        "ELBO a row",
        "tuned to",
    ]
    if args.laws:
        headers = ["problem", *(setting.law for group in ADVERSARIES for setting in group)]
    print(f"\n{tabulate(rows, headers, tablefmt='github')}")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of runs that are meant to go wrong
        main()
