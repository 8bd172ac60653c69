"""The look at a new structure of model and guide: do they fit together, and is it what the user meant?"""

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_sam._base.cures import NO_LATENTS
from pyro_sam._base.vectorised import PARTICLE_PLATES
from pyro_sam._step.enumeration import depends_on, enumerated_dims
from pyro_sam._step.loss import latent_sites
from pyro_sam._step.radius import complaints
from pyro_sam._step.settings import Settings
from pyro_sam._step.signatures import signature

_TRAINED = 0.005  # of the weights


def inspect(pair: Any, settings: Settings, run: Any, model: Trace, has_data: bool) -> None:
    """Look at a run of guide and model, unless the like of it was looked at before.

    Args:
        pair: What is known of model and guide.
        settings: The estimator's settings.
        run: The guide's run.
        model: The model's trace.
        has_data: Whether both were given tensors.
    Raises:
        ValueError: If the two do not fit together, or the settings do not fit them.
    """
    key = signature(run.trace), signature(model), settings.is_evidence, settings.hide
    if pair.valid.get(key):
        return
    _check_hide(settings, run)
    if not settings.is_evidence:
        _refuse_enumerated_priors(model)
    _advise(pair, run, model, settings, has_data)
    if is_validation_enabled():
        nesting: Any = pair.known_nesting(settings)  # Pyro's annotation forgets infinity
        check_model_guide_match(model, run.trace, nesting)
        _warn_of_order(run.trace, model)
        for trace in map(prune_subsample_sites, (run.trace, model)):
            trace.compute_log_prob()
            check_shapes(trace.nodes.values(), nesting)
    pair.valid.put(key, True)


def refuse_bare_parameters(guide: Any) -> None:
    """Refuse what Pyro's SVI fails on: autoguides with a plain Parameter under ``module_local_params``.

    Raises:
        ValueError: If the guide is one of these.
    """
    if isinstance(guide, AutoContinuous) and pyro.settings.get("module_local_params"):
        raise ValueError(
            f"{type(guide).__name__} cannot be trained by Pyro's SVI under module_local_params=True, which needs "
            "parameters of another kind than it has. Switch the setting off, use MeanFieldNormal or AutoNormal, or "
            "train SAM_ELBO(...)(model, guide) with a torch optimiser."
        )


def check_shapes(sites: Iterable[Any], nesting: float = float("inf")) -> None:
    """Check by Pyro's rules that sites whose log probability is known have its shape from their plates.

    Raises:
        ValueError: If one has not.
    """
    for site in sites:
        if site["type"] == "sample":
            check_site_shape(site, nesting)  # type: ignore[arg-type]


def warn_of_sizes(pair: Any, settings: Settings, sites: Mapping[str, Any], latents: Collection[str]) -> None:
    """Warn where a plate's size follows the batch's, in a run of a model whose ``latents`` are in no plate."""
    if settings.kl_weight == 1 and torch.is_grad_enabled() and is_validation_enabled():
        _warn_of_missing_scale(_data_sites(sites), [set()] if latents else [], pair.plate_sizes)


def warn_of_writing(pair: Any, before: Sequence[int], after: Sequence[int]) -> None:
    """Warn, once, where a step has written into its arguments.

    Args:
        pair: What is known of model and guide.
        before: How often each argument was written to before the step.
        after: Likewise, after it.
    """
    if before != after and not pair.writes:
        pair.writes = True
        _warn(
            "the model writes into one of its arguments in place, and a step may run it several times, each on what "
            "the last run left. Have it write into a copy, such as x = x.clone()."
        )


