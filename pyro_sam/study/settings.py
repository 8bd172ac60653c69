"""What a comparison is run with."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """Settings that all methods of a comparison share.

    Args:
        epochs: Budget of each run, in gradients of the whole training set; a method that takes two gradients a step
            gets half the steps.
        batch_size: Rows in a minibatch.
        hidden: Widths of the network's hidden layers.
        lr: Learning rate of Adam at the start; it falls to a tenth on a cosine.
        kl_weight: Weight of the KL in the loss; 1 is the ELBO, the default a colder posterior.
        prior_std: Prior standard deviation of a weight, times the square root of its fan-in.
        rho: Radius per method, in that method's unit; a method that is left out takes its default.
        kappa: Weight of the random direction of ``mix-sam``.
        alpha: Length of the climb of ``ascended``, in posterior standard deviations.
        init_scale: Standard deviation that a learnt guide starts at.
        num_samples: Weight samples of the final test metrics.
        curve_points: Points of the learning curve of a run.
        device: Torch's name of the device.
        threads: Threads of torch on the CPU. Small networks gain nothing from more, and lose much on a busy machine.
    """

    epochs: int = 60
    batch_size: int = 64
    hidden: tuple[int, ...] = (64,)
    lr: float = 1e-2
    kl_weight: float = 0.1
    prior_std: float = 2.0
    rho: Mapping[str, float] = field(default_factory=dict)
    kappa: float = 1.0
    alpha: float = 10.0
    init_scale: float = 0.01
    num_samples: int = 64
    curve_points: int = 12
    device: str = "cpu"
    threads: int = 1
