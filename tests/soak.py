"""Train for many steps and see that nothing grows: memory, the param store, the optimiser's state, live tensors.

``make soak`` runs it with 20 000 steps; the suite runs a small one.
"""

import argparse
import gc
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import Tensor, nn

import pyro_sam as ps

PAGE = 4096


def resident() -> int:
    """Return the process's resident memory in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def tensors() -> int:
    """Return the number of live tensors."""
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def soak(steps: int, measurements: int = 5) -> list[dict[str, int]]:
    """Train for ``steps`` steps and measure at equal distances, the first time after a start-up phase."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    bnn = ps.BayesianModule(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1)))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = bnn(x).squeeze(-1)
        with pyro.plate("data", 64, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)

    optim = ps.optim.JointOptim(torch.optim.Adam, {"lr": 1e-3}, clip_norm=100.0)
    svi = SVI(model, ps.MeanFieldNormal(model, init_scale=0.02), optim, loss=ps.SAM_ELBO(ps.MixSAM(rho=0.5)))
    x = torch.randn(64, 4)
    batches = [(rows, rows.sum(-1)) for rows in x.split(16)]
    found: list[dict[str, int]] = []

    def measure(training: Any) -> None:
        at = len(found) + 1
        if training.step >= at * steps // measurements:
            optimizer: Any = optim.optimizer
            found.append(
                {
                    "step": training.step,
                    "bytes": resident(),
                    "tensors": tensors(),
                    "store": len(pyro.get_param_store()),
                    "state": len(optimizer.state),
                }
            )

    ps.fit(svi, batches, steps // len(batches), progress=False, callbacks=[measure])
    return found


def main() -> None:
    """Run, print the measurements, and fail if something grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    found = soak(parser.parse_args().steps)
    for each in found:
        print("  ".join(f"{name} {value:,}" for name, value in each.items()))  # noqa: T201
    first, last = found[0], found[-1]
    grown = [name for name in ("tensors", "store", "state") if last[name] > first[name]]
    if last["bytes"] > 1.01 * first["bytes"]:
        grown.append("bytes")
    if grown:
        raise SystemExit(f"grew: {', '.join(grown)}")


if __name__ == "__main__":
    main()
