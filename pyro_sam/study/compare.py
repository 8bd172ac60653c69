"""All methods on one data set, at equal numbers of gradients."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from pyro_sam.study.datasets import Dataset
from pyro_sam.study.results import Results
from pyro_sam.study.settings import Settings
from pyro_sam.study.train import Diverged, budget, train_together

OnStep = Callable[[str, int, int, float], None]


def compare(
    datasets: Mapping[int, Dataset],
    methods: Sequence[str],
    settings: Settings,
    out: Path,
    on_step: OnStep,
    tuned: Mapping[str, Settings] | None = None,
) -> Results:
    """Train and test every method on every seed's split, all seeds of a method together, and keep the results of each.

    Args:
        datasets: The split of each seed.
        methods: Names of the methods.
        settings: What they share.
        out: Folder for ``results.json``; it exists.
        on_step: Called after each step with method, seed, gradients of the step and loss.
        tuned: Settings of methods that have their own.
    Returns:
        The results. If a run was stopped, by a number that is not finite or by Ctrl-C, ``stopped`` says where, and no
        run follows.
    Raises:
        OutputError: If ``out`` cannot be written to any more.
    """
    results = Results(datasets, methods, settings, tuned)
    results.save(out)  # what an earlier comparison left there must not pass for this one's
    for method in methods:
        for together in _of_one_size(datasets):
            try:
                runs = train_together(together, method, results.settings_of(method), partial(on_step, method))
            except Diverged as error:
                results.stop(error)
            except KeyboardInterrupt:
                results.interrupt(method, next(iter(together)))
            else:
                results.runs += runs
            results.save(out)
            if results.stopped is not None:
                return results
    return results


def _of_one_size(datasets: Mapping[int, Dataset]) -> list[dict[int, Dataset]]:
    """Return the splits in groups that can be trained together."""
    groups: dict[int, dict[int, Dataset]] = {}
    for seed, dataset in datasets.items():
        groups.setdefault(len(dataset.x_train), {})[seed] = dataset
    return list(groups.values())


def total_gradients(datasets: Mapping[int, Dataset], methods: Sequence[str], settings: Settings) -> int:
    """Return the gradients of the whole comparison."""
    return len(methods) * sum(budget(len(dataset.x_train), settings) for dataset in datasets.values())
