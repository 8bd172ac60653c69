"""The posterior of a trained guide for ArviZ: as plain arrays, or as its InferenceData, which writes netCDF.

The second needs ArviZ: ``pip install "pyro-sam[arviz]"``.
"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_sam._base.arguments import positive_int
from pyro_sam._step.loss import latent_sites
from pyro_sam.predictive.prediction import Prediction
from pyro_sam.predictive.streaming import check_pair, predict

__all__ = ["to_dict", "to_inference_data"]

Groups = dict[str, dict[str, Any]]


def to_dict(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    observations: Tensor | None = None,
    site: str = "obs",
    var_names: Collection[str] | None = None,
) -> Groups:
    """Return draws from a guide in the groups that ``arviz.from_dict`` takes.

    All draws are one chain, so every array is of shape ``(1, num_samples, ...)``. A ``/`` in a site's name, which
    netCDF has for groups, becomes a dot. ArviZ 1 takes the result as it is, older versions as keywords (``**``).

    Args:
        model: Pyro model; called with ``args``, so without the observations.
        guide: Its guide, trained.
        *args: Arguments of both.
        num_samples: Number of draws.
        observations: Observations at ``args``; they add ``log_likelihood`` and ``observed_data``.
        site: Name of the observed site.
        var_names: Latents to keep; None for all. ``num_samples`` copies of them are held.
    Returns:
        Arrays by name in the groups ``posterior``, ``posterior_predictive`` and, with ``observations``,
        ``log_likelihood`` and ``observed_data``.
    Raises:
        ValueError: If an argument is out of its range, or does not fit the model.
    """
    positive_int("num_samples", num_samples)
    check_pair(model, guide)
    if var_names is not None and not _are_names(var_names):
        raise ValueError(f"var_names must be a collection of the guide's latents, got var_names={var_names!r}.")
    drawn: list[dict[str, Any]] = []

    def is_wanted(latent: Any) -> bool:
        return not latent["infer"].get("is_auxiliary") and (var_names is None or latent["name"] in var_names)

    def recorded(*args: Any) -> None:
        latents = latent_sites(poutine.trace(guide).get_trace(*args))
        drawn.append({name: _array(latent["value"]) for name, latent in latents.items() if is_wanted(latent)})

    prediction = predict(model, recorded, *args, num_samples=num_samples, site=site)
    _check_names(var_names, drawn[0])
    _check_distinct([*drawn[0], site])
    groups: Groups = {
        # the last ones: predict runs the guide before, to see what there is
        "posterior": {_name(name): np.stack([draw[name] for draw in drawn[-num_samples:]])[None] for name in drawn[0]},
        "posterior_predictive": {_name(site): _array(prediction.samples())[None]},
    }
    if observations is not None:
        groups["log_likelihood"] = {_name(site): _array(_log_prob(prediction, observations))[None]}
        groups["observed_data"] = {_name(site): _array(observations)}
    return groups


def to_inference_data(model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Return draws from a guide as ArviZ's InferenceData (ArviZ 1: a DataTree); ``.to_netcdf(path)`` writes it.

    Args:
        model: Pyro model; called with ``args``, so without the observations.
        guide: Its guide, trained.
        *args: Arguments of both.
        **settings: As of :func:`to_dict`.
    Returns:
        What ``arviz.from_dict`` makes of :func:`to_dict`.
    Raises:
        ValueError: If an argument is out of its range, or does not fit the model.
        ImportError: If ArviZ is missing.
    """
    try:
        import arviz
    except ImportError as error:
        raise ImportError('to_inference_data needs ArviZ: pip install "pyro-sam[arviz]"') from error
    groups = to_dict(model, guide, *args, **settings)
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(groups)
    keywords: Any = groups
    return arviz.from_dict(**keywords)


def _are_names(names: Any) -> bool:
    return (
        isinstance(names, Collection)
        and not isinstance(names, str | Tensor)
        and all(isinstance(name, str) for name in names)
    )


def _log_prob(prediction: Prediction, observations: Tensor) -> Tensor:
    try:
        return prediction.log_prob_per_sample(observations)
    except ValueError as error:
        raise ValueError(f"observations do not fit the predictions: {error}") from error


def _check_names(var_names: Collection[str] | None, found: Collection[str]) -> None:
    unknown = [name for name in var_names or () if name not in found]
    if unknown or not found:
        raise ValueError(
            f"var_names must be a collection of the guide's latents ({', '.join(found)}), got var_names={var_names!r}."
        )


def _check_distinct(names: Collection[str]) -> None:
    for name in names:
        if len(alike := [each for each in names if _name(each) == _name(name)]) > 1:
            raise ValueError(
                f"sites {', '.join(map(repr, alike))} have one name where '/' becomes a dot; rename one, or leave it "
                "out with var_names."
            )


def _name(site: str) -> str:
    return site.replace("/", ".")


def _array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # NumPy has no bfloat16
