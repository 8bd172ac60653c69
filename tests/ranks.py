"""What the processes of the distributed tests run; every function gets its rank and returns what is compared."""

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_sam as ps
from pyro_sam._base.ranks import average_gradients, mean_number
from pyro_sam.training.checkpoint import Checkpoint, CheckpointError

N = 16


def enter(rank: int, ranks: int, meeting: str, folder: str, job: str, args: tuple[Any, ...]) -> None:
    """Join the group, run a job and leave its result in a file."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{meeting}", rank=rank, world_size=ranks, timeout=timedelta(seconds=20)
    )
    try:
        torch.save(globals()[job](rank, ranks, *args), Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def setting(seed: int = 0) -> tuple[Any, Any, Tensor, Tensor]:
    """Return model, guide and all the data, the same for one seed."""
    pyro.set_rng_seed(seed)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    bnn = ps.BayesianModule(net)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bnn = bnn

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.bnn(x).squeeze(-1)
            # rows of its own: with subsample_size a share would draw numbers that the whole batch does not
            with pyro.plate("data", N, subsample=torch.arange(len(x))):
                pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    model = Model()
    x = torch.linspace(-1, 1, 2 * N).reshape(N, 2)
    return model, ps.MeanFieldNormal(model, init_scale=0.1), x, x.sum(-1).sin()


def values(guide: Any) -> dict[str, Tensor]:
    """Return the guide's parameters."""
    return {name: param.detach().clone() for name, param in guide.named_parameters()}


