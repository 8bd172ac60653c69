"""What is searched: names and ranges, a space for each law, and the settings that a batch of trials is built from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pyro_sam.perturbation import Adversarial, AscendedSample, Gaussian, MixSAM, Perturbation

Space = dict[str, Any]  # Optuna's distributions by name

# settings with which every law is plain mean-field variational inference
PLAIN = {"law": "Gaussian", "alpha": 0.0, "kl_weight": 1.0}


def optuna() -> Any:
    """Return the package that searches.

    Raises:
        ImportError: If it is missing.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError('tune needs optuna: pip install "pyro-sam[tune]"') from error
    return optuna


def default_space(*laws: type[Perturbation]) -> Space:
    r"""Return the space to search for one law, or for several to choose from.

    =============  ===========================================================
    name           range
    =============  ===========================================================
    ``kl_weight``  0.001 to 1, on a log scale
    ``alpha``      0 to 10 (:class:`~pyro_sam.AscendedSample`)
    ``rho``        0.1 to 30, on a log scale (:class:`~pyro_sam.Adversarial`, :class:`~pyro_sam.MixSAM`)
    ``kappa``      0 to 3 (:class:`~pyro_sam.MixSAM`)
    ``law``        names of the laws, ``"Gaussian"`` among them, where no ``alpha = 0`` says the same
    =============  ===========================================================

    Plain mean-field variational inference is always a choice: ``kl_weight = 1`` with ``alpha = 0`` or the law
    ``"Gaussian"``. It is the first trial of :func:`tune`. A learning rate and the like are added by name, say
    ``{**ps.default_space(), "lr": optuna.distributions.FloatDistribution(1e-3, 1e-1, log=True)}``.

    Args:
        *laws: Classes of perturbations; :class:`~pyro_sam.AscendedSample` for none.
    Returns:
        Optuna's distributions by name; :func:`law_of` makes the perturbation of it.
    Raises:
        ValueError: If a law has no default space.
        ImportError: If Optuna is missing.
    """
    distributions = optuna().distributions
    laws = laws or (AscendedSample,)
    for law in laws:
        if law not in _NUMBERS:
            known = ", ".join(each.__name__ for each in _NUMBERS)
            raise ValueError(
                f"default_space knows the laws {known}, got {law!r}; write the space of another as a dict."
            )
    space: Space = {"kl_weight": distributions.FloatDistribution(1e-3, 1.0, log=True)}
    for law in laws:
        space.update({name: distributions.FloatDistribution(*_RANGES[name]) for name in _NUMBERS[law]})
    plain: list[type[Perturbation]] = [] if {Gaussian, AscendedSample} & set(laws) else [Gaussian]
    names = list(dict.fromkeys(law.__name__ for law in [*plain, *laws]))
    if len(names) > 1:
        space["law"] = distributions.CategoricalDistribution(names)
    return space


def law_of(settings: Mapping[str, Any]) -> Perturbation:
    """Return the perturbation that settings of a :func:`default_space` ask for."""
    laws = {law.__name__: law for law in _NUMBERS}
    name = settings.get("law", "AscendedSample" if "alpha" in settings else "Gaussian")
    law: Any = laws[name]
    return law(**{number: settings[number] for number in _NUMBERS[law]})


_NUMBERS: dict[type[Perturbation], tuple[str, ...]] = {
    Gaussian: (),
    AscendedSample: ("alpha",),
    Adversarial: ("rho",),
    MixSAM: ("rho", "kappa"),
}
_COLUMNS = frozenset({"trial", "state", "nll", "epoch", "why"})
_RANGES: dict[str, Any] = {"alpha": (0.0, 10.0), "rho": (0.1, 30.0, True), "kappa": (0.0, 3.0)}


class Settings(Mapping[str, Any]):
    """The settings of a batch of trials: a vector with a number for each trial, or a category that they share.

    Args:
        params: The settings of each trial.
        space: What they were drawn from.
        read: Takes down the names that somebody reads.
    """

    def __init__(self, params: Sequence[Mapping[str, Any]], space: Space, read: set[str] | None = None) -> None:
        self._read = set() if read is None else read
        self._values: dict[str, Any] = {
            name: params[0][name] if is_category(space[name]) else torch.tensor([each[name] for each in params])
            for name in space
        }

    def __getitem__(self, name: str) -> Any:
        """Return a setting."""
        if name not in self._values:
            raise KeyError(f"build reads {name!r}, which is not in the space; it has {', '.join(self._values)}")
        self._read.add(name)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a setting."""
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._values)

    def __len__(self) -> int:
        """Return the number of settings."""
        return len(self._values)

    def __repr__(self) -> str:
        """Return the settings as text."""
        return f"Settings({self._values!r})"


def check_space(space: Any) -> Space:
    """Return the space.

    Raises:
        ValueError: If it is no dict of Optuna's distributions, or has a name that the table needs.
    """
    kind = optuna().distributions.BaseDistribution
    if not isinstance(space, Mapping) or not space or not all(isinstance(each, kind) for each in space.values()):
        raise ValueError(
            "space must be a dict of Optuna's distributions by name, such as ps.default_space() or {'kl_weight': "
            f"FloatDistribution(0.001, 1.0, log=True)}}, got {space!r}."
        )
    if taken := sorted(_COLUMNS & space.keys()):
        raise ValueError(f"space must not have a setting of the name {taken[0]!r}, which is a column of the table.")
    return dict(space)


def is_category(distribution: Any) -> bool:
    """Return whether a setting is one of several choices, which all trials of a batch share."""
    return isinstance(distribution, optuna().distributions.CategoricalDistribution)


def suggest(trial: Any, name: str, distribution: Any) -> Any:
    """Let a trial have a setting."""
    if is_category(distribution):
        return trial.suggest_categorical(name, distribution.choices)
    whole = isinstance(distribution, optuna().distributions.IntDistribution)
    ask = trial.suggest_int if whole else trial.suggest_float
    return ask(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def plain(space: Space) -> dict[str, Any]:
    """Return the settings of plain mean-field variational inference that are in a space."""
    return {name: value for name, value in PLAIN.items() if name in space and _contains(space[name], value)}


def examples(space: Space) -> Iterator[dict[str, Any]]:
    """Yield settings of a space, with every category among them."""
    first = {name: each.choices[0] if is_category(each) else each.low for name, each in space.items()} | plain(space)
    yield first
    for name, each in space.items():
        if is_category(each):
            yield from ({**first, name: choice} for choice in each.choices if choice != first[name])


def groups(trials: Sequence[Any], space: Space) -> list[list[Any]]:
    """Return the trials by their categories."""
    found: dict[Any, list[Any]] = {}
    for trial in trials:
        key = tuple(trial.params[name] for name, each in space.items() if is_category(each))
        found.setdefault(key, []).append(trial)
    return list(found.values())


def _contains(distribution: Any, value: Any) -> bool:
    create: Callable[..., Any] = optuna().trial.create_trial
    try:
        create(params={"it": value}, distributions={"it": distribution}, value=0.0)
    except ValueError:
        return False
    return True
