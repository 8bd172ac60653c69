r"""The laws of the noise: which ``e`` stands where the reparameterisation trick has ``z ~ N(0, I)``.

A Gaussian guide draws its latent as :math:`w = T(e)` with :math:`e \sim N(0, I_d)`; for a mean-field Normal
:math:`T(e) = \mathrm{loc} + \mathrm{scale} \odot e`. A law chooses another ``e``. It works in noise space, on one
flat tensor of shape ``(P, d)``: ``P`` vectorised particles (1 without vectorisation) and ``d`` perturbed scalars. All
that it may ask of the model it asks through :class:`NoiseSpace`.

With replicas (``MeanFieldNormal(num_replicas=R)``) there is a row for each, and ``rho``, ``kappa`` and ``alpha`` may be
sequences or vectors of length R.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pyro_sam._base.arguments import Numbers, finite, non_negative, numbers, one_of

__all__ = ["Adversarial", "AscendedSample", "Gaussian", "Mean", "MixSAM", "Mixture", "NoiseSpace", "Perturbation"]

Geometry = Literal["posterior", "euclidean", "adaptive", "fisher"]
GEOMETRIES: tuple[str, ...] = ("posterior", "euclidean", "adaptive", "fisher")


def unit(v: Tensor, length: float | Tensor = 1.0) -> Tensor:
    r"""Return ``v`` divided by its L2 norm over the last dimension, times ``length``; zero where ``v`` is zero.

    Dividing by the largest entry first keeps the squares in range, so the result has norm one for gradients of
    :math:`10^{-30}` and of :math:`10^{30}`, in single precision too.

    Args:
        v: Vectors along the last dimension, any shape.
        length: Norm of the result, a number or a tensor that broadcasts to ``v``.
    Returns:
        Tensor shaped like ``v``; NaN where ``v`` is not finite.
    """
    v = _in_range(v)
    norm = _norm(v)
    return v.div_(norm) if not isinstance(length, Tensor) and length == 1 else v.mul_(length / norm)


def _in_range(v: Tensor) -> Tensor:
    """Return ``v`` divided by its largest entry over the last dimension."""
    if v.shape[-1] == 0:
        return v.clone()
    return v / v.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)


def _norm(v: Tensor) -> Tensor:
    """Return the norm over the last dimension; of zero, a number that it can be divided by."""
    return torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(math.sqrt(torch.finfo(v.dtype).tiny))


class NoiseSpace(ABC):
    r"""What a law sees of one step: the noise, the loss's gradient in it, and the groups that share a norm.

    Every tensor here has shape ``(P, d)`` and is detached.

    Args:
        num_particles: ``P``, the number of particles that are vectorised together.
    """

    def __init__(self, num_particles: int = 1) -> None:
        self.num_particles = num_particles

    @abstractmethod
    def zeros(self) -> Tensor:
        """Return the noise of the guide's mean, ``e = 0``."""

    @abstractmethod
    def gaussian(self) -> Tensor:
        """Return fresh standard normal noise ``z``."""

    @abstractmethod
    def gradient(self, e: Tensor) -> Tensor:
        r"""Return :math:`u = \nabla_e L(T(e))`, the gradient of the data term at noise ``e``; costs one pass."""

    @abstractmethod
    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return the guide's means and standard deviations; diagonal Normal sites only.

        Raises:
            ValueError: If a perturbed site has a full covariance.
        """

    @abstractmethod
    def groups(self, e: Tensor) -> list[Tensor]:
        """Return views of ``e`` whose last dimension runs over one group: one norm, one radius."""

    @abstractmethod
    def join(self, groups: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`groups`."""

    def map_groups(self, function: Callable[..., Tensor], *vectors: Tensor) -> Tensor:
        """Apply ``function`` to each group of ``vectors`` (norms run over its last dimension) and join the results."""
        return self.join([function(*group) for group in zip(*map(self.groups, vectors), strict=True)])

    def number(self, value: Numbers, like: Tensor) -> float | Tensor:
        """Return a law's number in a form that multiplies ``like``, whose first dimension runs over the rows.

        Args:
            value: A number, or a tuple with one for each row: replicas are rows.
            like: Noise, or a group of it.
        """
        if not isinstance(value, tuple):
            return value
        return like.new_tensor(value).view(-1, *[1] * (like.dim() - 1))

    def direction(self, e: Tensor) -> Tensor:
        r"""Return :math:`\hat u(e) = u / \lVert u \rVert`, per group; zero where the gradient is zero."""
        return self.map_groups(unit, self.gradient(e))