def _advise(pair: Any, run: Any, model: Trace, settings: Settings, has_data: bool) -> None:
    if not is_validation_enabled():
        return
    _refuse_observed_latents(run.trace, model)
    _refuse_nothing_to_learn(run.trace, model)
    if not len(pair.valid):
        _warn_of_no_data(model, has_data)
        _warn_of_repeated_data(model)
        _warn_of_start(poutine.unwrap(pair.guide))
        for complaint in complaints(run.sites.values(), settings.perturbation, settings.together):
            _warn(complaint)
        if settings.kl_weight and not isinstance(settings.kl_weight, tuple):  # replicas try several on purpose
            _warn_of_twofold_weight(model, settings.kl_weight)
    # without gradients it is an evaluation, maybe of other data
    if settings.kl_weight == 1 and torch.is_grad_enabled():
        latents = [{frame.name for frame in _data_plates(site)} for site in latent_sites(model).values()]
        _warn_of_missing_scale(_data_sites(model.nodes), latents, pair.plate_sizes)


def _check_hide(settings: Settings, run: Any) -> None:
    if callable(settings.hide):
        return
    unknown = [name for name in sorted(settings.hide) if name not in run.trace.nodes]
    if unknown:
        there = [*run.sites, *(name for name in run.unperturbed if name in settings.hide)]
        raise ValueError(
            f"hide must name sites of the guide, got {', '.join(unknown)}; its Gaussian sites are {', '.join(there)}."
        )


def _refuse_enumerated_priors(model: Trace) -> None:
    """Refuse latents whose prior depends on an enumerated site: likelihood and KL are then one term."""
    dims = enumerated_dims(model)
    for name, site in latent_sites(model).items():
        if depends_on(site, dims):
            raise ValueError(
                f"the prior of latent site '{name}' depends on a site that is summed out, so that KL and likelihood "
                "are one term; only Gaussian() with kl_weight=1 can do that. Write the prior as a mixture, for "
                "example dist.MixtureSameFamily."
            )


def _warn_of_order(guide: Trace, model: Trace) -> None:
    latents = latent_sites(model)
    in_guide = [name for name in guide.nodes if name in latents]
    if in_guide != list(latents):
        _warn(
            f"The guide samples its sites in the order {in_guide}, the model in the order {list(latents)}. A closed "
            "form KL is right only if a site's parents in the model are not its descendants in the guide; use the "
            "model's order in the guide to be sure."
        )


def _refuse_observed_latents(guide: Trace, model: Trace) -> None:
    for name in latent_sites(guide):
        if name in model.nodes and model.nodes[name]["is_observed"]:
            raise ValueError(
                f"guide samples site '{name}', which the model observes. A guide takes for a latent whatever is not "
                "observed when it is called for the first time: make a new one, and call it first with the "
                "observations too, guide(x, y)."
            )


def _refuse_nothing_to_learn(guide: Trace, model: Trace) -> None:
    if latent_sites(model) or any(site["type"] == "param" for site in (*guide.nodes.values(), *model.nodes.values())):
        return
    if any(True for _ in _data_sites(model.nodes)) and not enumerated_dims(model):
        raise ValueError(f"model and guide have no latent and no parameter. {NO_LATENTS}")


def _warn_of_no_data(model: Trace, has_data: bool) -> None:
    if any(_data_sites(model.nodes)):
        return
    latents = [(name, _data_plates(site)) for name, site in latent_sites(model).items()]
    subsampled = [name for name, plates in latents if any(f.size < (f.full_size or f.size) for f in plates)]
    inside = [name for name, plates in latents if plates]
    if not (subsampled or has_data):  # a prior, as it may well be meant
        return
    if subsampled:
        how = f", though it subsamples data around {', '.join(subsampled)}"
    else:
        how = f", and {', '.join(inside)} taken for a latent" if inside else ""
    _warn(
        f"The model observes nothing, so only the KL is learnt{how}. Pass the observations to the model and give them "
        "to their site, obs=y; then start anew, with pyro.clear_param_store() and a new guide."
    )


