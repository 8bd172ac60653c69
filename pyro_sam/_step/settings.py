"""The settings of the estimator as one value, checked as a whole."""

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch import Tensor

from pyro_sam._base.arguments import Numbers, finite, flag, non_negative, numbers, one_of, positive_int
from pyro_sam._step.own_laws import own_laws
from pyro_sam.perturbation import Adversarial, AscendedSample, Gaussian, MixSAM, Mixture, Perturbation

ScaleGradient = Literal["perturbed", "mean"]
Ascent = Literal["fresh", "previous"]
Scope = Literal["global", "site", "event"]
SCOPES: tuple[str, ...] = ("global", "site", "event")


@dataclass(frozen=True)
class Settings:
    """What :class:`~pyro_sam.SAM_ELBO` is told; see there for each.

    Raises:
        ValueError: If one of them is out of its range, or two do not go together.
    """

    perturbation: Perturbation = field(default_factory=AscendedSample)
    kl_weight: Numbers = 1.0
    scale_gradient: ScaleGradient = "perturbed"
    scope: Scope = "global"
    hide: Any = frozenset()
    num_particles: int = 1
    vectorize_particles: bool = False
    max_plate_nesting: float = math.inf
    retain_graph: bool | None = None
    strict_enumeration_warning: bool = True
    ascent: Ascent = "fresh"
    ascent_decay: float = 0.9
    sync_ascent: bool = False
    compile: bool = False
    fast: bool = True

    def __post_init__(self) -> None:
        """Check all, and bring them into one form."""
        law = self.perturbation
        if not isinstance(law, Perturbation):
            raise ValueError(
                f"perturbation must be a Perturbation such as Adversarial(rho=1.0), got {law!r} "
                f"of type {type(law).__name__}."
            )
        one_of("scale_gradient", self.scale_gradient, ("perturbed", "mean"))
        one_of("scope", self.scope, SCOPES)
        one_of("ascent", self.ascent, ("fresh", "previous"))
        for name in ("vectorize_particles", "compile", "sync_ascent", "fast", "strict_enumeration_warning"):
            flag(name, getattr(self, name))
        if self.retain_graph is not None:
            flag("retain_graph", self.retain_graph)
        positive_int("num_particles", self.num_particles)
        if self.max_plate_nesting != math.inf and (
            not isinstance(self.max_plate_nesting, int) or self.max_plate_nesting < 0
        ):
            raise ValueError(
                "max_plate_nesting must be a whole number of at least 0, or infinity, got "
                f"max_plate_nesting={self.max_plate_nesting!r}."
            )
        weight = numbers(non_negative, "kl_weight", self.kl_weight)
        object.__setattr__(self, "kl_weight", weight if isinstance(weight, tuple) else float(weight))
        object.__setattr__(self, "hide", self.hide if callable(self.hide) else _names(self.hide))
        _check_ascent(self)

    @property
    def together(self) -> int:
        """Number of particles that run as one."""
        return self.num_particles if self.vectorize_particles else 1

    @property
    def is_evidence(self) -> bool:
        """Whether the loss is minus the ELBO itself, at samples of the guide."""
        return isinstance(self.perturbation, Gaussian) and self.kl_weight == 1

    def is_hidden(self, name: str) -> bool:
        """Return whether a guide site is left at its own random sample."""
        return bool(self.hide(name)) if callable(self.hide) else name in self.hide

    def check_replicas(self, number: int | None) -> None:
        """Check that numbers of which there is one for each replica are as many as a guide has replicas.

        Raises:
            ValueError: If they are not.
        """
        for name, length in _lengths({"kl_weight": self.kl_weight, "perturbation": self.perturbation}):
            if number is None:
                raise ValueError(
                    f"{name} has {length} numbers, one for each replica, and the guide has no replicas; give one "
                    f"number, or MeanFieldNormal(model, num_replicas={length})."
                )
            if length != number:
                raise ValueError(f"{name} must have a number for each of the guide's {number} replicas, got {length}.")

    def evaluation(self) -> "Settings":
        """Return the settings of the ordinary minus-ELBO."""
        return replace(
            self, perturbation=Gaussian(), kl_weight=1.0, scale_gradient="perturbed", ascent="fresh", sync_ascent=False
        )

    def functions(self) -> list[Any]:
        """Return the settings that are functions, and the laws of a user's own: they may read anything."""
        return [*own_laws(self.perturbation), *([self.hide] if callable(self.hide) else [])]

    def graph_key(self) -> Hashable:
        """Return what a captured step depends on, a law's present state included; ``kl_weight`` is an input of it."""
        names = ("scale_gradient", "scope", "num_particles", "vectorize_particles", "max_plate_nesting", "ascent")
        values = tuple(getattr(self, name) for name in (*names, "ascent_decay"))
        hide = self.hide if isinstance(self.hide, Hashable) else id(self.hide)
        return values, hide, self.kl_weight == 0, _law_key(self.perturbation)


