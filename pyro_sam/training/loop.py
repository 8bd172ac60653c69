"""A training run: its epochs and steps, and how it is kept and taken up again."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_sam._base import ranks as distributed
from pyro_sam._base.buffers import kept_buffers
from pyro_sam.elbo.estimator import SAM_ELBO
from pyro_sam.optim import JointOptim
from pyro_sam.training import checkpoint as files
from pyro_sam.training.advice import (
    elbo_of,
    elbo_settings,
    has_nan,
    store_before,
    terms,
    warn_of_takeover,
    warn_of_unscaled_batches,
)
from pyro_sam.training.checkpoint import Checkpoint, CheckpointError, random_states, restore_random_states
from pyro_sam.training.interrupt import deferred_interrupt
from pyro_sam.training.position import Position, arguments, check_arguments
from pyro_sam.training.progress import progress as display
from pyro_sam.training.trained import Trained

History = dict[str, list[float]]


class Training:
    """A training run as callbacks see it.

    Attributes:
        svi: Model, guide, optimiser and loss.
        loader: The batches.
        num_epochs: Number of epochs in all.
        history: What :func:`fit` returns, so far.
        epoch: Number of finished epochs.
        batch: Number of batches behind in the present one.
        step: Number of steps behind in all.
    """

    def __init__(
        self,
        svi: SVI,
        loader: Any,
        num_epochs: int,
        *,
        checkpoint: str | PathLike[str] | Checkpoint | None,
        resume: bool,
        callbacks: Sequence[Callable[["Training"], Any]],
    ) -> None:
        _check(svi, loader, num_epochs, callbacks)
        self.svi, self.loader, self.num_epochs = svi, loader, num_epochs
        self.history: History = {}
        self.epoch = self.batch = self.step = 0
        self.checkpoint = (
            checkpoint if checkpoint is None or isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        )
        if self.checkpoint and pyro.settings.get("module_local_params") and not isinstance(svi.optim, JointOptim):
            raise ValueError(
                "a checkpoint under module_local_params needs names that Pyro's optimisers lose; use "
                "pyro_sam.optim.JointOptim."
            )
        self._callbacks = tuple(callbacks)
        self._trained, self._position = Trained(), Position(loader)
        self._sums = {"loss": 0.0, "grad_norm": 0.0}
        self._whole, self._stopped, self._seconds = True, False, 0.0
        self._written: int | None = None  # the step of the last checkpoint
        self._saved = files.read_last(self.checkpoint.path) if self.checkpoint and resume else None

    def run(self, *, progress: bool) -> None:
        """Train to the end."""
        now = self._resume(self._saved) if self._saved else None
        self._saved = None
        total = len(self.loader) if hasattr(self.loader, "__len__") else None
        self._display = display(
            progress and distributed.rank() == 0,
            total and total * self.num_epochs,
            (total or 0) * self.epoch + self.batch,
        )
        try:
            with deferred_interrupt() as interrupted:
                while self.epoch < self.num_epochs and not self._stopped:
                    self._epoch(now, interrupted)
                    now = None
        except BaseException as error:
            for param in self._trained.params.values():
                param.grad = None
            if isinstance(error, KeyboardInterrupt) and self._whole and self.step and not distributed.is_on():
                self._save()
            raise
        finally:
            self._display.close()

    # One epoch, one step

    def _epoch(self, now: dict[str, Any] | None, interrupted: Callable[[], bool]) -> None:
        began = time.perf_counter() - self._seconds
        for batch in self._position.batches(self.epoch, self.batch, now):
            self._whole = False
            self._step(batch)
            self._whole, self._seconds = True, time.perf_counter() - began
            if interrupted():
                raise KeyboardInterrupt
            if self.checkpoint and self.checkpoint.every and self.step % self.checkpoint.every == 0:
                self._save()
        if self.batch == 0:
            raise ValueError(_NO_BATCH.format(self.epoch + 1))
        self._whole = False
        self._close_epoch()
        self._whole = True
        self._stopped = any([callback(self) is True for callback in self._callbacks])  # noqa: C419  # all are called
        self._save()

    def _step(self, batch: Any) -> None:
        svi, first = self.svi, self.step == 0
        args, kwargs = arguments(batch)
        before = store_before(svi.guide) if first else None
        if first:
            self._meet(batch)
        try:
            if isinstance(svi.optim, JointOptim) and svi.optim.needs_closure:
                loss, norm = svi.optim.minimize(svi, *args, **kwargs), math.nan
            else:
                loss, norm = self._gradient_step(args, kwargs, modules=first)
        except (FloatingPointError, ValueError) as error:
            if name := has_nan(batch):
                raise FloatingPointError(self._not_finite(f"{name} of the batch has NaN")) from error
            raise
        self.batch, self.step, self._position.last = self.batch + 1, self.step + 1, batch
        self._sums["loss"] += loss
        self._sums["grad_norm"] += norm
        if first:
            warn_of_takeover(before, self._trained.params)
            warn_of_unscaled_batches(svi, self.loader, args, kwargs)
        self._display.update({**self._means(), **{key: self.history[key][-1] for key in ("data", "kl") if self.epoch}})

    def _gradient_step(self, args: Any, kwargs: Any, *, modules: bool) -> tuple[float, float]:
        """Do what ``SVI.step`` does, but look at the gradient in between."""
        svi, known = self.svi, len(self._trained.params)
        with self._trained.found(modules=modules) as used:
            loss = svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
        if len(self._trained.params) != known and isinstance(svi.optim, JointOptim):
            svi.optim.name_parameters(self._trained.params.items())
        params = list({id(param): param for _, param in sorted(used.items())}.values())
        distributed.average_gradients(params)
        loss = distributed.mean_number(float(loss))
        norm = float(clip_grad_norm_(params, math.inf))  # changes nothing
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(self._not_finite(f"the loss is {loss:g} and its gradient's norm {norm:g}"))
        svi.optim(set(params))
        pyro.infer.util.zero_grads(params)
        return loss, norm

    def _meet(self, batch: Any) -> None:
        """Look at the first batch, and let all processes start from the first one's parameters."""
        check_arguments(self.svi.model, batch)
        if distributed.is_on():
            self._evaluate(batch)
            distributed.broadcast(self._trained.params)

    def _evaluate(self, batch: Any) -> None:
        """Evaluate the loss, so that all parameters exist and are known."""
        args, kwargs = arguments(batch)
        states = random_states()
        with self._trained.found(modules=True), torch.no_grad(), kept_buffers():
            self.svi.loss(self.svi.model, self.svi.guide, *args, **kwargs)
        restore_random_states(states)

    def _means(self) -> dict[str, float]:
        return {name: total / self.batch for name, total in self._sums.items()}

    def _close_epoch(self) -> None:
        optim, found = self.svi.optim, terms(self.svi, *arguments(self._position.last))
        values = {**self._means(), "data": found.data, "kl": found.kl} if found else self._means()
        for name, value in {**values, "lr": _learning_rate(optim), "seconds": self._seconds}.items():
            self.history.setdefault(name, []).append(value)
        self._sums = dict.fromkeys(self._sums, 0.0)
        self.epoch, self.batch, self._seconds = self.epoch + 1, 0, 0.0
        if isinstance(optim, PyroLRScheduler) or (
            isinstance(optim, JointOptim) and optim.scheduler_interval == "epoch"
        ):
            _step_scheduler(optim, values["loss"])
        self._display.epoch(values)

    def _not_finite(self, what: str) -> str:
        last = "no checkpoint was kept"
        if self.checkpoint and self._written is not None:
            last = f"the last good checkpoint is {self.checkpoint.path}, of step {self._written}"
        return (
            f"{what}, in epoch {self.epoch + 1} at batch {self.batch + 1}. The parameters are those before this step; "
            f"{last}. Try a lower learning rate, clip_norm of JointOptim, a smaller rho or init_scale."
        )

    # Checkpoints

    def _save(self) -> None:
        if not self.checkpoint:
            return
        now = self._position.states()
        content = {
            **{name: getattr(self, name) for name in _KEPT},
            "random": distributed.gathered(now),
            "start": distributed.gathered(now if self.batch == 0 else self._position.start),
            "trained": self._trained.state(),
            "optim": self.svi.optim.get_state(),
            "elbo": elbo_settings(self.svi),
            "ascent": distributed.gathered(self._elbo_state()),
            "versions": files.versions(),
        }
        if distributed.rank() > 0:
            return
        try:
            files.write(self.checkpoint.path, content)
        except OSError as error:
            warnings.warn(f"no checkpoint was written at step {self.step}, training goes on: {error}.", stacklevel=2)
        else:
            self._written = self.step

    def _elbo_state(self) -> dict[str, Any]:
        elbo = elbo_of(self.svi)
        return dict(elbo.state_dict()) if isinstance(elbo, SAM_ELBO) else {}

    def _resume(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Put everything into a saved state; return the random states to go on from."""
        ranks = len(distributed.gathered(None))
        if len(saved["random"]) != ranks:
            raise CheckpointError(
                f"the checkpoint is of a run with {len(saved['random'])} processes, this one has {ranks}; use as many, "
                "or resume=False to start anew."
            )
        batch = next(iter(self.loader), None)
        if batch is None:
            raise ValueError(_NO_BATCH.format(1))
        check_arguments(self.svi.model, batch)
        self._evaluate(batch)
        self._trained.restore(saved["trained"])
        _load_optim(self.svi.optim, self._trained.params, saved["optim"])
        for name in _KEPT:
            setattr(self, name, saved[name])
        here = elbo_settings(self.svi)
        changed = [
            f"{name}: {saved['elbo'].get(name)} then, {here[name]} now"
            for name in here
            if here[name] != saved["elbo"].get(name)
        ]
        if changed:
            warnings.warn(f"the loss is not the one of the checkpoint ({'; '.join(changed)}).", stacklevel=2)
        elbo, ascent = elbo_of(self.svi), saved["ascent"][distributed.rank()]
        if isinstance(elbo, SAM_ELBO) and not changed:
            elbo.load_state_dict(ascent)
        self._written, self._position.last = self.step, batch
        self._position.start = saved["start"][distributed.rank()]
        return saved["random"][distributed.rank()]


_KEPT = ("history", "epoch", "batch", "step", "_sums", "_seconds", "_stopped")
_NO_BATCH = (
    "loader must give batches in every epoch, got none in epoch {}; a generator is used up after one: pass a list or a "
    "DataLoader, and see that drop_last leaves a batch."
)


def _check(svi: Any, loader: Any, num_epochs: Any, callbacks: Any) -> None:
    if not isinstance(svi, SVI) or not isinstance(svi.optim, PyroOptim):
        raise ValueError(
            f"svi must be a pyro.infer.SVI with a PyroOptim such as JointOptim(torch.optim.Adam, {{'lr': 1e-3}}), "
            f"got {svi!r}."
        )
    if not isinstance(loader, Iterable) or isinstance(loader, str | bytes):
        raise ValueError(f"loader must be an iterable of batches, such as a DataLoader or a list, got {loader!r}.")
    if type(num_epochs) is not int or num_epochs < 1:
        raise ValueError(f"num_epochs must be a positive whole number, got num_epochs={num_epochs!r}.")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise ValueError(f"callbacks must be a sequence of callables, got callbacks={callbacks!r}.")


def _load_optim(optim: PyroOptim, params: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Let an optimiser know its parameters, and load its state; the epoch may close before the next step."""
    for param in params.values():
        param.grad = None  # a step without gradients moves nothing, but makes what holds the states
    if isinstance(optim, JointOptim):
        optim.name_parameters(params.items())
        optim(set(params.values()), lambda: 0.0)
        optim.set_state(state)
        return
    optim(list(params.values()))
    for name, param in params.items():
        own, kept = optim.optim_objs[param], state[name]
        if hasattr(own, "optimizer"):
            own.load_state_dict(kept["scheduler"])
            own, kept = own.optimizer, kept["optimizer"]
        own.load_state_dict(kept)


def _torch_optimizer(optim: Any) -> Any:
    first = next(iter(optim.optim_objs.values()))
    return getattr(first, "optimizer", first)


def _learning_rate(optim: PyroOptim) -> float:
    return float(_torch_optimizer(optim).param_groups[0].get("lr", math.nan))


def _step_scheduler(optim: Any, loss: float) -> None:
    scheduler = optim.scheduler if isinstance(optim, JointOptim) else next(iter(optim.optim_objs.values()))
    optim.step(*[loss] if isinstance(scheduler, ReduceLROnPlateau) else [])
