"""First mistakes that raise no error but train the wrong thing, seen in the traces of a new model and guide."""

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from torch import Tensor

from pyro_sam._base.vectorised import PARTICLE_PLATES
from pyro_sam._step.knowledge import Pair
from pyro_sam._step.loss import latent_sites
from pyro_sam._step.sites import NoiseSite
from pyro_sam.perturbation import Mixture, Perturbation

# Digits, a net of 4,810 weights: an adversary at distance 0.7 is learnt from, at 1.04 accuracy stays at chance.
_FAR = 1.0
_MANY = 100


def advise(pair: Pair, guide: Trace, model: Trace, sites: Mapping[str, NoiseSite], settings: Any) -> None:
    """Warn of what is most likely a mistake. Called where a structure of traces is new, so it costs nothing per step.

    Args:
        pair: What is known of model and guide.
        guide: Trace of the guide.
        model: Trace of the model.
        sites: Perturbed sites of the guide's run.
        settings: The estimator.
    Raises:
        ValueError: If the guide samples what the model observes.
    """
    if not is_validation_enabled():
        return
    _refuse_observed_latents(guide, model)
    kl_weight = settings.kl_weight if isinstance(settings.kl_weight, float | int) else None
    if not pair.valid:
        _warn_of_no_data(model)
        _warn_of_repeated_data(model)
        together = settings.num_particles if settings.vectorize_particles else 1
        _warn_of_far_noise(sites, settings.perturbation, together)
        if kl_weight:
            _warn_of_twofold_weight(model, kl_weight)
    # without gradients it is an evaluation, maybe of other data
    if kl_weight == 1 and torch.is_grad_enabled():
        _warn_of_missing_scale(model, pair.plate_sizes)


def _refuse_observed_latents(guide: Trace, model: Trace) -> None:
    for name in latent_sites(guide):
        if name in model.nodes and model.nodes[name]["is_observed"]:
            raise ValueError(
                f"guide samples site '{name}', which the model observes. A guide takes for a latent whatever is not "
                "observed when it is called for the first time: make a new one, and call it first with the "
                "observations too, guide(x, y)."
            )


def _warn_of_no_data(model: Trace) -> None:
    if any(_data_sites(model)):
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
    for name, site in _data_sites(model):
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
    for _, site in _data_sites(model):
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


def _warn_of_missing_scale(model: Trace, sizes: dict[str, int]) -> None:
    latents = [{frame.name for frame in _data_plates(site)} for site in latent_sites(model).values()]
    for name, site in _data_sites(model):
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
    if distance > _FAR:
        _warn(
            f"{far!r} moves the {d} latent scalars by {distance:.3g} in their own units, as far as a random draw but "
            f"all in the worst direction. rho=None is meant for a fixed scale r/√d, r from 0.05 to 0.2: give the guide "
            f"init_scale={0.1 / math.sqrt(d):.2g} and learn_scale=False, or take a rho of order one."
        )


def _data_sites(model: Trace) -> Iterator[tuple[str, Any]]:
    return (
        (name, site)
        for name, site in model.nodes.items()
        if site["type"] == "sample" and site["is_observed"] and not (site["infer"] or {}).get("_deterministic")
    )


def _data_plates(site: Any) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized and frame.name not in PARTICLE_PLATES]


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)
