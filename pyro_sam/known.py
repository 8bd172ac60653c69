"""What ordinary steps have found out about a model, for the lean steps after them."""

from collections.abc import Hashable, Mapping
from typing import Any

from pyro_sam.flat import FlatNormal, NormalPriors
from pyro_sam.record import Recorder, Surprise


class Known:
    """The structures of a model that ordinary steps have met and checked, for one mean-field guide.

    Attributes:
        is_any: Whether there is one.
    """

    PATIENCE = 3  # lean steps that may come to nothing in a row before no more are tried

    def __init__(self) -> None:
        self._met: dict[tuple[tuple[Hashable, ...], ...], bool] = {}
        self._priors: dict[str, Any] = {}
        self._batches: list[Mapping[str, Any]] = []
        self._normal: NormalPriors | None = None
        self._accepted: dict[Hashable, bool] = {}
        self._surprises = 0

    @property
    def is_any(self) -> bool:
        return bool(self._met) and self._surprises < self.PATIENCE

    def add(self, signature: Any, priors: Mapping[str, Any], *, kl_ignores_noise: bool) -> None:
        """Take in what an ordinary step has met.

        Args:
            signature: The model's signature.
            priors: The distributions of its latents.
            kl_ignores_noise: Whether the KL is known not to depend on the noise.
        """
        self._met[signature] = kl_ignores_noise
        self._priors, self._normal = dict(priors), None

    def forget(self) -> None:
        """Note that a lean step came to nothing."""
        self._surprises += 1
        self._normal = None

    def look_up(self, run: Recorder, flat: FlatNormal, signature: Hashable) -> tuple[NormalPriors, bool]:
        """Return the priors that a run served at one go, and whether the KL is known not to depend on the noise.

        Args:
            run: A finished run.
            flat: The guide's sites.
            signature: The signature of the sites that were not served at one go.
        Raises:
            Surprise: If no ordinary step has met the like.
        """
        normal = self._normal
        if normal is None or not self._are_served(run.batches) or not normal.is_current():
            normal = self._serve(run.batches, flat)
        if signature not in self._accepted:
            raise Surprise
        self._surprises = 0
        return normal, self._accepted[signature]

    def _are_served(self, batches: list[Mapping[str, Any]]) -> bool:
        return len(batches) == len(self._batches) and all(a is b for a, b in zip(batches, self._batches, strict=True))

    def _serve(self, batches: list[Mapping[str, Any]], flat: FlatNormal) -> NormalPriors:
        served = {name: prior for batch in batches for name, prior in batch.items()}
        if any(self._priors.get(name) is not prior for name, prior in served.items()):
            raise Surprise
        self._batches, self._normal, self._accepted = batches, NormalPriors(flat, served), {}
        for signature, ignores_noise in self._met.items():
            rest = tuple(entry for entry in signature if entry[0] not in served)
            self._accepted[rest] = self._accepted.get(rest, True) and ignores_noise
        return self._normal
