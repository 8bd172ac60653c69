"""A training run: its epochs and steps, and how it is kept and taken up again."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from operator import add
from os import PathLike
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_sam._base import ranks as distributed
from pyro_sam._base.replicas import replicas_of
from pyro_sam.optim import JointOptim
from pyro_sam.training import checkpoint as files
from pyro_sam.training.advice import (
    check_run,
    not_finite,
    store_before,
    warn_of_takeover,
    warn_of_unscaled_batches,
)
from pyro_sam.training.annealing import Anneal
from pyro_sam.training.best import Best
from pyro_sam.training.checkpoint import Checkpoint, CheckpointError
from pyro_sam.training.collapse import Watch
from pyro_sam.training.estimator import elbo_of, elbo_settings, elbo_state, loss_of_all, norm_of_all, restore_elbo
from pyro_sam.training.interrupt import deferred_interrupt
from pyro_sam.training.numbers import Number, any_finite, each, mapped, overall
from pyro_sam.training.optimisers import close_epoch, learning_rate, load_optim
from pyro_sam.training.position import Position, arguments, check_arguments
from pyro_sam.training.progress import progress as display
from pyro_sam.training.stopping import EarlyStopping
from pyro_sam.training.streams import own_streams, untouched
from pyro_sam.training.terms import TermSums, mean_pair, terms
from pyro_sam.training.trained import Trained
from pyro_sam.training.validation import Validation

_DIVERGED = "Try a lower learning rate, clip_norm of JointOptim, a smaller rho or init_scale."
History = dict[str, list[Any]]  # a number an epoch, of a guide with replicas a list of theirs


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
        best: The smallest validation NLL so far, with its epoch and weights.
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
        validation: Validation | None = None,
        restore_best_weights: bool = True,
    ) -> None:
        check_run(svi, loader, num_epochs, callbacks)
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
        if validation is not None:
            validation.check(svi.model, svi.guide)
        self.best = Best()
        self._validation, self._restore_best = validation, restore_best_weights
        self._callbacks = tuple(callbacks)
        self._trained, self._position = Trained(), Position(loader, lambda: own_streams(svi.model, svi.guide))
        self._sums: dict[str, Number] = {"loss": 0.0, "grad_norm": 0.0}
        self._terms = TermSums()
        self._watch = Watch()
        self._whole, self._stopped, self._seconds = True, False, 0.0
        self._written: int | None = None  # the step of the last checkpoint
        self._saved = files.read_last(self.checkpoint.path) if self.checkpoint and resume else None

    def run(self, *, progress: bool) -> None:
        """Train to the end."""
        if len(set(distributed.gathered(self._saved and self._saved["step"]))) > 1:
            raise CheckpointError(
                f"the processes find different checkpoints at {self.checkpoint and self.checkpoint.path}; use a path "
                "that all of them see, or resume=False to start anew."
            )
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
                if interrupted():  # since the last step
                    raise KeyboardInterrupt
            if (self._validation and self._restore_best) or self._ends_apart():
                self.best.restore(self._trained)
            self._watch.end(self.svi, self.step)
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
        for callback in self._callbacks:
            getattr(callback, "before_epoch", _nothing)(self)
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
        if self.epoch < self.num_epochs:
            self._watch.epoch(self.svi, self.step, self.epoch)
        wanted = [callback(self) is True for callback in self._callbacks]  # all are called
        self._stopped = any(distributed.gathered(any(wanted)))  # by one process, and the others would wait for it
        self._save()

    def _step(self, batch: Any) -> None:
        svi, first = self.svi, self.step == 0
        args, kwargs = arguments(batch)
        before = store_before(svi.guide) if first else None
        if first:
            self._meet(batch)
        try:
            loss, norm, pair = self._move(args, kwargs)
        except (FloatingPointError, ValueError) as error:
            if where := not_finite(batch):
                raise FloatingPointError(self._not_finite(where, "Clean the data, or leave such rows out.")) from error
            raise
        self.batch, self.step, self._position.last = self.batch + 1, self.step + 1, batch
        self._watch.see(batch)
        self._add("loss", loss)
        self._add("grad_norm", norm)
        self._terms.add(pair)
        if first:
            warn_of_takeover(before, self._trained.params)
            warn_of_unscaled_batches(svi, self.loader, args, kwargs)
        known = [name for name in ("data", "kl", "validation") if name in self.history]
        values: dict[str, Number] = {**self._means(), **{name: self.history[name][-1] for name in known}}
        self._display.update({name: overall(value) for name, value in values.items()})

    def _add(self, name: str, value: Number) -> None:
        self._sums[name] = mapped(add, self._sums[name], value)

    def _move(self, args: Any, kwargs: Any) -> tuple[Number, Number, Any]:
        """Take a step; return loss, gradient's norm and the loss's two terms where it began."""
        optim, found = self.svi.optim, []

        def evaluate() -> tuple[Any, dict[str, Tensor]]:
            loss, norm, used = self._evaluate_gradient(args, kwargs)
            found.append((loss, norm, getattr(elbo_of(self.svi), "_last_terms", None)))
            return loss, used

        if isinstance(optim, JointOptim) and optim.needs_closure:
            optim.descend(evaluate, own_streams(self.svi.model, self.svi.guide))
        else:
            params = set(evaluate()[1].values())
            optim(params)
            pyro.infer.util.zero_grads(params)
        return found[0]

    def _evaluate_gradient(self, args: Any, kwargs: Any) -> tuple[Number, Number, dict[str, Tensor]]:
        """Return loss, gradient's norm, and the parameters whose gradients are now the means over all processes."""
        svi, known = self.svi, len(self._trained.params)
        with self._trained.found(modules=self.step == 0) as used:
            loss = svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
        if len(self._trained.params) != known and isinstance(svi.optim, JointOptim):
            svi.optim.name_parameters(self._trained.params.items())
        params = list({id(param): param for _, param in sorted(used.items())}.values())  # once each
        distributed.average_gradients(params)
        mean, norm = loss_of_all(svi, loss), norm_of_all(params)
        if not any_finite(mean, norm):  # replicas that are lost leave the others alone
            worst = f"the loss is {each(mean)[0]:g} and its gradient's norm {each(norm)[0]:g}"
            raise FloatingPointError(self._not_finite(worst))
        return mean, norm, used

    def _meet(self, batch: Any) -> None:
        """Look at the first batch, and let all processes start from the first one's parameters."""
        check_arguments(self.svi.model, batch)
        if distributed.is_on():
            self._evaluate(batch)
            distributed.broadcast(self._trained.params)
            distributed.broadcast(self._trained.buffers())

    def _evaluate(self, batch: Any) -> None:
        """Evaluate the loss, so that all parameters exist and are known."""
        args, kwargs = arguments(batch)
        model, guide = self.svi.model, self.svi.guide
        with self._trained.found(modules=True), torch.no_grad(), untouched(model, guide):
            self.svi.loss(model, guide, *args, **kwargs)

    def _means(self) -> dict[str, Number]:
        return {name: mapped(lambda total: total / self.batch, total) for name, total in self._sums.items()}

    def _close_epoch(self) -> None:
        optim = self.svi.optim
        values = {**self._means(), **self._mean_terms(), **self._validate()}
        self._keep(values)
        for name, value in {**values, "lr": learning_rate(optim), "seconds": self._seconds}.items():
            self.history.setdefault(name, []).append(value)
        self._sums, self._terms = dict.fromkeys(self._sums, 0.0), TermSums()
        self.epoch, self.batch, self._seconds = self.epoch + 1, 0, 0.0
        close_epoch(optim, overall(values["loss"]))
        self._display.epoch({name: overall(value) for name, value in values.items()})

    def _mean_terms(self) -> dict[str, Number]:
        """Return the epoch's data term and KL, from its last batch if need be; nothing if one epoch has none."""
        names = ("data", "kl")
        pair = self._terms.means(self.batch, self._means()["loss"])
        if pair is None:
            last = terms(self.svi, *arguments(self._position.last))
            pair = mean_pair(None if last is None else [last.data, last.kl])
        if pair is None:
            for name in names:
                self.history.pop(name, None)
        if pair is None or (self.history and not self.history.keys() >= set(names)):
            return {}
        return dict(zip(names, pair, strict=True))

    def _validate(self) -> dict[str, Number]:
        """Return the validation NLL; NaN stands for an epoch without one."""
        if self._validation is None:
            return {"validation": math.nan} if "validation" in self.history else {}
        if self.epoch:  # a checkpoint without validation is gone on from
            self.history.setdefault("validation", [math.nan] * self.epoch)
        return {"validation": self._validation.nll(self.svi, self._trained.modules)}

    def _keep(self, values: dict[str, Number]) -> None:
        """Keep the weights that the run, or a replica that has not stopped, would end at."""
        stops = [callback.stopped(self.history) for callback in self._callbacks if isinstance(callback, EarlyStopping)]
        stopped = [any(column) for column in zip(*stops, strict=True)] or [False] * len(each(values["loss"]))
        if self._validation and self._restore_best:
            self.best.offer(values["validation"], self.epoch + 1, self._trained, stopped)
        elif self._ends_apart():
            self.best.offer(
                mapped(lambda _: -float(self.epoch), values["loss"]), self.epoch + 1, self._trained, stopped
            )

    def _ends_apart(self) -> bool:
        """Return whether replicas stop one by one."""
        return replicas_of(self.svi.guide) is not None and any(isinstance(c, EarlyStopping) for c in self._callbacks)

    def _not_finite(self, what: str, cure: str = _DIVERGED) -> str:
        last = "no checkpoint was kept"
        if self.checkpoint and self._written is not None:
            last = f"the last good checkpoint is {self.checkpoint.path}, of step {self._written}"
        return (
            f"{what}, in epoch {self.epoch + 1} at batch {self.batch + 1}. The parameters are those before this step; "
            f"{last}. {cure}"
        )

    # Checkpoints

    def _save(self) -> None:
        if not self.checkpoint:
            return
        now = self._position.states()
        content = {
            **{name: getattr(self, name) for name in _KEPT},
            "random": distributed.gathered(now),
            "terms": distributed.gathered(self._terms.state()),
            "start": distributed.gathered(now if self.batch == 0 else self._position.start),
            "trained": self._trained.state(),
            "optim": self.svi.optim.get_state(),
            "elbo": elbo_settings(self.svi),
            "ascent": distributed.gathered(elbo_state(self.svi)),
            "best": self.best.state(),
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
        now: dict[str, Any] = saved["random"][distributed.rank()]
        self._position.check(now)
        self._trained.restore(saved["trained"])
        load_optim(self.svi.optim, self._trained.params, saved["optim"])
        for name in _KEPT:
            setattr(self, name, saved[name])
        if self.batch:  # checkpoints of an older version have no sums
            self._terms.load(saved["terms"][distributed.rank()] if "terms" in saved else None)
        changing = {name for each in self._callbacks if isinstance(each, Anneal) for name in each.changes()}
        restore_elbo(self.svi, saved["elbo"], saved["ascent"][distributed.rank()], changing)
        if "best" in saved:
            self.best.load(saved["best"])
        self._written, self._position.last = self.step, batch
        self._position.start = saved["start"][distributed.rank()]
        if self._stopped or self.epoch >= self.num_epochs:  # nothing is left but to be where it ended
            self._position.restore(now)
        return now


def _nothing(training: Training) -> None:
    """Stand in for a method that a callback does not have."""


_KEPT = ("history", "epoch", "batch", "step", "_sums", "_seconds", "_stopped")
_NO_BATCH = (
    "loader must give batches in every epoch, got none in epoch {}; a generator is used up after one: pass a list or a "
    "DataLoader, and see that drop_last leaves a batch."
)
