r"""The mean-field Normal guide, with plain Normal sites so that the KL is in closed form."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from operator import attrgetter
from typing import Any
from weakref import WeakValueDictionary

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.transforms import Transform
from pyro.infer.autoguide import AutoNormal, init_to_feasible
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import module as pyro_module
from pyro.nn.module import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform

from pyro_sam._base.arguments import flag, function, positive_int
from pyro_sam._base.buffers import kept_buffers
from pyro_sam._base.cures import explained
from pyro_sam._base.fresh import fresh_weights
from pyro_sam._base.initial_scale import SAMRadius, check_rule, initial_scale, small_start
from pyro_sam._base.replicas import check_parameters, mark, of_replica
from pyro_sam._base.takeover import left_by_others, names_of, note_made, warn_of
from pyro_sam._flat.recorder import only_parameters_are_traced
from pyro_sam._flat.vectors import FlatNormal, FlatParameters
from pyro_sam._step.enumeration import is_marked

__all__ = ["MeanFieldNormal", "SAMRadius", "init_to_value_or_feasible"]


def init_to_value_or_feasible(site: Any = None) -> Any:
    """Start a site at the value that the model proposes in ``infer["init_value"]``, else as ``init_to_feasible``.

    :class:`~pyro_sam.BayesianModule` proposes the network's own weights.
    """
    if site is None:
        return init_to_value_or_feasible
    value = (site["infer"] or {}).get("init_value")
    if value is None:
        return init_to_feasible(site)
    support = site["fn"].support
    if not (value.is_meta or bool(support.check(value.detach()).all())):
        raise ValueError(
            f"The prior of '{site['name']}' has support {support}, and the network's own weight, where the guide "
            "starts, lies outside of it: give a prior on all real numbers, or another start, such as "
            "init_loc_fn=pyro.infer.autoguide.init_to_median."
        )
    return value.detach().clone()


class MeanFieldNormal(AutoNormal):
    r"""Mean-field Normal guide :math:`w = \mathrm{loc} + \mathrm{scale} \odot e` for all latents of a model.

    A latent with real support gets a plain Normal at its own name, so its KL has a closed form under a Gaussian prior;
    :class:`pyro.infer.autoguide.AutoNormal` samples an auxiliary site and a Delta, whose KL is estimated. A constrained
    latent gets the Normal pushed forward through Pyro's bijection to its support; loc and scale are then those of the
    unconstrained value. Discrete latents that are marked for enumeration are left out:
    :class:`~pyro_sam.SAM_ELBO` sums over them.

    Parameters are stored per latent, as ``locs.NAME`` and ``scales.NAME`` (softplus of what the optimiser moves).

    With ``num_replicas=R`` it is R guides side by side that one step of :class:`~pyro_sam.SAM_ELBO` trains, each as it
    would be trained alone: every parameter gets a first dimension of size R, and the weights of a
    :class:`~pyro_sam.BayesianModule` start at the network's own for the first replica and at fresh ones
    (``reset_parameters`` of its layers) for the others, unless ``init_loc_fn`` says otherwise. :meth:`replica` gives
    one of them as a guide of its own; :func:`pyro_sam.predict` mixes them. Parameters of the model itself would be
    shared, and are refused.

    Args:
        model: Pyro model.
        init_loc_fn: Pyro initialisation of the locs per site; by default the weights of a
            :class:`~pyro_sam.BayesianModule`, and a feasible point elsewhere.
        init_scale: Initial standard deviation in unconstrained units: a positive number; a :class:`~pyro_sam.SAMRadius`
            for one in the units of SAM's radius; or a callable from the site
            (Pyro's message: ``site["name"]``, ``site["fn"]``, ``site["value"]``) to a number or a tensor that
            broadcasts to the site's loc. By default 0.01 over the root of the fan-in for the weights of a
            :class:`~pyro_sam.BayesianModule`, and 0.1 elsewhere.
        learn_scale: Whether scale is a parameter; otherwise it stays at ``init_scale``, as a buffer.
        create_plates: Called with the model's arguments, returns the plates to use for subsampled local latents.
        num_replicas: Number R of guides side by side; None for a single one.
    Raises:
        ValueError: If ``init_scale`` is not positive and finite. At the first call: if the param store holds another
            model's parameters under this guide's names.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc_fn: Callable[..., Any] = init_to_value_or_feasible,
        init_scale: float | SAMRadius | Callable[[Any], float | Tensor] = small_start,
        learn_scale: bool = True,
        create_plates: Callable[..., Any] | None = None,
        num_replicas: int | None = None,
    ) -> None:
        flag("learn_scale", learn_scale)
        if num_replicas is not None:
            positive_int("num_replicas", num_replicas)
        function("model", model, "a Pyro model")
        function("init_loc_fn", init_loc_fn, "pyro.infer.autoguide.init_to_median")
        if create_plates is not None:
            function("create_plates", create_plates, "a function from the model's arguments to plates")
        # a site that is summed out is not the guide's
        continuous = poutine.block(model, hide_fn=is_marked)
        super().__init__(continuous, init_loc_fn=init_loc_fn, create_plates=create_plates)
        check_rule(init_scale)
        self.init_scale = init_scale
        self.learn_scale = learn_scale
        self.num_replicas = num_replicas
        self._replica: int | None = None  # the one that is spoken of
        self._all: tuple[int, int] | None = None  # where all are spoken of: the plate's dimension, and copies of each

    @explained
    def initialize(self, *args: Any, **kwargs: Any) -> "MeanFieldNormal":
        """Create the parameters, with the model's arguments, before the first step; a second call does nothing.

        What the param store holds under the guide's names, say from a file, is taken up, as by a call of the guide.

        Returns:
            The guide.
        """
        if self.prototype_trace is None:
            local = pyro.settings.get("module_local_params")
            left = set() if local else left_by_others(f"{self._pyro_name}.")
            self._setup_prototype(*args, **kwargs)
            if not local and names_of(self) & set(pyro.get_param_store()):
                self._take_up_stored()
            warn_of(left and left & names_of(self))
        return self

    def _take_up_stored(self) -> None:
        with self._pyro_context, poutine.block():  # there a PyroModule's attribute is what the store has
            for name, owners in self._owners.items():
                for owner in owners:
                    getattr(owner, name.rpartition(".")[2])

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            # blocked: a handler such as SVI's must not take what is made on the way for the guide's parameters
            with kept_buffers(), poutine.block():
                if self.num_replicas is None:
                    super()._setup_prototype(*args, **kwargs)
                    self._set_up_scales(self._initial_scale)
                else:
                    self._set_up_replicas(self.num_replicas, *args, **kwargs)
        except BaseException:
            self.prototype_trace = None  # nothing is half set up: the next call starts anew
            raise
        note_made(self.parameters())

    def _set_up_replicas(self, number: int, *args: Any, **kwargs: Any) -> None:
        """Set up the locs of each replica and put them side by side, with the scales that each would start at."""
        found: list[dict[str, Tensor]] = []
        sites: list[dict[str, Any]] = []
        for r in reversed(range(number)):  # the first comes last, and stays the prototype
            mine, by_name = of_replica(args, r), of_replica(kwargs, r)
            with fresh_weights() if r else nullcontext():
                _check_parameters(poutine.trace(self.model).get_trace(*mine, **by_name))
                super()._setup_prototype(*mine, **by_name)
            found.insert(0, self._locs())
            sites.insert(0, dict(self._prototype_sites()))
        self.locs = PyroModule()
        for name, event_dim in self._event_dims.items():
            loc = torch.stack([locs[name] for locs in found])
            deep_setattr(self.locs, name, PyroParam(loc, constraints.real, event_dim))

        def scales(site: Any, locs: Tensor) -> Tensor:
            own = [each[site["name"]] for each in sites]
            return torch.stack([self._initial_scale(*pair) for pair in zip(own, locs, strict=True)])

        self._set_up_scales(scales)

    def _locs(self) -> dict[str, Tensor]:
        return {name: attrgetter(name)(self.locs).detach() for name in self._event_dims}

    def replica(self, r: int) -> "MeanFieldNormal":
        """Return a replica as a guide of its own, with copies of its parameters.

        In the param store they are named after it, ``MeanFieldNormal_3.locs.NAME``, or ``MeanFieldNormal_3_1`` and so
        on where another copy that is still in use has that name.

        Args:
            r: Number of the replica, from 0.
        Raises:
            ValueError: If there is no such replica, or the guide has no parameters yet.
        """
        self._check_replica(r)
        return self._copy(r, None, f"{self._pyro_name}_{r}")

    def replicas(self, start: int, stop: int) -> "MeanFieldNormal":
        """Return several replicas that follow each other as a guide with replicas, with copies of their parameters.

        In the param store they are named after them, ``MeanFieldNormal_3_to_6.locs.NAME`` for the fourth to the
        seventh.

        Args:
            start: Number of the first, from 0.
            stop: Number of the last, plus one.
        Raises:
            ValueError: If there are no such replicas, or the guide has no parameters yet.
        """
        self._check_replica(start)
        self._check_replica(stop - 1 if isinstance(stop, int) else stop)
        if stop <= start:
            raise ValueError(f"stop must be larger than start, got start={start!r} and stop={stop!r}.")
        return self._copy(slice(start, stop), stop - start, f"{self._pyro_name}_{start}_to_{stop - 1}")

    def _copy(self, rows: int | slice, number: int | None, name: str) -> "MeanFieldNormal":
        copy = type(self)(
            self.model,
            init_loc_fn=self.init_loc_fn,
            init_scale=self.init_scale,
            learn_scale=self.learn_scale,
            create_plates=self.create_plates,
            num_replicas=number,
        )
        copy._pyro_name = _free_name(name)
        _copies[copy._pyro_name] = copy
        copy.prototype_trace, copy._prototype_frames = self.prototype_trace, self._prototype_frames
        copy._event_dims = dict(self._event_dims)
        copy.locs = PyroModule()
        for site, event_dim in self._event_dims.items():
            loc = attrgetter(site)(self.locs)[rows].detach().clone()
            deep_setattr(copy.locs, site, PyroParam(loc, constraints.real, event_dim))
        copy._set_up_scales(lambda site, loc: attrgetter(site["name"])(self.scales)[rows].detach().clone())
        return copy

    @contextmanager
    def as_replica(self, r: int) -> Iterator[None]:
        """Be one of the replicas in the body: calls, ``median`` and ``quantiles`` are that replica's.

        Args:
            r: Number of the replica, from 0.
        Raises:
            ValueError: If there is no such replica, or the guide has no parameters yet.
        """
        self._check_replica(r)
        before, self._replica = self._replica, r
        try:
            yield
        finally:
            self._replica = before

    @contextmanager
    def as_all_replicas(self, dim: int, copies: int) -> Iterator[None]:
        """Be all replicas in the body: calls, in a plate of size ``R * copies``, sample them side by side.

        Args:
            dim: Dimension of that plate, left of all others.
            copies: Number of samples of each replica; those of the first come first.
        """
        before, self._all = self._all, (dim, copies)
        try:
            yield
        finally:
            self._all = before

    def _check_replica(self, r: int) -> None:
        if self.num_replicas is None:
            raise ValueError("the guide has no replicas; make it with MeanFieldNormal(model, num_replicas=R).")
        if isinstance(r, bool) or not isinstance(r, int) or not 0 <= r < self.num_replicas:
            raise ValueError(f"replica must be a whole number from 0 to {self.num_replicas - 1}, got {r!r}.")
        self._check_made()

    def _set_up_scales(self, initial: Callable[[Any, Tensor], Tensor]) -> None:
        self._transforms: dict[str, Transform | None] = {}
        # looked up once: a PyroModule is slow to walk through
        self._owners: dict[str, tuple[Any, Any]] = {}
        # not the scales, which the param store would keep
        locs = self._locs()
        self.scales = PyroModule()
        for name, site in self._prototype_sites():
            self._check_stored(name, site)
            self._transforms[name] = _simplify(biject_to(site["fn"].support))
            self._set_scale(name, initial(site, locs[name]))
            self._owners[name] = _owner(self.locs, name), _owner(self.scales, name)
        self._flat = self._flat_parameters()

    def __setstate__(self, state: Any) -> None:
        """Take over the state of a copy or a pickle, and lay out its parameters anew."""
        super().__setstate__(state)
        if "_flat" in vars(self):
            self._flat = self._flat_parameters()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        if strict and self.prototype_trace is None and any(name.startswith(prefix) for name in state_dict):
            errors.append(
                "the guide is new and has no parameters yet to load a state into; call guide.initialize(x, y) first, "
                "with the model's arguments."
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def can_be_flat(self) -> bool:
        """Return whether all there is to the guide's sites is their loc and scale.

        Not so for constrained latents, plates, subclasses with other posteriors, hooks on the guide, and where a
        handler is to see its sites.
        """
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return (
            self._flat is not None and not (hooks or pyro_module._MODULE_LOCAL_PARAMS) and only_parameters_are_traced()
        )

    def flat(self, *, graph: bool = True) -> FlatNormal | None:
        """Return all sites as one Normal, and make the statements of their parameters, without a call of the guide.

        None if the param store has other parameters than the guide's modules, which a call puts right.

        Args:
            graph: Whether their graph begins at the parameters. Otherwise it begins at vectors whose gradients
                :meth:`hand_out` takes to the parameters.
        """
        return None if self._flat is None else self._flat.read(graph=graph)

    def hand_out(self, flat: FlatNormal) -> None:
        """Add the gradients of :meth:`flat` without a graph to those of the parameters."""
        if self._flat is not None:
            self._flat.hand_out(flat)

    def _flat_parameters(self) -> FlatParameters | None:
        own = all(getattr(type(self), name) is getattr(MeanFieldNormal, name) for name in _SAMPLING)
        plain = all(
            self._transforms[name] is None and not any(frame.vectorized for frame in site["cond_indep_stack"])
            for name, site in self._prototype_sites()
        )
        if not (own and plain and self._owners) or self.scale_constraint.event_dim:
            return None
        places = {name: (*self._owners[name], name.rpartition(".")[2]) for name, _ in self._prototype_sites()}
        return FlatParameters(places, learn_scale=self.learn_scale, num_replicas=self.num_replicas)

    def _check_stored(self, name: str, site: Any) -> None:
        # PyroModule takes what the store has under its name
        full_name, store = f"{self._pyro_name}.locs.{name}", pyro.get_param_store()
        if pyro.settings.get("module_local_params") or full_name not in store:
            return
        shape = list(biject_to(site["fn"].support).inv(site["value"]).shape)
        for frame in filter(attrgetter("vectorized"), site["cond_indep_stack"]):
            shape[frame.dim - self._event_dims[name]] = frame.full_size or frame.size
        if self.num_replicas is not None:
            shape.insert(0, self.num_replicas)
        found = store[full_name].shape
        if found != torch.Size(shape):
            raise ValueError(
                f"The param store holds '{full_name}' with shape {tuple(found)}, this model's has shape "
                f"{tuple(shape)}. Call pyro.clear_param_store() before you use a guide of another model."
            )

    def _prototype_sites(self) -> Iterator[tuple[str, Any]]:
        trace: Any = self.prototype_trace
        return trace.iter_stochastic_nodes()

    def _initial_scale(self, site: Any, loc: Tensor) -> Tensor:
        number = sum(each.numel() for each in self._locs().values()) // (self.num_replicas or 1)
        return initial_scale(self.init_scale, site, loc, number)

    def _set_scale(self, name: str, scale: Tensor) -> None:
        if self.learn_scale:
            deep_setattr(self.scales, name, PyroParam(scale, self.scale_constraint, self._event_dims[name]))
            return
        leaf = name.rpartition(".")[2]
        deep_setattr(self.scales, name, None)  # makes the modules on the way
        owner = _owner(self.scales, name)
        delattr(owner, leaf)
        owner.register_buffer(leaf, scale)

    def _get_loc_and_scale(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._owners:  # in the middle of setting up
            return super()._get_loc_and_scale(name)
        (locs, scales), leaf = self._owners[name], name.rpartition(".")[2]
        loc, scale = getattr(locs, leaf), getattr(scales, leaf)
        if self.num_replicas is None:
            return loc, scale
        if self._all is not None:
            return self._spread(name, loc, *self._all), self._spread(name, scale, *self._all)
        if self._replica is None:
            raise ValueError(
                f"a guide with num_replicas={self.num_replicas} has no sample of its own; use guide.replica(r), "
                "pyro_sam.predict, or train it with SAM_ELBO."
            )
        for owner in (locs, scales):
            if (parameter := owner._parameters.get(f"{leaf}_unconstrained")) is not None:
                mark(parameter, self.num_replicas)
        return loc[self._replica], scale[self._replica]

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior median of every latent, by site name; of real latents it is the mean too.

        Raises:
            ValueError: If the guide has no parameters yet, or has replicas.
        """
        self._check_made()
        medians: dict[str, Tensor] = super().median(*args, **kwargs)
        return medians

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return posterior quantiles of every latent, by site name, the quantiles along the first dimension.

        Args:
            quantiles: Numbers between 0 and 1.
            *args: Not used, as in Pyro.
            **kwargs: Not used.
        Raises:
            ValueError: If the guide has no parameters yet, or has replicas.
        """
        self._check_made()
        values: dict[str, Tensor] = super().quantiles(quantiles, *args, **kwargs)
        return values

    def posterior(self) -> dict[str, Any]:
        """Return the posterior of every latent as a distribution of its own, which further training leaves as it is.

        Of a latent with real support it is a Normal, with the latent's loc as ``mean`` and its scale as ``stddev``; of
        a constrained one that Normal pushed forward to the support. Say, as the prior of the next task:
        ``ps.BayesianModule(net, prior=lambda name, parameter: posterior[name])``.

        Returns:
            Distributions by site name, shaped as the latents.
        Raises:
            ValueError: If the guide has no parameters yet, or has replicas.
        """
        self._check_made()
        found = {name: self._get_loc_and_scale(name) for name, _ in self._prototype_sites()}
        return {name: self._pushed(name, loc.detach().clone(), s.detach().clone()) for name, (loc, s) in found.items()}

    def _check_made(self) -> None:
        if self.prototype_trace is None:
            raise ValueError("the guide has no parameters yet; call guide.initialize(*args), or take a step.")

    def _spread(self, name: str, values: Tensor, dim: int, copies: int) -> Tensor:
        """Return the values of all replicas with the replicas at a plate's dimension, several copies of each."""
        between = -dim - (values.dim() - self._event_dims[name])
        return values.repeat_interleave(copies, 0).reshape(-1, *[1] * between, *values.shape[1:])

    def _posterior(self, name: str) -> Any:
        loc, scale = self._get_loc_and_scale(name)
        if not self.learn_scale:
            scale = pyro.subsample(scale, event_dim=self._event_dims[name])
        return self._pushed(name, loc, scale)

    def _pushed(self, name: str, loc: Tensor, scale: Tensor) -> Any:
        event_dim, transform = self._event_dims[name], self._transforms[name]
        # scale is positive by its constraint, and a loc that is not finite shows in the loss
        normal = dist.Normal(loc, scale, validate_args=False)
        if transform is None:
            return normal.to_event(event_dim)
        outer = 0
        if isinstance(transform, IndependentTransform):
            # Independent outside, as the prior has it: then torch knows the KL to a LogNormal prior, say
            outer, transform = transform.reinterpreted_batch_ndims, transform.base_transform
        # cached, so that log q needs no inverse
        pushed = dist.TransformedDistribution(normal.to_event(event_dim - outer), [transform.with_cache()])
        return pushed.to_event(outer)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent.

        Returns:
            Sampled values by site name.
        """
        self.initialize(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for name, site in self._prototype_sites():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    if frame.vectorized:
                        stack.enter_context(plates[frame.name])
                result[name] = pyro.sample(name, self._posterior(name))
        return result


_copies: WeakValueDictionary[str, MeanFieldNormal] = WeakValueDictionary()  # of replicas, in use, by name


def _free_name(name: str) -> str:
    """Return a name that no copy in use has, and take what an earlier one of that name left out of the store."""
    free = next(each for k in itertools.count() if (each := f"{name}_{k}" if k else name) not in _copies)
    store = pyro.get_param_store()
    for left in [left for left in store if left.startswith(f"{free}.")]:
        del store[left]
    return free


def _check_parameters(model: Any) -> None:
    check_parameters([name for name, site in model.nodes.items() if site["type"] == "param"])


_SAMPLING = ("__call__", "forward", "_posterior", "_get_loc_and_scale", "_create_plates")


def _owner(module: PyroModule, name: str) -> Any:
    """Return the module that has the last part of a dotted name."""
    path = name.rpartition(".")[0]
    return attrgetter(path)(module) if path else module


def _simplify(transform: Transform) -> Transform | None:
    """Drop identities, None if nothing is left: torch's bijection to (0, inf) is ``1 * exp(x) + 0``."""
    if isinstance(transform, IndependentTransform):
        base = _simplify(transform.base_transform)
        return None if base is None else IndependentTransform(base, transform.reinterpreted_batch_ndims)
    if isinstance(transform, ComposeTransform):
        parts = [part for part in map(_simplify, transform.parts) if part is not None]
        return ComposeTransform(parts) if len(parts) > 1 else next(iter(parts), None)
    if isinstance(transform, AffineTransform) and not isinstance(transform.loc, Tensor):
        return None if (transform.loc, transform.scale) == (0, 1) else transform
    return transform