class Perturbation(ABC):
    """A law of the noise. A law of your own is a class with one method, :meth:`noise`."""

    # Laws that never ask for a gradient say so, and the first pass then does not keep a graph for one.
    uses_gradient: ClassVar[bool] = True
    # Whether the ascent's first gradient is the one at the mean, which scale_gradient="mean" needs.
    ascends_from_mean: ClassVar[bool] = False

    def toss(self) -> "Perturbation":
        """Return the law that one particle follows: this one, unless a coin decides between several."""
        return self

    @abstractmethod
    def noise(self, space: NoiseSpace) -> Tensor:
        """Choose the noise of one step.

        Args:
            space: The step's noise space.
        Returns:
            Noise ``e`` of shape ``(P, d)``; it is a constant of the outer gradient.
        """


@dataclass(frozen=True)
class Mean(Perturbation):
    """``e = 0``: the loss at the guide's mean.

    With a fixed scale and a Gaussian prior this is MAP with weight decay. Costs one gradient.
    """

    uses_gradient: ClassVar[bool] = False

    def noise(self, space: NoiseSpace) -> Tensor:
        """Return zeros."""
        return space.zeros()


@dataclass(frozen=True)
class Gaussian(Perturbation):
    r"""``e = z ~ N(0, I)``: the reparameterisation trick, so mean-field variational inference.

    With the scale fixed at :math:`r / \sqrt d` it is RandomSAM of radius ``r``. Costs one gradient.
    """

    uses_gradient: ClassVar[bool] = False

    def noise(self, space: NoiseSpace) -> Tensor:
        """Return a standard normal draw."""
        return space.gaussian()


