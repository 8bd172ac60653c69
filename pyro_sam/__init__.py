"""Sharpness-aware variational inference for Pyro: an ELBO whose random sample is replaced by a chosen perturbation."""

import sys as _sys

from pyro_sam import arviz, flatness, metrics, nn, optim, plots
from pyro_sam._base.replicas import per_replica
from pyro_sam._flat import vectors as _vectors
from pyro_sam.diagnosis import Diagnosis, diagnose
from pyro_sam.elbo import SAM_ELBO
from pyro_sam.guide import MeanFieldNormal, SAMRadius
from pyro_sam.nn import BayesianModule
from pyro_sam.perturbation import (
    Adversarial,
    AscendedSample,
    Gaussian,
    Mean,
    MixSAM,
    Mixture,
    NoiseSpace,
    Perturbation,
)
from pyro_sam.predictive import Prediction, predict
from pyro_sam.training import Anneal, Checkpoint, EarlyStopping, Validation, checkpoint, fit
from pyro_sam.tuning import Tuned, default_space, tune

__version__ = "0.1.0"

_sys.modules["pyro_sam.flat"] = _vectors  # guides that were pickled before it moved name it so

__all__ = [
    "SAM_ELBO",
    "Adversarial",
    "Anneal",
    "AscendedSample",
    "BayesianModule",
    "Checkpoint",
    "Diagnosis",
    "EarlyStopping",
    "Gaussian",
    "Mean",
    "MeanFieldNormal",
    "MixSAM",
    "Mixture",
    "NoiseSpace",
    "Perturbation",
    "Prediction",
    "SAMRadius",
    "Tuned",
    "Validation",
    "arviz",
    "checkpoint",
    "default_space",
    "diagnose",
    "fit",
    "flatness",
    "metrics",
    "nn",
    "optim",
    "per_replica",
    "plots",
    "predict",
    "tune",
]
