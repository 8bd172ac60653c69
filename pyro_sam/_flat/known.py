"""What ordinary steps have found out about a model, for the lean steps after them."""

from collections.abc import Hashable, Mapping
from typing import Any

from pyro_sam._flat.priors import NormalPriors, is_expanded
from pyro_sam._flat.recorder import Recorder, Surprise
from pyro_sam._flat.vectors import FlatNormal


class Known:
    """The structures of a model that ordinary steps have met and checked, for one mean-field guide.

    Attributes:
        kl_ignores_noise: Whether the KL of none of them depends on the noise, as far as is known.
    """

    PATIENCE = 3  # steps in a row that may fail to be lean before no more are tried

    def __init__(self) -> None:
        self.kl_ignores_noise = True
        self._met: set[tuple[tuple[Hashable, ...], ...]] = set()
        self._priors: dict[str, Any] = {}
        self._batches: list[Mapping[str, Any]] = []
        self._normal: NormalPriors | None = None
        self._accepted: set[Hashable] = set()
        self._failures = 0

    @property
    def is_any(self) -> bool:
        """Whether there is one."""
        return bool(self._met)

    @property
    def is_worth_a_try(self) -> bool:
        """Whether lean steps have not failed too often."""
        return self._failures < self.PATIENCE

    def lose_patience(self) -> None:
        """Note that a step failed to be lean, even after an ordinary one."""
        self._failures += 1

    def give_up(self) -> None:
        """Try no more lean steps."""
        self._failures = self.PATIENCE

    def add(self, signature: Any, priors: Mapping[str, Any], *, kl_ignores_noise: bool) -> None:
        """Take in what an ordinary step has met.

        Args:
            signature: The model's signature.
            priors: The distributions of its latents.
            kl_ignores_noise: Whether the KL is known not to depend on the noise.
        """
        self._met.add(signature)
        self.kl_ignores_noise &= kl_ignores_noise
        self._priors, self._normal = dict(priors), None

    def look_up(self, run: Recorder, flat: FlatNormal, signature: Hashable) -> NormalPriors:
        """Return the priors that a run served at one go.

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
        self._failures = 0
        return normal

    def _are_served(self, batches: list[Mapping[str, Any]]) -> bool:
        return len(batches) == len(self._batches) and all(a is b for a, b in zip(batches, self._batches, strict=True))

    def _serve(self, batches: list[Mapping[str, Any]], flat: FlatNormal) -> NormalPriors:
        served = {name: prior for batch in batches for name, prior in batch.items()}
        if not all(is_expanded(self._priors.get(name), prior) for name, prior in served.items()):
            raise Surprise
        self._batches, self._normal = batches, NormalPriors(flat, served)
        self._accepted = {tuple(entry for entry in met if entry[0] not in served) for met in self._met}
        return self._normal
