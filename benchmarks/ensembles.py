"""Five replicas against one, and against a deep ensemble of plain networks, in test NLL.

Run it from the repository: ``python -m benchmarks.ensembles``; ``--mnist FILE.npz`` adds MNIST (arrays ``x_train``,
``y_train``, ``x_test``, ``y_test``).
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

import pyro_sam as ps
from benchmarks.problems import mlp

BATCH, RATE, MEMBERS = 64, 3e-3, 5


class Data(NamedTuple):
    """Images and labels, split."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def digits(seed: int) -> Data:
    """Return scikit-learn's digits, a fifth of them for the test."""
    x, y = (torch.as_tensor(each) for each in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[360:], order[:360]
    x = x.float() / 16
    return Data(x[train], y[train], x[test], y[test])


def mnist(file: Path, seed: int, rows: int = 5000) -> Data:
    """Return some of MNIST's training images, and 5000 of its test images."""
    with np.load(file) as arrays:
        found = {name: torch.as_tensor(arrays[name]) for name in ("x_train", "y_train", "x_test", "y_test")}
    train = torch.randperm(len(found["x_train"]), generator=torch.Generator().manual_seed(seed))[:rows]
    x, x_test = (found[name].reshape(len(found[name]), -1).float() / 255 for name in ("x_train", "x_test"))
    return Data(x[train], found["y_train"].long()[train], x_test[:5000], found["y_test"].long()[:5000])


def batches(data: Data, epochs: int) -> list[tuple[Tensor, Tensor]]:
    """Return the minibatches of a training."""
    orders = [torch.randperm(len(data.x)) for _ in range(epochs)]
    return [(data.x[rows], data.y[rows]) for order in orders for rows in order.split(BATCH)]


def posteriors(data: Data, law: ps.Perturbation, epochs: int) -> tuple[float, float]:
    """Return the NLL of five replicas together, and the mean of theirs alone."""
    bnn = ps.BayesianModule(mlp(data.x.shape[1], 100, 100, 10))

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = bnn(x)
        with pyro.plate("data", len(data.x), subsample_size=len(x)):
            observed: Tensor = pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
        return observed

    pyro.clear_param_store()
    guide = ps.MeanFieldNormal(model, init_scale=0.02, num_replicas=MEMBERS)
    optim = ps.optim.JointOptim(torch.optim.Adam, {"lr": RATE})
    svi = SVI(model, guide, optim, ps.SAM_ELBO(law, kl_weight=0.1))
    for x, y in batches(data, epochs // (2 if law.uses_gradient else 1)):
        svi.step(x, y)
    prediction = ps.predict(model, guide, data.x_test, num_samples=20)
    alone = [float(ps.metrics.nll(prediction.replica(r), data.y_test)) for r in range(MEMBERS)]
    return float(ps.metrics.nll(prediction, data.y_test)), sum(alone) / MEMBERS


def networks(data: Data, epochs: int) -> tuple[float, float]:
    """Return the NLL of a deep ensemble of five plain networks, and the mean of theirs alone."""
    probs = []
    for _ in range(MEMBERS):
        net = mlp(data.x.shape[1], 100, 100, 10)
        optim = torch.optim.Adam(net.parameters(), lr=RATE, fused=True)
        for x, y in batches(data, epochs):
            cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
            optim.step()
            optim.zero_grad()
        with torch.no_grad():
            probs.append(net(data.x_test).softmax(-1))
    alone = [float(-p.gather(1, data.y_test[:, None]).log().mean()) for p in probs]
    mixed = -torch.stack(probs).mean(0).gather(1, data.y_test[:, None]).log().mean()
    return float(mixed), sum(alone) / MEMBERS


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ensembles", description=__doc__.partition("\n")[0])
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40, help="passes over the data, in gradients")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| data | what | five, NLL | one, NLL | difference |\n|---|---|---|---|---|")
    for name in ("digits", *(["MNIST-5000"] if args.mnist else [])):
        found: dict[str, list[tuple[float, float]]] = {}
        for seed in range(args.seeds):
            pyro.set_rng_seed(seed)
            data = digits(seed) if name == "digits" else mnist(args.mnist, seed)
            epochs = args.epochs if name == "digits" else args.epochs // 2
            found.setdefault("MFVI", []).append(posteriors(data, ps.Gaussian(), epochs))
            found.setdefault("AscendedSample(1)", []).append(posteriors(data, ps.AscendedSample(), epochs))
            found.setdefault("plain networks", []).append(networks(data, epochs))
        for what, pairs in found.items():
            five, one = (np.array(each) for each in zip(*pairs, strict=True))
            columns = (f"{v.mean():.4f} ± {v.std(ddof=1) / len(v) ** 0.5:.4f}" for v in (five, one, five - one))
            print(f"| {name} | {what} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
