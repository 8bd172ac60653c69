"""Sharpness-aware variational inference for Pyro: an ELBO whose random sample is replaced by a chosen perturbation."""

from pyro_sam import arviz, flatness, metrics, nn, optim, plots
from pyro_sam.elbo import SAM_ELBO
from pyro_sam.fit import fit
from pyro_sam.guide import MeanFieldNormal
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
from pyro_sam.predict import predict
from pyro_sam.prediction import Prediction

__all__ = [
    "SAM_ELBO",
    "Adversarial",
    "AscendedSample",
    "BayesianModule",
    "Gaussian",
    "Mean",
    "MeanFieldNormal",
    "MixSAM",
    "Mixture",
    "NoiseSpace",
    "Perturbation",
    "Prediction",
    "arviz",
    "fit",
    "flatness",
    "metrics",
    "nn",
    "optim",
    "plots",
    "predict",
]
