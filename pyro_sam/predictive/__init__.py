"""The posterior predictive, streamed, and the loss around a trained posterior's mean."""

from pyro_sam.predictive.prediction import Prediction
from pyro_sam.predictive.streaming import predict

__all__ = ["Prediction", "predict"]