@dataclass(frozen=True)
class Adversarial(Perturbation):
    r"""The worst noise in a ball: VariationalSAM, and SAM, ASAM and Fisher SAM by the choice of ball.

    .. math:: e = \arg\max_{\lVert A e \rVert \le R} u \cdot e = R\, A^{-2} u / \lVert A^{-1} u \rVert,
        \qquad u = \nabla_e L(T(e)) |_{e = 0}

    ============= =================================== ============ =========================================
    geometry      A                                   R            displacement of the mean
    ============= =================================== ============ =========================================
    ``posterior`` 1                                   ``rho`` sd   rho scale² g / ‖scale g‖ (VariationalSAM)
    ``euclidean`` scale                               ``rho``      rho g / ‖g‖ (SAM)
    ``adaptive``  scale / (abs(loc) + eta)            ``rho``      rho T² g / ‖T g‖, T = abs(loc) + eta (ASAM)
    ``fisher``    scale √f, f = 1 + eta g²            ``rho``      rho (g / f) / √Σ(g² / f) (Fisher SAM)
    ============= =================================== ============ =========================================

    The last three need diagonal Normal sites; on a transformed site they act on its unconstrained value. With several
    steps, :math:`e \leftarrow \Pi(e + e^*(e) / \mathrm{steps})`, where ``e*`` is the maximiser above at the current
    gradient and ``Π`` the projection onto the ball. Costs ``1 + steps`` gradients.

    Args:
        rho: Radius of the ball, non-negative. In the posterior geometry it counts posterior standard deviations; in
            the others it has the units of the latent (of the relative change for ``adaptive``). ``None`` stands for
            :math:`\sqrt d`, the length of the Gaussian noise that it replaces (posterior geometry only): with a
            wide guide and many weights that is catastrophically far, so pair it with a fixed scale
            :math:`r / \sqrt d`.
        steps: Number of ascent steps, at least 1.
        ord: 2, or ``inf`` for :math:`e = \rho\,\mathrm{sign}(u)`: every coordinate moves ``rho`` standard deviations.
        geometry: ``"posterior"``, ``"euclidean"``, ``"adaptive"`` or ``"fisher"``.
        eta: Positive stabiliser of ``adaptive`` (in units of the latent), or weight of the Fisher term.
    Raises:
        ValueError: If an argument is out of its range.
    References:
        Ujváry et al. (2022), arXiv:2210.10452; Foret et al. (2021), arXiv:2010.01412, Eq. 2; Kwon et al. (2021),
        arXiv:2102.11600, Eq. 9; Kim et al. (2022), arXiv:2206.04920, Eq. 8.
    """

    rho: Numbers | None = 1.0
    _: KW_ONLY
    steps: int = 1
    ord: float = 2
    geometry: Geometry = "posterior"
    eta: float = 0.01

    ascends_from_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.rho is not None:
            object.__setattr__(self, "rho", numbers(non_negative, "rho", self.rho))
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got steps={self.steps!r}.")
        if not isinstance(self.ord, int | float) or self.ord not in (2, math.inf):
            raise ValueError(f"ord must be 2 or inf, got ord={self.ord!r}.")
        one_of("geometry", self.geometry, GEOMETRIES)
        if finite("eta", self.eta) <= 0:
            raise ValueError(f"eta must be positive, got eta={self.eta!r}.")
        if self.geometry != "posterior" and self.ord != 2:
            raise ValueError(f"ord=inf is defined for geometry='posterior' only, got geometry={self.geometry!r}.")
        if self.geometry != "posterior" and self.rho is None:
            raise ValueError(
                "rho=None counts posterior standard deviations, so it needs geometry='posterior'; "
                f"give a radius in the units of geometry={self.geometry!r}."
            )

    def noise(self, space: NoiseSpace) -> Tensor:
        """Return the maximiser, or the end of the projected ascent."""
        e = space.zeros()
        if self.rho == 0:
            return e
        if self.steps == 1:
            return self._climb(space, e)[0]
        for _ in range(self.steps):
            step, metric = self._climb(space, e)
            e = self._project(space, e + step / self.steps, metric)
        return e

    def _climb(self, space: NoiseSpace, e: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the maximiser of the linearised loss at ``e``, and the diagonal ``A`` of its ball (None for 1)."""
        u = space.gradient(e)
        if self.ord == math.inf:
            return space.map_groups(lambda group: group.sign() * self._radius(space, group), u), None
        metric = self._metric(space, u)
        v = u if metric is None else u / metric
        step = space.map_groups(lambda group: unit(group, self._radius(space, group)), v)
        return (step if metric is None else step / metric), metric

    def _metric(self, space: NoiseSpace, u: Tensor) -> Tensor | None:
        if self.geometry == "posterior":
            return None
        loc, scale = space.loc_and_scale()
        if self.geometry == "euclidean":
            return scale
        if self.geometry == "adaptive":
            return scale / (loc.abs() + self.eta)
        # hypot: the square of a large gradient would overflow
        return scale * torch.hypot(torch.ones_like(u), math.sqrt(self.eta) * (u / scale))

    def _project(self, space: NoiseSpace, e: Tensor, metric: Tensor | None) -> Tensor:
        def clip(group: Tensor, size: Tensor) -> Tensor:
            radius = self._radius(space, group)
            if self.ord == math.inf:
                return group.clamp(-radius, radius)  # type: ignore[arg-type]
            norm = torch.linalg.vector_norm(size, dim=-1, keepdim=True)
            return torch.where(norm > radius, group * (radius / norm), group)

        return space.map_groups(clip, e, e if metric is None else metric * e)

    def _radius(self, space: NoiseSpace, group: Tensor) -> float | Tensor:
        return math.sqrt(group.shape[-1]) if self.rho is None else space.number(self.rho, group)


@dataclass(frozen=True)
class MixSAM(Perturbation):
    r"""A fixed-length mixture of the worst and a random direction.

    .. math:: e = \rho\, v / \lVert v \rVert, \qquad v = \sqrt d\, \hat u(0) + \kappa z, \quad z \sim N(0, I)

    ``kappa = 0`` is :class:`Adversarial`; a large ``kappa`` is a uniformly random direction. The cosine between ``e``
    and the ascent direction is about :math:`1 / \sqrt{1 + \kappa^2}`. Costs two gradients.

    Args:
        rho: Length of the noise in posterior standard deviations, non-negative; ``None`` for :math:`\sqrt d`, meant
            for a fixed scale :math:`r / \sqrt d` (then the weights move by ``r``). With a learnt, wide scale give a
            number such as 0.1 over the scale.
        kappa: Weight of the random direction, non-negative.
    Raises:
        ValueError: If ``rho`` or ``kappa`` is negative or not finite.
    References:
        Ujváry et al. (2022), arXiv:2210.10452.
    """

    rho: Numbers | None = None
    kappa: Numbers = 1.0

    ascends_from_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.rho is not None:
            object.__setattr__(self, "rho", numbers(non_negative, "rho", self.rho))
        object.__setattr__(self, "kappa", numbers(non_negative, "kappa", self.kappa))

    def noise(self, space: NoiseSpace) -> Tensor:
        """Return the mixed direction at length ``rho``."""
        adversary = Adversarial(self.rho)
        if self.rho == 0 or self.kappa == 0:
            return adversary.noise(space)
        u, z = space.gradient(space.zeros()), space.gaussian()
        return space.map_groups(lambda u, z: self._mix(space, u, z), u, z)

    def _mix(self, space: NoiseSpace, u: Tensor, z: Tensor) -> Tensor:
        u, length, kappa = _in_range(u), math.sqrt(u.shape[-1]), space.number(self.kappa, u)
        # divided by max(1, kappa), so that no kappa overflows; of moderate size, so that its norm needs no care
        if isinstance(kappa, Tensor):
            large = kappa.clamp_min(1)
            v = u.mul_(length / _norm(u) / large).addcmul_(z, kappa / large)
        elif kappa >= 1:
            v = torch.addcmul(z, u, length / kappa / _norm(u))
        else:
            v = u.mul_(length / _norm(u)).add_(z, alpha=kappa)
        return v.mul_((length if self.rho is None else space.number(self.rho, v)) / _norm(v))


@dataclass(frozen=True)
class AscendedSample(Perturbation):
    r"""Sample the guide, then climb: :math:`e = z + \alpha\, \hat u(z)`.

    ``alpha = 0`` is :class:`Gaussian`; a negative ``alpha`` descends. Costs two gradients.

    Args:
        alpha: Length of the climb in posterior standard deviations, finite.
    Raises:
        ValueError: If ``alpha`` is not finite.
    """

    alpha: Numbers = 1.0

    def __post_init__(self) -> None:
        """Check the argument."""
        object.__setattr__(self, "alpha", numbers(finite, "alpha", self.alpha))

    def noise(self, space: NoiseSpace) -> Tensor:
        """Return the climbed sample."""
        z = space.gaussian()
        return z if self.alpha == 0 else z + space.number(self.alpha, z) * space.direction(z)


@dataclass(frozen=True)
class Mixture(Perturbation):
    """Toss a coin between laws, once per particle; a law that no particle drew costs nothing.

    Args:
        perturbations: The laws, at least one.
        probs: Their probabilities, non-negative, summing to one; one for each law.
    Raises:
        ValueError: If ``probs`` is no probability vector of the right length, or a member is no perturbation.
    """

    perturbations: Sequence[Perturbation]
    probs: Sequence[float]

    def __post_init__(self) -> None:
        """Check the arguments and freeze the sequences."""
        for name in ("perturbations", "probs"):
            if not isinstance(getattr(self, name), Sequence):
                raise ValueError(f"{name} must be a sequence, got {name}={getattr(self, name)!r}.")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "probs", tuple(non_negative("probs", p) for p in self.probs))
        for law in self.perturbations:
            if not isinstance(law, Perturbation):
                raise ValueError(
                    f"perturbations must be instances of Perturbation such as Gaussian(), got {law!r} "
                    f"of type {type(law).__name__}."
                )
        if not self.perturbations or len(self.probs) != len(self.perturbations):
            raise ValueError(
                f"probs must give one probability per law of perturbations, got {len(self.probs)} for "
                f"{len(self.perturbations)} laws."
            )
        if abs(math.fsum(self.probs) - 1) > 1e-6:
            raise ValueError(f"probs must sum to one, got probs={self.probs} with sum {math.fsum(self.probs)}.")

    @property
    def uses_gradient(self) -> bool:  # type: ignore[override]
        """Whether a law of positive probability climbs."""
        return any(law.uses_gradient for law, p in zip(self.perturbations, self.probs, strict=True) if p > 0)

    @property
    def ascends_from_mean(self) -> bool:  # type: ignore[override]
        """Whether all laws start at the mean."""
        return all(law.ascends_from_mean for law, p in zip(self.perturbations, self.probs, strict=True) if p > 0)

    def toss(self) -> Perturbation:
        """Draw a law."""
        possible = [k for k, p in enumerate(self.probs) if p > 0]
        if len(possible) == 1:  # no coin to toss: the random stream stays that of the law itself
            return self.perturbations[possible[0]].toss()
        return self.perturbations[int(torch.multinomial(torch.tensor(self.probs), 1))].toss()

    def noise(self, space: NoiseSpace) -> Tensor:
        """Draw a law for each particle and return its noise."""
        if space.num_particles == 1 or 1.0 in self.probs:
            return self.toss().noise(space)
        coins = torch.multinomial(torch.tensor(self.probs), space.num_particles, replacement=True)
        first, *others = (int(k) for k in coins.unique())
        e = self.perturbations[first].noise(space)
        for k in others:
            drew_k = (coins == k).to(e.device).unsqueeze(-1)
            e = torch.where(drew_k, self.perturbations[k].noise(space), e)
        return e
