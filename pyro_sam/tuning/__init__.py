"""Settings chosen by the validation NLL of the posterior predictive: Optuna searches, replicas make trials cheap."""

from pyro_sam.tuning.search import Tuned, tune
from pyro_sam.tuning.space import default_space, law_of

__all__ = ["Tuned", "default_space", "law_of", "tune"]