def ddp(rank: int, ranks: int, law: ps.Perturbation, sync: bool, steps: int, seed_apart: bool) -> dict[str, Tensor]:
    """Train ELBOModule under DDP (or alone, at one rank), each rank on its share."""
    model, guide, x, y = setting()
    share = slice(rank * N // ranks, (rank + 1) * N // ranks)
    x, y = x[share], y[share]
    guide.initialize(x, y)
    module: nn.Module = ps.SAM_ELBO(law, sync_ascent=sync)(model, guide)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # the network's own weights only start the guide
    loss = DistributedDataParallel(module) if ranks > 1 else module
    optimizer = torch.optim.SGD(guide.parameters(), lr=1e-3, momentum=0.9)
    pyro.set_rng_seed(7 + rank * seed_apart)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
    return {**values(guide), "noise": torch.randn(3)}


def accumulate(rank: int, ranks: int, parts: int) -> dict[str, Tensor]:
    """Train under DDP with gradients summed over parts of a share, without a message for each."""
    model, guide, x, y = setting()
    guide.initialize(x, y)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    loss: Any = DistributedDataParallel(ps.SAM_ELBO(ps.Mean())(model, guide))
    optimizer = torch.optim.SGD(guide.parameters(), lr=1e-3)
    share = torch.arange(N)[rank::ranks]
    for _ in range(5):
        optimizer.zero_grad()
        *early, last = share.chunk(parts)
        with loss.no_sync():
            for rows in early:
                (loss(x[rows], y[rows]) / parts).backward()
        (loss(x[last], y[last]) / parts).backward()
        optimizer.step()
    return values(guide)


def fit(
    rank: int,
    ranks: int,
    epochs: int,
    checkpoint: str | None = None,
    dies: int = 0,
    batch: int = 4,
    law: ps.Perturbation | None = None,
    sync: bool = False,
) -> dict[str, Tensor]:
    """Train by ``ps.fit``; from seeds apart, and rank 1 may die in the middle of a step."""
    model, guide, x, y = setting(seed=rank)
    steps = 0

    class Loss(ps.SAM_ELBO):
        def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
            nonlocal steps
            steps += 1
            if rank == 1 and steps == dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().loss_and_grads(*args, **kwargs)

    data = TensorDataset(x, y)
    sampler: Any = DistributedSampler(data) if ranks > 1 else None
    loader = DataLoader(data, batch_size=batch, sampler=sampler)
    optim = ps.optim.JointOptim(torch.optim.Adam, {"lr": 0.01}, clip_norm=100.0)
    svi = SVI(model, guide, optim, loss=Loss(law or ps.MixSAM(rho=0.5), sync_ascent=sync))
    keep = Checkpoint(checkpoint, every=1) if checkpoint else None
    history = ps.fit(svi, loader, epochs, progress=False, checkpoint=keep)
    return {**values(guide), "loss": torch.tensor(history["loss"])}


def lbfgs(rank: int, ranks: int) -> dict[str, Tensor]:
    """Train by LBFGS with a line search under ``ps.fit``, each rank on its share of the rows."""
    model, guide, x, y = setting()
    share = slice(rank * N // ranks, (rank + 1) * N // ranks)
    optim = ps.optim.JointOptim(torch.optim.LBFGS, {"max_iter": 4, "line_search_fn": "strong_wolfe"})
    history = ps.fit(SVI(model, guide, optim, loss=ps.SAM_ELBO(ps.Mean())), [(x[share], y[share])], 5, progress=False)
    return {**values(guide), "loss": torch.tensor(history["loss"]), "grad_norm": torch.tensor(history["grad_norm"])}


class Telling(ps.SAM_ELBO):
    """Tells the rank's own two terms of each step."""

    def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
        loss = super().loss_and_grads(*args, **kwargs)
        self._last_terms = (torch.tensor(0.75 * loss), torch.tensor(0.25 * loss))
        return loss


def history(rank: int, ranks: int, telling: bool) -> dict[str, Tensor]:
    """Train on shares, and return the history and what the last terms of this rank alone are."""
    model, guide, x, y = setting()
    batch = x[rank::ranks], y[rank::ranks]
    elbo = Telling(ps.Mean()) if telling else TraceMeanField_ELBO()
    svi = SVI(model, guide, ps.optim.JointOptim(torch.optim.SGD, {"lr": 0.0}), loss=elbo)
    found = ps.fit(svi, [batch], 2, progress=False)
    return {
        **{name: torch.tensor(found[name]) for name in ("loss", "data", "kl")},
        "own": torch.tensor(float(svi.loss_and_grads(model, guide, *batch))),
    }


def validated(rank: int, ranks: int) -> dict[str, Tensor]:
    """Validate each rank on its share of rows, of different sizes, and keep the best weights."""
    model, guide, x, y = setting()
    share = slice(0, 5) if rank == 0 else slice(5, N)
    unseen = (x[share], -y[share]) if ranks > 1 else (x, -y)
    svi = SVI(model, guide, ps.optim.JointOptim(torch.optim.SGD, {"lr": 1e-3}), loss=ps.SAM_ELBO(ps.Mean()))
    found = ps.fit(svi, [(x, y)], 4, progress=False, validation=unseen)
    return {**values(guide), "validation": torch.tensor(found["validation"])}


def one_stops(rank: int, ranks: int) -> dict[str, Tensor]:
    """Train with a callback that ends it on the last rank."""
    model, guide, x, y = setting()
    svi = SVI(model, guide, ps.optim.JointOptim(torch.optim.SGD, {"lr": 1e-3}), loss=ps.SAM_ELBO())
    found = ps.fit(svi, [(x, y)], 5, progress=False, callbacks=[lambda run: rank == ranks - 1 and run.epoch == 2])
    return {"epochs": torch.tensor(len(found["loss"]))}


def features(rank: int, ranks: int) -> dict[str, Tensor]:
    """Train a model on random features, which seeds apart make others."""
    pyro.set_rng_seed(rank)
    embed = nn.Linear(2, 3).requires_grad_(False)
    embed.register_buffer("shift", torch.randn(3))
    embed.register_forward_hook(lambda module, args, out: out.cos() + module.shift)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", N):
            pyro.sample("obs", dist.Normal(embed(x) @ w, 0.5), obs=y)

    _, _, x, y = setting(rank)
    svi = SVI(model, ps.MeanFieldNormal(model), ps.optim.JointOptim(torch.optim.SGD, {"lr": 1e-3}), loss=ps.SAM_ELBO())
    ps.fit(svi, [(x, y)], 1, progress=False)
    return {"shift": embed.shift}


def apart(rank: int, ranks: int, folder: str) -> dict[str, Tensor]:
    """Resume from a checkpoint that rank 0 alone finds; return whether it is refused."""
    model, guide, x, y = setting()
    svi = SVI(model, guide, ps.optim.JointOptim(torch.optim.SGD, {"lr": 1e-3}), loss=ps.SAM_ELBO())
    path = Path(folder) / f"checkpoint{rank}"
    ps.fit(svi, [(x, y)], 1, progress=False, checkpoint=path)
    try:
        ps.fit(svi, [(x, y)], 2, progress=False, checkpoint=path)
    except CheckpointError as error:
        return {"refused": torch.tensor("different checkpoints" in str(error))}
    return {"refused": torch.tensor(False)}


def mean(rank: int, ranks: int) -> dict[str, Tensor]:
    """Average a gradient that is there on rank 0 only, and numbers."""
    a, b = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    a.grad = torch.full((2,), float(rank))
    b.grad = torch.ones(1) if rank == 0 else None
    average_gradients([a, b])
    return {"a": a.grad, "b": b.grad, "number": torch.tensor(mean_number(float(rank)))}


def traffic(rank: int, ranks: int, sync: bool) -> dict[str, Tensor]:
    """Count the scalars that one step of ``ps.fit`` sums over ranks, and those that stay in memory after it."""
    model, guide, x, y = setting()
    sent, send = [0], torch.distributed.all_reduce

    def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[0] += tensor.numel()
        return send(tensor, *args, **kwargs)

    torch.distributed.all_reduce = count
    optim = ps.optim.JointOptim(torch.optim.Adam, {"lr": 0.01})
    svi = SVI(model, guide, optim, loss=ps.SAM_ELBO(sync_ascent=sync))
    ps.fit(svi, [(x, y)], 1, progress=False)
    optimizer: Any = optim.optimizer
    latents = sum(param.numel() for param in model.parameters())
    kept = sum(each.numel() for state in optimizer.state.values() for each in state.values() if each.dim())
    params = sum(param.numel() for param in optim.optim_objs)
    return {name: torch.tensor(value) for name, value in {"d": latents, "sent": sent[0], "kept": kept + params}.items()}


def launch(ranks: int, folder: Path, job: str, *args: Any) -> list[dict[str, Tensor]]:
    """Run a job in processes and return every rank's result; raises where one fails."""
    start: Callable[..., Any] = torch.multiprocessing.start_processes
    start(enter, (ranks, uuid4().hex, str(folder), job, args), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