def _law_key(value: Any) -> Hashable:
    """Return what a law is and holds; of what is no plain value, which object it is: its content is watched."""
    if isinstance(value, Perturbation):
        return type(value), tuple((name, _law_key(held)) for name, held in sorted(vars(value).items()))
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_law_key, value))
    if isinstance(value, dict):
        return tuple((name, _law_key(held)) for name, held in value.items())
    if isinstance(value, bool | int | float | str | type(None)):
        return type(value), repr(value)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        return Tensor, value.item()
    return _Same(value)


def _lengths(named: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the names of numbers that each replica has one of, and how many there are."""
    for name, value in named.items():
        if isinstance(value, Perturbation):
            inner = vars(value) if type(value) in _WITH_NUMBERS else {}
            yield from _lengths({name: each for name, each in inner.items() if name in ("rho", "kappa", "alpha")})
            if isinstance(value, Mixture):
                yield from _lengths({f"perturbations[{k}]": law for k, law in enumerate(value.perturbations)})
        elif isinstance(value, tuple):
            yield name, len(value)


_WITH_NUMBERS = (Adversarial, MixSAM, AscendedSample)


class _Same:
    """Equal where it is of the same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        """Return whether the other is of the same object."""
        return isinstance(other, _Same) and other._value is self._value

    def __hash__(self) -> int:
        """Return the object's number."""
        return id(self._value)


NAMES = tuple(each.name for each in fields(Settings))


def _check_ascent(settings: Settings) -> None:
    law, ascent, sync = settings.perturbation, settings.ascent, settings.sync_ascent
    if settings.scale_gradient == "mean" and not law.ascends_from_mean:
        raise ValueError(
            f"scale_gradient='mean' needs a gradient at the guide's mean, which {law!r} never takes; "
            "use perturbation=Adversarial() or MixSAM(), or scale_gradient='perturbed'."
        )
    if settings.scale_gradient == "mean" and ascent == "previous":
        raise ValueError("scale_gradient='mean' takes a fresh gradient at the mean; use ascent='fresh'.")
    if not 0 <= finite("ascent_decay", settings.ascent_decay) < 1:
        raise ValueError(f"ascent_decay must be in [0, 1), got ascent_decay={settings.ascent_decay!r}.")
    if sync and (settings.compile or ascent == "previous"):
        raise ValueError("sync_ascent=True averages fresh gradients step by step; use ascent='fresh', compile=False.")
    if sync and isinstance(law, Mixture):
        raise ValueError(
            f"sync_ascent=True needs a law of the same passes everywhere, and processes of {law!r} "
            "may choose differently and wait for each other forever; use sync_ascent=False, or one law."
        )


def _names(names: Collection[str] | Callable[[str], bool]) -> frozenset[str]:
    if isinstance(names, str):  # one name, not its letters
        return frozenset([names])
    if (
        isinstance(names, Tensor)
        or not isinstance(names, Collection)
        or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"hide must be a collection of site names or a predicate on names, got hide={names!r}.")
    return frozenset(names)
