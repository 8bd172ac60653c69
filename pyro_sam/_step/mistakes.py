"""The look at a new structure of model and guide: do they fit together, and is it what the user meant?"""

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyro_sam._base.vectorised import PARTICLE_PLATES
from pyro_sam._step.enumeration import depends_on, enumerated_dims
from pyro_sam._step.loss import latent_sites
from pyro_sam._step.settings import Settings
from pyro_sam._step.signatures import signature
from pyro_sam._step.sites import NoiseSite
from pyro_sam.perturbation import Mixture, Perturbation

# Digits, a net of 4,810 weights: an adversary at distance 0.7 is learnt from, at 1.04 accuracy stays at chance.
FAR = 1.0
_MANY = 100


def inspect(pair: Any, settings: Settings, run: Any, model: Trace) -> None:
    """Look at a run of guide and model, unless the like of it was looked at before.

    Args:
        pair: What is known of model and guide.
        settings: The estimator's settings.
        run: The guide's run.
        model: The model's trace.
    Raises:
        ValueError: If the two do not fit together, or the settings do not fit them.
    """
    key = signature(run.trace), signature(model), settings.is_evidence, settings.hide
    if pair.valid.get(key):
        return
    _check_hide(settings, run)
    if not settings.is_evidence:
        _refuse_enumerated_priors(model)
    _advise(pair, run, model, settings)
    if is_validation_enabled():
        nesting: Any = pair.known_nesting(settings)  # Pyro's annotation forgets infinity
        check_model_guide_match(model, run.trace, nesting)
        _warn_of_order(run.trace, model)
        for trace in map(prune_subsample_sites, (run.trace, model)):
            trace.compute_log_prob()
            check_shapes(trace.nodes.values(), nesting)
    pair.valid.put(key, True)


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


def _advise(pair: Any, run: Any, model: Trace, settings: Settings) -> None:
    if not is_validation_enabled():
        return
    _refuse_observed_latents(run.trace, model)
    if not len(pair.valid):
        _warn_of_no_data(model)
        _warn_of_repeated_data(model)
        _warn_of_far_noise(run.sites, settings.perturbation, settings.together)
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


def _warn_of_no_data(model: Trace) -> None:
    if any(_data_sites(model.nodes)):
        return
    # without subsampling it may well be meant so
    latents = latent_sites(model).items()
    subsampled = [name for name, site in latents if any(f.size < (f.full_size or f.size) for f in _data_plates(site))]
    if subsampled:
        _warn(
            f"The model observes nothing, so only the KL is learnt, though it subsamples data around "
            f"{', '.join(subsampled)}. Pass the observations to the model and give them to their site, obs=y."
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


def _warn_of_far_noise(sites: Mapping[str, NoiseSite], law: Perturbation, num_particles: int) -> None:
    laws = law.perturbations if isinstance(law, Mixture) else [law]
    far = next((law for law in laws if getattr(law, "rho", 0.0) is None), None)
    scales = [site.scale for site in sites.values() if site.scale is not None]
    d = sum(scale.numel() for scale in scales) // num_particles
    if far is None or d < _MANY or any(scale.is_meta for scale in scales):
        return
    distance = math.sqrt(sum(scale.detach().double().square().sum().item() for scale in scales) / num_particles)
    if distance > FAR:
        _warn(
            f"{far!r} moves the {d} latent scalars by {distance:.3g} in their own units, as far as a random draw but "
            f"all in the worst direction. rho=None is meant for a fixed scale r/√d, r from 0.05 to 0.2: give the guide "
            f"init_scale={0.1 / math.sqrt(d):.2g} and learn_scale=False, or take a rho of order one."
        )


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
