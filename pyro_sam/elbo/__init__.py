"""The estimator: settings, and the way from a call of Pyro's SVI to a loss and its gradients."""

from pyro_sam.elbo.estimator import SAM_ELBO

__all__ = ["SAM_ELBO"]
