"""A network as a Bayesian module, every weight a Pyro sample site; priors and starting points for its weights."""

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide import init_to_feasible
from pyro.nn import PyroModule
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints
from torch.nn.parameter import is_lazy

from pyro_sam._base.arguments import positive
from pyro_sam._base.fresh import starting_weights
from pyro_sam._base.surroundings import Surroundings
from pyro_sam._base.vectorised import ParticlePlate, run
from pyro_sam._flat.recorder import Recorder, lone_recorder
from pyro_sam._flat.weights import Weights
from pyro_sam._step.dependence import tensors_of

__all__ = ["BayesianModule", "FanInNormal", "fan_in_normal", "init_to_module"]


class BayesianModule(PyroModule):
    r"""Run a network with weights sampled from their priors.

    .. math:: w_k \sim p_k, \qquad \mathrm{output} = f_{w_1, w_2, \ldots}(\mathrm{input})

    Call it in a Pyro model, outside of the data plate. Each parameter of ``net`` is a latent site of its own name
    (``"0.weight"``), with the network's weight in ``infer["init_value"]`` for guides to start at. Parameters that
    ``net`` ties are one site. The weights of ``net`` are never written to; buffers, such as BatchNorm's running
    statistics, are the network's own.

    Particles: where a plate gives the weights a dimension at the left, shape (P, 1, ..., 1) + the parameter's, the
    network is mapped over it by ``torch.func.vmap`` (recurrent layers run in a loop). All particles see the same
    input. The output gets shape (P, 1, ..., 1) + the network's own output shape, so that the first dimension of the
    latter is the data plate's, -1, and P stands at its own plate's.

    Hidden parameters are learned by maximum likelihood: they are ``pyro.param`` s of the parameter's name (after the
    module's own, in a :class:`~pyro.nn.PyroModule`), and it is the network's own tensor that SVI or a torch optimiser
    of ``ELBOModule.parameters()`` trains. As always in Pyro the name decides: a value of that name in the param store,
    say from a checkpoint, is copied into the network at the next call. Hidden parameters that do not require grad stay
    as they are.

    Args:
        net: Network with initialised parameters.
        prior: A scalar distribution, for every element of every parameter; or a callable from name and parameter to a
            scalar distribution or one of the parameter's shape, called at every run. Moved to the parameter's device
            and dtype. None for ``fan_in_normal(4.0, largest=1.0)``: the standard Normal up to a fan-in of 16, narrower
            beyond.
        hide: Parameters to leave deterministic: names, names of submodules, or a predicate on names.
    Raises:
        ValueError: If ``net`` is no module with initialised parameters, ``hide`` names none of them or leaves none
            Bayesian, or a prior does not fit its parameter. At a call: if a data plate is around it, or a layer cannot
            run for several particles at once.
        RuntimeError: At a call, if ``net`` or the model around it uses activation checkpointing.
    """

    def __init__(
        self,
        net: nn.Module,
        prior: Distribution | Callable[[str, nn.Parameter], Any] | None = None,
        hide: str | Iterable[str] | Callable[[str], bool] = (),
    ) -> None:
        super().__init__()
        self.net = net
        self.prior = fan_in_normal(4.0, largest=1.0) if prior is None else prior
        self._hide = hide
        self._met: Any = None
        self._meet()
        _warn_of_frozen(net, self._hidden)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; another network or prior is checked as in the beginning."""
        if name == "net":
            _check_net(value)
        elif name == "prior":
            _check_prior(value)
        super().__setattr__(name, value)

    def is_as_met(self) -> bool:
        """Return whether network and prior are those that the last run's priors were made from."""
        return self._met is not None and bool(self._met.is_same(_network(self), self.prior))

    @property
    def hide(self) -> Any:
        """Parameters that are left deterministic, as they were given; another value counts from the next run on."""
        return self._hide

    @hide.setter
    def hide(self, value: str | Iterable[str] | Callable[[str], bool]) -> None:
        _hidden_names(_network(self), value)  # refuses what names no parameter, and changes nothing then
        self._hide, self._met = value, None

    def _meet(self) -> None:
        """Take in the network and the prior, where one of them is another one than before, or the prior was edited."""
        net = _network(self)
        # a capture follows a run, and must see no tensor compared
        if self._met is not None and (torch._C._len_torch_dispatch_stack() or self.is_as_met()):
            return
        self._hidden = _hidden_names(net, self._hide)
        self._priors: dict[Any, Any] = {}
        self._weights: Weights | None = None
        self._met = _Met(net, self.prior)
        if not self._prior_may_change():
            for name, parameter in net.named_parameters():
                if name not in self._hidden:
                    self._prior_of(name, parameter)
        # all latents, all with a prior that has nothing to learn
        self._is_fixed = len(self._priors) == len(dict(net.named_parameters()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run :meth:`forward`."""
        recorder = lone_recorder()
        if recorder is None or self not in recorder.looked_at:
            self._meet()
        if self._is_fixed and type(self).forward is BayesianModule.forward and recorder is not None:
            return nn.Module.__call__(self, *args, **kwargs)  # nothing in it needs a PyroModule's context
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Sample the weights and run the network, with its own arguments and output."""
        net = _network(self)
        if self._is_fixed and (recorder := lone_recorder()) is not None:
            known = self._known(net, recorder)
            weights = recorder.take(known.priors)
            if recorder.lead:
                return run(net, weights, len(recorder.lead), args, kwargs)
            return known.run(weights, recorder.buffers, args, kwargs)
        weights, start = {}, starting_weights(net)
        with ParticlePlate() as plate:
            for name, parameter in net.named_parameters():
                if name in self._hidden:
                    weights[name] = self._deterministic(name, parameter)
                else:
                    infer: Any = {"init_value": start[name].detach()}
                    weights[name] = pyro.sample(name, self._prior_of(name, parameter), infer=infer)
        return run(net, weights, plate.dim, args, kwargs)

    def _deterministic(self, name: str, parameter: nn.Parameter) -> Tensor:
        if not parameter.requires_grad:
            return parameter
        name = self._pyro_get_fullname(name)
        if pyro.settings.get("module_local_params"):
            # a param statement without the store, as PyroModule makes it for its own
            parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
            statement = effectful(lambda *_, **__: parameter, type="param")
            return statement(name, parameter, constraint=constraints.real, event_dim=None, name=name)
        if not parameter.is_contiguous():
            # the store would keep a copy, and train that
            parameter.data = parameter.data.contiguous()
        store = pyro.get_param_store()
        if name in store and store[name] is not parameter:
            stored = store[name].detach()
            if stored.shape != parameter.shape:
                raise ValueError(
                    f"The param store holds '{name}' with shape {tuple(stored.shape)}, the network's has shape "
                    f"{tuple(parameter.shape)}. Call pyro.clear_param_store() before you use another network."
                )
            parameter.data.copy_(stored)
            del store[name]
        return pyro.param(name, parameter)

    def _known(self, net: nn.Module, recorder: Recorder) -> "Weights":
        """Return the weights as they were found before, if nothing changed since."""
        known = self._weights
        if known is None or not (self in recorder.looked_at or known.are_current()):
            priors = {name: self._prior_of(name, parameter) for name, parameter in net.named_parameters()}
            self._weights = known = Weights(net, priors)
        recorder.looked_at.add(self)
        return known

    def _prior_may_change(self) -> bool:
        return not isinstance(self.prior, Distribution | FanInNormal)

    def _prior_of(self, name: str, parameter: nn.Parameter) -> Any:
        key = name, parameter.shape, parameter.device, parameter.dtype
        if key in self._priors:
            return self._priors[key]
        given = self.prior if isinstance(self.prior, Distribution) else self.prior(name, parameter)
        learnable = []

        def place(tensor: Tensor) -> Tensor:
            learnable.append(tensor.requires_grad)
            placed = tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else None)
            if placed is not tensor:
                self._met.note_copy(tensor)
            return placed

        # what is kept must not be an inference tensor, which no later graph could hold
        with torch.inference_mode(False):
            prior = _map_tensors(_fit(given, name, parameter.shape), place)
        if not (self._prior_may_change() or any(learnable)):
            self._priors[key] = prior
        return prior


class _Met:
    """The network and the prior that a module's priors were made from.

    Args:
        net: The network.
        prior: The prior.
    """

    def __init__(self, net: nn.Module, prior: Any) -> None:
        self._net, self._prior, self._seen = net, prior, Surroundings(prior)
        self._tensors = [(tensor, tensor.data_ptr()) for tensor in tensors_of(prior)]
        self._copied: list[tuple[Tensor, Tensor]] = []  # what a copy was made of, and its value then

    def note_copy(self, tensor: Tensor) -> None:
        """Note a tensor whose copy a prior holds, so that what is written to it later is seen."""
        if not any(known is tensor for known, _ in self._copied):
            self._copied.append((tensor, tensor.detach().clone()))

    def is_same(self, net: nn.Module, prior: Any) -> bool:
        """Return whether all of it is as it was."""
        if net is not self._net or prior is not self._prior:
            return False
        if not isinstance(prior, Distribution):  # called at every run, or constant
            return True
        in_place = all(tensor.data_ptr() == place for tensor, place in self._tensors)
        same = all(tensor.is_meta or torch.equal(tensor, was) for tensor, was in self._copied)
        return in_place and same and self._seen.is_same()


@dataclass(frozen=True)
class FanInNormal:
    """Prior that :func:`fan_in_normal` returns."""

    std: float
    largest: float = math.inf

    def __call__(self, name: str, parameter: Tensor) -> Any:
        """Return the prior of a parameter, with the parameter's shape as its event shape."""
        std = min(self.largest, self.std / math.sqrt(max(parameter.shape[1:].numel(), 1)))
        scale = parameter.new_full((), std)
        # a meta tensor has no value to check
        normal = dist.Normal(parameter.new_zeros(()), scale, validate_args=False if parameter.is_meta else None)
        return normal.expand(parameter.shape).to_event(parameter.dim())


def fan_in_normal(std: float = 1.0, largest: float = math.inf) -> FanInNormal:
    r"""Return a prior under which the size of a layer's output does not depend on the layer's width.

    .. math:: w_{ij} \sim \mathcal{N}(0, s^2), \qquad s = \min(\mathrm{std} / \sqrt n, \mathrm{largest})

    n is the fan-in, by torch's convention the number of elements of ``weight[0]`` (so of an Embedding, its width).
    Parameters with fewer than two dimensions, such as biases and the weights of normalisation layers, have n = 1.

    Args:
        std: Standard deviation at fan-in 1; positive.
        largest: Bound on the standard deviation, which keeps biases and narrow layers from being wide; positive.
    Returns:
        A callable for ``BayesianModule(net, prior=...)``.
    Raises:
        ValueError: If ``std`` is not positive and finite, or ``largest`` not positive.
    References:
        Neal (1996), Bayesian Learning for Neural Networks, Section 2.1.
    """
    positive("std", std)
    if largest != math.inf:
        positive("largest", largest)
    return FanInNormal(float(std), float(largest))


def init_to_module(bnn: BayesianModule, fallback: Callable[..., Any] = init_to_feasible) -> Callable[[Any], Any]:
    """Return an initialisation for Pyro's autoguides that starts the sites of ``bnn`` at the network's own weights.

    Args:
        bnn: Module whose sites to start; in the model a scope may have put ``prefix/`` before their names.
        fallback: Initialisation of all other sites, and of weights outside of their prior's support.
    Returns:
        A callable from a site to its value, for ``init_loc_fn=``.
    Raises:
        ValueError: If ``bnn`` is not a BayesianModule.
    """
    if not isinstance(bnn, BayesianModule):
        raise ValueError(f"bnn must be a BayesianModule, got {type(bnn).__name__}: wrap the network in one.")
    return partial(_init_at_weight, bnn=bnn, fallback=fallback)


def _init_at_weight(site: Any, bnn: BayesianModule, fallback: Callable[..., Any]) -> Any:
    own = dict(_network(bnn).named_parameters())
    # not the value that the site proposes, which for replicas is a fresh one
    value = own.get(site["name"], own.get(site["name"].rpartition("/")[2]))
    if "init_value" not in site["infer"] or value is None:
        return fallback(site)
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is not constraints.real and not support.check(value).all():
        return fallback(site)
    # a copy: the guide trains what it gets, and the network's weights are not the guide's
    return value.detach().clone()


def _network(bnn: BayesianModule) -> nn.Module:
    # not bnn.net: while a model runs, reading a plain module off a PyroModule puts its parameters into the param store
    net: Any = bnn._modules["net"]
    return net


def _check_net(net: nn.Module) -> None:
    if not isinstance(net, nn.Module):
        raise ValueError(f"net must be a torch.nn.Module, got {net!r}.")
    if isinstance(net, torch.jit.ScriptModule | nn.DataParallel):
        raise ValueError(
            f"net must not be a {type(net).__name__}, whose weights cannot be replaced: give the module it wraps."
        )
    parameters = dict(net.named_parameters())
    if not parameters:
        raise ValueError(f"net must have parameters to put a prior on, {type(net).__name__} has none.")
    lazy = [name for name, parameter in parameters.items() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"net must know the shapes of its parameters, {lazy} are lazy: run net on one batch first.")


def _check_prior(prior: Any) -> None:
    if prior is fan_in_normal:
        raise ValueError(
            "prior must be what fan_in_normal returns, such as fan_in_normal(1.0), got the function itself."
        )
    if isinstance(prior, type) or not (isinstance(prior, Distribution) or callable(prior)):
        raise ValueError(
            "prior must be a distribution such as pyro.distributions.Normal(0.0, 1.0), or a callable from name and "
            f"parameter to one, got prior={prior!r}."
        )


def _hidden_names(net: nn.Module, hide: str | Iterable[str] | Callable[[str], bool]) -> frozenset[str]:
    first_names = {parameter: name for name, parameter in net.named_parameters()}
    # a tied parameter can be hidden by any of its names
    names = {name: first_names[parameter] for name, parameter in net.named_parameters(remove_duplicate=False)}
    if callable(hide) and not isinstance(hide, type):
        hidden = {first for name, first in names.items() if hide(name)}
    else:
        hidden = set()
        entries = [hide] if isinstance(hide, str) else hide
        if not isinstance(entries, Iterable) or isinstance(entries, Tensor | type):
            raise ValueError(f"hide must be names of parameters or submodules, or a predicate on names, got {hide!r}.")
        for entry in entries:
            matches = {first for name, first in names.items() if name == entry or name.startswith(f"{entry}.")}
            if not matches:
                raise ValueError(
                    f"hide must name parameters or submodules of net, got {entry!r}; parameters: {', '.join(names)}."
                )
            hidden |= matches
    if hidden == set(first_names.values()):
        raise ValueError("hide must leave a parameter Bayesian, got every parameter of net: nothing is left to infer.")
    return frozenset(hidden)


def _warn_of_frozen(net: nn.Module, hidden: frozenset[str]) -> None:
    """Warn where some of the weights are frozen, as for fine-tuning, and would be sampled all the same."""
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    if frozen < {name for name, _ in net.named_parameters()} and (wrong := sorted(frozen - hidden)):
        warnings.warn(
            f"{len(wrong)} parameters of net that do not require grad, such as '{wrong[0]}', become latents like all "
            f"others. To leave them as they are: hide={wrong[:3]!r}{', and so on' if wrong[3:] else ''}; a submodule's "
            "name hides all of its parameters.",
            stacklevel=3,
        )


def _fit(prior: Any, name: str, shape: torch.Size) -> Any:
    if not isinstance(prior, TorchDistributionMixin):
        raise ValueError(
            f"The prior of '{name}', shape {tuple(shape)}, must be a distribution of pyro.distributions, got {prior!r}."
        )
    if not prior.shape():
        prior = prior.expand_by(shape)
    if prior.shape() != shape:
        raise ValueError(
            f"The prior of '{name}' must be scalar or of the parameter's shape {tuple(shape)}, got shape "
            f"{tuple(prior.shape())}. Give a scalar prior, or a callable that expands it to parameter.shape."
        )
    return prior.to_event(len(prior.batch_shape))


def _map_tensors(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    # copies what it enters, so that the user's own distribution stays where it is
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, Distribution | Transform) and not isinstance(value, nn.Module):
        value = copy.copy(value)
        vars(value).update({key: _map_tensors(item, move) for key, item in vars(value).items()})
    elif type(value) in (list, tuple):
        value = type(value)(_map_tensors(item, move) for item in value)
    return value
