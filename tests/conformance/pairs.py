"""The conformance table: pairs of model and guide, with the Pyro estimator that is right for each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pair_guides as guides
import pair_models as models
import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from torch import nn

import pyro_sam as ps

Model = Callable[[], None]


@dataclass
class Pair:
    """One row.

    Args:
        name: Of the row.
        model: Function that makes the model, so that each test has a network of its own.
        guide: Function from the model to the guide.
        reference: Pyro's estimator that the Gaussian law must equal.
    """

    name: str
    model: Callable[[], Model]
    guide: Callable[[Model], Callable[..., Any]]
    reference: type[Any] = Trace_ELBO

    def build(self) -> tuple[Model, Callable[..., Any]]:
        """Return model and guide with parameters away from their symmetric starting point."""
        pyro.set_rng_seed(1)
        model = self.model()
        guide = self.guide(model)
        guide()
        model_parameters = poutine.trace(poutine.block(model, hide_types=["sample"]), param_only=True)
        model_parameters.get_trace()
        for _, parameter in pyro.get_param_store().named_parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        return model, guide


def always(model: Model) -> Callable[[], Model]:
    return lambda: model


EVERYWHERE = [
    ("MeanFieldNormal", ps.MeanFieldNormal, TraceMeanField_ELBO),
    ("AutoNormal", AutoNormal, Trace_ELBO),
    ("AutoMultivariateNormal", AutoMultivariateNormal, Trace_ELBO),
]
ALL_AUTOGUIDES = [
    *EVERYWHERE,
    ("AutoDiagonalNormal", AutoDiagonalNormal, Trace_ELBO),
    ("AutoLowRankMultivariateNormal", AutoLowRankMultivariateNormal, Trace_ELBO),
    ("AutoStructured", AutoStructured, Trace_ELBO),
    ("AutoGaussian", AutoGaussian, Trace_ELBO),
    ("AutoIAFNormal", AutoIAFNormal, Trace_ELBO),
]
MODELS = [
    models.correlated,
    models.nested_plates,
    models.subsampled_data,
    models.factor,
    models.deterministic,
    models.masked_handler,
    models.masked_imputation,
    models.scaled,
    models.hierarchical,
    models.learnable_prior,
    models.correlated_prior,
    models.markov_chain,
]

AUTOMATIC = [
    *(
        Pair(f"{model.__name__}-{name}", always(model), make, reference)
        for model in (models.regression, models.constrained)
        for name, make, reference in ALL_AUTOGUIDES
    ),
    *(
        Pair(f"{model.__name__}-{name}", always(model), make, reference)
        for model in MODELS
        for name, make, reference in EVERYWHERE
    ),
    *(
        Pair(f"data-dependent-{rows}-{name}", partial(models.by_data, rows), make, reference)
        for rows in (4, 10)
        for name, make, reference in EVERYWHERE[:2]
    ),
    *(
        Pair(f"{label}-{name}", partial(models.network, *layers), make, reference)
        for label, layers in (("dropout", [nn.Dropout(0.3)]), ("batch-norm", [nn.BatchNorm1d(4)]))
        for name, make, reference in EVERYWHERE
    ),
]
REGRESSION, LOCALS = always(models.regression), always(models.subsampled_locals)
DATA = always(models.deterministic)
HANDLED = [
    ("scaled", partial(poutine.scale, scale=0.3)),
    ("masked", partial(poutine.mask, mask=False)),
    ("blocked", partial(poutine.block, hide=["b"])),
    ("substituted", partial(poutine.substitute, data={"w_loc": torch.zeros(3)})),
]
BY_HAND = [
    Pair("normal", DATA, guides.of_w, TraceMeanField_ELBO),
    Pair("two-normals", REGRESSION, guides.of_w_and_b, TraceMeanField_ELBO),
    Pair("full-covariance", DATA, guides.full_covariance, TraceMeanField_ELBO),
    Pair("full-covariances", always(models.correlated_prior), guides.full_covariance, TraceMeanField_ELBO),
    Pair("low-rank", DATA, guides.low_rank, TraceMeanField_ELBO),
    Pair("auxiliary", REGRESSION, guides.auxiliary),
    Pair("random-scale", DATA, guides.random_scale, TraceMeanField_ELBO),
    Pair("subsample-both", LOCALS, guides.global_and_local(5), TraceMeanField_ELBO),
    Pair("subsample-guide", always(models.full_locals), guides.global_and_local(5), TraceMeanField_ELBO),
    Pair("subsample-none", always(models.full_locals), guides.global_and_local(None), TraceMeanField_ELBO),
    Pair("subsample-plates", LOCALS, guides.mean_field_with_plates, TraceMeanField_ELBO),
    Pair("subsample-autonormal", LOCALS, partial(AutoNormal, create_plates=guides.plates_of_data)),
    Pair("amortised", LOCALS, guides.amortised, TraceMeanField_ELBO),
    Pair("some-not-gaussian", always(models.hierarchical), guides.mixed_families, TraceMeanField_ELBO),
    Pair("markov", always(models.markov_chain), guides.markov, TraceMeanField_ELBO),
    Pair("sequential", always(models.sequential_plates), guides.sequential, TraceMeanField_ELBO),
    Pair("data-dependent-4-normal", partial(models.by_data, 4), guides.data_dependent(False), TraceMeanField_ELBO),
    Pair("data-dependent-10-normal", partial(models.by_data, 10), guides.data_dependent(True), TraceMeanField_ELBO),
    Pair("learnable-prior", always(models.learnable_prior), guides.of_w, TraceMeanField_ELBO),
    Pair("factor", always(models.factor), guides.of_w, TraceMeanField_ELBO),
    Pair("module-guide", DATA, lambda model: guides.ModuleGuide(), TraceMeanField_ELBO),
    Pair("list-of-normals", REGRESSION, guides.auto_list(AutoNormal, AutoDiagonalNormal)),
    Pair("list-of-covariances", REGRESSION, guides.auto_list(AutoMultivariateNormal, AutoNormal)),
    Pair("list-with-mean-field", REGRESSION, guides.auto_list(ps.MeanFieldNormal, AutoDelta), TraceMeanField_ELBO),
    Pair("list-with-a-point", REGRESSION, guides.auto_list(AutoDelta, AutoDiagonalNormal)),
    Pair("easy", REGRESSION, guides.Easy),
    Pair("easy-with-locals", LOCALS, guides.easy_with_locals),
    Pair(
        "conditioned",
        lambda: poutine.condition(models.regression, data={"b": models.Y[0]}),
        guides.of_w,
        TraceMeanField_ELBO,
    ),
    *(
        Pair(
            f"{name}-guide",
            DATA,
            guides.handled(handler, guides.of_w_and_b if name == "blocked" else guides.of_w),
            TraceMeanField_ELBO,
        )
        for name, handler in HANDLED
    ),
]
PAIRS = [*AUTOMATIC, *BY_HAND]
