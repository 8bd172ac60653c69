"""The training loop around Pyro's SVI: epochs, history, checkpoints, early stopping."""

from pyro_sam.training.checkpoint import Checkpoint, CheckpointError
from pyro_sam.training.fitting import EarlyStopping, fit
from pyro_sam.training.loop import Training

__all__ = ["Checkpoint", "CheckpointError", "EarlyStopping", "Training", "fit"]
