"""The search: trials are taken from an Optuna study in batches, trained as replicas, and the best one is kept."""

import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro.infer import SVI

from pyro_sam._base.arguments import flag, function, positive, positive_int
from pyro_sam.training.loop import Training
from pyro_sam.training.numbers import by_replica
from pyro_sam.training.progress import progress as display
from pyro_sam.training.validation import Validation
from pyro_sam.tuning.journal import kept
from pyro_sam.tuning.ledger import Ledger
from pyro_sam.tuning.space import check_space, groups, optuna
from pyro_sam.tuning.trials import Build, Job, Outcome, Trained

_POLL = 0.5  # seconds between looks at what other processes do


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` returns.

    Args:
        best: The chosen settings by name.
        guide: Their guide at its best weights: a single one, or with ``members`` one with as many replicas.
        table: A dict for each trial, the best first: ``trial``, its number; ``state``, which is ``"complete"``,
            ``"pruned"`` or ``"failed"``; ``nll``, the smallest validation NLL of its epochs, and the ``epoch`` that had
            it; its settings by name; ``why`` it failed.
        study: The Optuna study.
        model: The model of the guide, to :func:`pyro_sam.predict` with.
    """

    best: dict[str, Any]
    guide: Any
    table: list[dict[str, Any]]
    study: Any
    model: Any


def tune(
    build: Build,
    space: Mapping[str, Any],
    train: Any,
    validation: Any,
    *,
    num_trials: int,
    num_epochs: int,
    study: Any = None,
    max_replicas: int = 32,
    site: str | None = "obs",
    refit: bool = False,
    seed: int = 0,
    patience: float = 60.0,
    progress: bool = True,
) -> Tuned:
    r"""Choose settings by the validation NLL of the posterior predictive.

    .. math:: \mathrm{NLL} = -\frac1N \sum_n \log \frac1S \sum_s p(y_n \mid x_n, w_s), \qquad w_s \sim q

    Optuna proposes settings; trials are trained side by side as replicas of one guide, and each is told the smallest
    NLL of its epochs. The first trial is plain mean-field variational inference (``kl_weight`` 1, ``alpha`` 0 or the
    law ``"Gaussian"``) where ``space`` has it. A trial that fails, or ends in NaN, is recorded as failed and does not
    touch the others.

    Several processes, on one machine or several, may call it with one study in a journal file or a data base: they
    share ``num_trials``. What a killed one held is tried again, by the others or when the search is started again; no
    trial counts twice. All return when the last trial is finished.

    Args:
        build: Called with the settings of R trials; returns an SVI over a guide with R replicas. Of a number in the
            space the settings hold a vector of length R; of a category one value, which the R trials share; with
            ``members`` M there are R M replicas, and each number M times over:
            ``build(settings)`` may say ``SAM_ELBO(AscendedSample(settings["alpha"]), kl_weight=settings["kl_weight"])``
            and ``MeanFieldNormal(model, num_replicas=len(settings["alpha"]))``.
        space: Optuna's distributions by name, such as :func:`default_space` gives.
        train: Batches to train on, as for :func:`pyro_sam.fit`.
        validation: Data to choose by, as for :func:`pyro_sam.fit`; keep test data out of it. With ``members`` M in a
            :class:`~pyro_sam.Validation` a trial is M replicas whose predictions are mixed, and an epoch of it takes M
            times the gradients.
        num_trials: Number of trials in all, those of other processes and of earlier runs included.
        num_epochs: Number of epochs of each trial.
        study: An Optuna study that minimises; a path of a journal file, which is made if need be; None for one in
            memory. Its sampler and its pruner decide; by default ``TPESampler``, and where trials run one by one
            ``MedianPruner``: of trials side by side the others would not be faster without the pruned ones.
        max_replicas: Largest number of replicas side by side, of one trial at least; 1 also takes guides without
            replicas.
        site: Name of the observed site; None for the only one there is. A :class:`~pyro_sam.Validation` has its own.
        refit: Whether to train the chosen settings again, on training and validation data, for as many epochs as were
            best. A plate's size that ``build`` knows stays that of the training data.
        seed: Seed of each batch of trials; the random streams are left as they were.
        patience: Seconds without a sign of life after which a process on another machine is taken for dead.
        progress: Whether to show a bar (tqdm) over the trials.

    Returns:
        The choice. A guide that an earlier run or another process trained is trained again.
    Raises:
        ValueError: If an argument is out of its range; if ``build`` does not read a name of the space, reads another,
            returns a guide with another number of replicas, or gives trials something in common that training changes
            (a guide, parameters hidden from the prior, running statistics); if ``validation`` has no observations; if
            the study is of another search. Nothing is recorded then. If no trial ended with a finite NLL.
        ImportError: If Optuna is missing.
    """
    if isinstance(build, SVI):
        raise ValueError("build must be a function from settings to an SVI, such as lambda settings: ..., got an SVI.")
    function("build", build, "a function from settings to an SVI")
    positive_int("num_trials", num_trials)
    positive_int("num_epochs", num_epochs)
    positive_int("max_replicas", max_replicas)
    positive("patience", patience)
    flag("refit", refit)
    flag("progress", progress)
    space = check_space(space)
    if not isinstance(validation, Validation):
        validation = Validation(validation, site=site)
    job = Job(build, space, train, validation, num_epochs, seed)
    most = max(1, max_replicas // validation.members)
    with _quiet():
        job.check(most)
        ledger = Ledger(_study(study, most, num_epochs, seed), space, num_trials, patience)
        ledger.open({"num_epochs": num_epochs, "members": validation.members})
        with ledger.worker.alive():
            mine = _Search(job, ledger, most).run(progress)
        return _tuned(job, ledger, mine, refit)


class _Search:
    """Runs batches of trials until all are finished, by whomever.

    Args:
        job: What trials have in common.
        ledger: Where they come from.
        most: Largest number of trials in a batch.
    """

    def __init__(self, job: Job, ledger: Ledger, most: int) -> None:
        self._job, self._ledger, self._most = job, ledger, most
        self._best: tuple[int, Outcome] | None = None
        self._shown = 0

    def run(self, progress: bool) -> tuple[int, Outcome] | None:
        """Search; return number and outcome of the best trial of this process."""
        ledger = self._ledger
        self._shown = len(ledger.counted())
        self._display = display(progress, ledger.num_trials, self._shown, "tune", "trial")
        try:
            while self._shown < ledger.num_trials:
                trials = ledger.take(self._most)
                for group in groups(trials, self._job.space):
                    self._run(group)
                if not trials:
                    time.sleep(_POLL)
                self._show()
        finally:
            ledger.release()
            self._display.close()
        return self._best

    def _run(self, group: list[Any]) -> None:
        for trial, outcome in self._job.run(group, self._on_epoch):
            counts = self._ledger.finish(trial, outcome)
            if counts and not outcome.pruned and (self._best is None or outcome.nll < self._best[1].nll):
                self._best = trial.number, outcome
            self._show()
        self._display.epoch(self._least())

    def _on_epoch(self, training: Training) -> None:
        """Show how the batch under way is doing."""
        values = [each for (each,) in by_replica(training.history["validation"][-1:]) if math.isfinite(each)]
        if values:
            self._display.epoch({"epoch": training.epoch, "nll": min(values), **self._least()})

    def _show(self) -> None:
        for _ in range(len(self._ledger.counted()) - self._shown):
            self._display.update(self._least())
            self._shown += 1

    def _least(self) -> dict[str, float]:
        values = [trial.value for trial in self._ledger.counted() if trial.state.name == "COMPLETE"]
        return {"best": min(values)} if values else {}


def _tuned(job: Job, ledger: Ledger, mine: tuple[int, Outcome] | None, refit: bool) -> Tuned:
    """Return the choice, its guide trained again where it is not at hand."""
    table = [_row(trial) for trial in ledger.counted()]
    table.sort(key=lambda row: (row["state"] != "complete", math.inf if math.isnan(row["nll"]) else row["nll"]))
    first = table[0]
    if first["state"] != "complete":
        why = first["why"] or "its pruner"
        raise ValueError(
            f"none of the {len(table)} trials ended with a finite validation NLL; trial {first['trial']}: {why}."
        )
    best = {name: first[name] for name in job.space}
    if refit:
        trained = job.refit(best, first["epoch"])
    else:
        trained = _guide(job, best, mine[1] if mine and mine[0] == first["trial"] else None)
    trained.publish()
    return Tuned(best, trained.guide, table, ledger.study, trained.model)


def _guide(job: Job, best: dict[str, Any], outcome: Outcome | None) -> Trained:
    if outcome is None or outcome.guide is None:
        outcome = job.outcomes([best])[0]
    if outcome.guide is None:
        raise ValueError(f"the best settings {best} failed when they were trained again: {outcome.why}.")
    return outcome.guide()


def _row(trial: Any) -> dict[str, Any]:
    state = {"COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "failed")
    told = {"nll": math.nan, "epoch": 0, "why": ""} | trial.user_attrs
    return {
        "trial": trial.number,
        "state": state,
        **{name: told[name] for name in ("nll", "epoch", "why")},
        **trial.params,
    }


def _study(study: Any, most: int, num_epochs: int, seed: int) -> Any:
    package = optuna()
    if isinstance(study, package.Study):
        return study
    if study is not None and not isinstance(study, str | os.PathLike):
        raise ValueError(f"study must be an Optuna study, a path of a journal file or None, got {study!r}.")
    if study is not None and (Path(study).is_dir() or not Path(study).parent.is_dir()):
        raise ValueError(f"study must be a file in a directory that exists, got study={str(study)!r}.")
    pruners = package.pruners
    settings = {
        # trials under way count as bad ones meanwhile, so that those of a batch differ
        "sampler": package.samplers.TPESampler(seed=None if study else seed, constant_liar=True),
        "pruner": pruners.MedianPruner(n_warmup_steps=num_epochs // 3) if most == 1 else pruners.NopPruner(),
    }
    return package.create_study(**settings) if study is None else kept(os.fspath(study), **settings)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's log, and warnings of features that may change, off the progress bar."""
    logging = optuna().logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna().exceptions.ExperimentalWarning)
            # the table says which failed, and how well the others predict
            warnings.filterwarnings("ignore", message=r"replica .*the others go on")
            warnings.filterwarnings("ignore", message=r"(?s).*print\(pyro_sam\.diagnose")
            yield
    finally:
        logging.set_verbosity(before)
