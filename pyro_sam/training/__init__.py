"""The training loop around Pyro's SVI: epochs, history, validation, checkpoints, callbacks."""

from pyro_sam.training.annealing import Anneal
from pyro_sam.training.checkpoint import Checkpoint, CheckpointError
from pyro_sam.training.fitting import fit
from pyro_sam.training.loop import Training
from pyro_sam.training.stopping import EarlyStopping
from pyro_sam.training.validation import Validation

__all__ = ["Anneal", "Checkpoint", "CheckpointError", "EarlyStopping", "Training", "Validation", "fit"]