def _warn_of_repeated_data(model: Trace) -> None:
    for name, site in _data_sites(model.nodes):
        fn, value = site["fn"], site["value"]
        if not (fn.event_shape and isinstance(value, Tensor) and value.shape == fn.event_shape):
            continue
        plate = next((frame for frame in _data_plates(site) if 1 < frame.size == value.shape[0]), None)
        if plate is not None:
            _warn(
                f"Site '{name}' compares all its observations, of shape {tuple(value.shape)}, with each of the "
                f"{plate.size} elements of plate '{plate.name}', so they count {plate.size} times. Leave out "
                ".to_event(...) over the data: the plate declares that dimension."
            )


def _warn_of_twofold_weight(model: Trace, kl_weight: float) -> None:
    for _, site in _data_sites(model.nodes):
        for frame in _data_plates(site):
            rows, full = frame.size, frame.full_size or frame.size
            if rows >= full:
                continue
            inverses = {"the number of batches": full / rows, "the batch size": rows, "the size of the data set": full}
            rounded = {"the number of batches, rounded up": math.ceil(full / rows)}
            for what, number in {**inverses, **rounded}.items():
                if number > 1 and math.isclose(kl_weight * number, 1, rel_tol=1e-6):
                    _warn(
                        f"kl_weight={kl_weight:g} is 1 / {what}, but the plate '{frame.name}' already scales the "
                        f"likelihood from {rows} to {full} rows: together the KL counts too little by that factor. Use "
                        "kl_weight=1 with a scaled plate. (If you mean to cool the posterior, you may ignore this.)"
                    )
                    return


def _warn_of_missing_scale(data: Iterable[tuple[str, Any]], latents: Sequence[set[str]], sizes: dict[str, int]) -> None:
    for name, site in data:
        for frame in _data_plates(site):
            full = frame.full_size or frame.size
            if all(frame.name in plates for plates in latents):  # no KL but that of the batch's own latents
                continue
            if sizes.setdefault(frame.name, full) != full:
                _warn(
                    f"The plate '{frame.name}' around site '{name}' has size {full} now and had {sizes[frame.name]} in "
                    "an earlier step. Its size is that of the whole data set: with the batch's own, the KL counts once "
                    f"per batch. Use pyro.plate('{frame.name}', N, subsample_size=len(x))."
                )
                return


def _warn_of_start(guide: Any) -> None:
    """Warn if an autoguide of Pyro's starts elsewhere than at weights that do not look like fresh ones."""
    if not type(guide).__module__.startswith("pyro.infer") or not getattr(guide, "prototype_trace", None):
        return
    nodes: Any = guide.prototype_trace.nodes.values()  # AutoStructured keeps little of them
    proposed = [(node, (node["infer"] or {}).get("init_value")) for node in nodes if {"infer", "value"} <= node.keys()]
    away = [
        node["name"]
        for node, weight in proposed
        if weight is not None and not weight.is_meta and _looks_trained(weight) and _differ(weight, node["value"])
    ]
    if away:
        _warn(
            f"{type(guide).__name__} starts away from the network's own weights, at {', '.join(away)}, which look "
            "trained. To start there give it init_loc_fn=pyro_sam.nn.init_to_module(bnn), bnn being the BayesianModule."
        )


def _looks_trained(weight: Tensor) -> bool:
    """Return whether a weight leaves the interval that torch's layers draw it from, 1/√fan-in to either side."""
    if weight.dim() < 2:
        return False
    bound = 1 / math.sqrt(weight[0].numel())
    return bool((weight.abs() > 1.01 * bound).double().mean() > _TRAINED)


def _differ(weight: Tensor, value: Any) -> bool:
    return weight.shape == value.shape and not torch.allclose(weight, value.to(weight))


def _data_sites(sites: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return (
        (name, site)
        for name, site in sites.items()
        if site["type"] == "sample" and site["is_observed"] and not (site["infer"] or {}).get("_deterministic")
    )


def _data_plates(site: Any) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized and frame.name not in PARTICLE_PLATES]


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)
