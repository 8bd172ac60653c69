r"""One torch optimiser for all parameters of an SVI, where Pyro keeps one for each."""

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from pyro.params.param_store import normalize_param_name
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from pyro_sam._base.arguments import numbers, positive
from pyro_sam._base.random_state import RandomState, Streams
from pyro_sam._base.replicas import norms, number_in
from pyro_sam._base.surroundings import Surroundings
from pyro_sam._base.torch_optimisers import (
    can_fuse,
    check_constructor,
    check_proportional,
    check_replicas,
    check_scheduler,
    construct,
    make_scheduler,
    needs_closure,
    title,
    unchanged_on_error,
)

__all__ = ["JointOptim"]

Interval = Literal["step", "epoch"]


class JointOptim(PyroOptim):
    r"""A Pyro optimiser that holds one torch optimiser for all parameters.

    One call of the optimiser moves all parameters, with its fused kernel where it has one. The norm that ``clip_norm``
    bounds runs over all of them:

    .. math:: g \leftarrow g \cdot \min(1, \mathrm{clip\_norm} / \lVert g \rVert_2)

    Parameters that appear later join it; those that a step does not use are left alone. After a step ``.grad`` is
    None.

    Args:
        optim_constructor: Class of a torch optimiser, such as ``torch.optim.Adam``.
        optim_args: Its keyword arguments; or a callable from a parameter's name to them, for a learning rate per
            parameter. ``fused=True`` is added where the optimiser has such a kernel for the parameters and neither
            ``fused`` nor ``foreach`` nor ``differentiable`` is given. ``lr`` may be a sequence or a vector with one for
            each replica of a guide with ``num_replicas``, for an optimiser whose steps are in proportion to it.
        clip_norm: Largest norm of the gradient of all parameters together, positive; None for no bound. With replicas
            the bound holds for each by itself.
        scheduler: Callable from the torch optimiser to a torch scheduler, such as
            ``lambda optimizer: CosineAnnealingLR(optimizer, T_max=100)``.
        scheduler_interval: ``"epoch"`` leaves the scheduler to calls of :meth:`step`, which :func:`pyro_sam.fit` makes
            after every epoch; ``"step"`` steps it after every step of the optimiser.

    Attributes:
        optimizer: The torch optimiser; None before the first step.
        scheduler: The torch scheduler; None before the first step, or where there is none.
        needs_closure: Whether the optimiser evaluates the loss by itself, as ``torch.optim.LBFGS`` does.
        grad_norm: Norm of the last gradient before it was clipped, a scalar tensor, or one norm for each replica; None
            without ``clip_norm``.
    Raises:
        ValueError: If an argument is out of its range or does not fit the optimiser. At a step: if the optimiser needs
            a closure, or the scheduler cannot follow parameters that appear later.
    """

    def __init__(
        self,
        optim_constructor: Callable[..., Optimizer],
        optim_args: dict[str, Any] | Callable[[str], dict[str, Any]],
        clip_norm: float | None = None,
        scheduler: Callable[[Optimizer], Any] | None = None,
        *,
        scheduler_interval: Interval = "epoch",
    ) -> None:
        check_constructor(optim_constructor)
        check_scheduler(scheduler, scheduler_interval)
        if not (isinstance(optim_args, dict) or callable(optim_args)):
            raise ValueError(
                "optim_args must be a dict such as {'lr': 1e-3}, or a callable from a parameter's name to one, got "
                f"optim_args={optim_args!r}."
            )
        self._rates: tuple[float, ...] | None = None  # one for each replica
        rates = optim_args.get("lr") if isinstance(optim_args, dict) else None
        if isinstance(rates, Sequence) or (isinstance(rates, Tensor) and rates.dim() == 1):
            self._rates = numbers(positive, "lr", rates)
            optim_args = {**optim_args, "lr": max(self._rates)}  # type: ignore[dict-item]
            check_proportional(optim_constructor)
        super().__init__(optim_constructor, optim_args)
        self._constructor: Callable[..., Optimizer] = optim_constructor
        self.clip_norm = None if clip_norm is None else positive("clip_norm", clip_norm)
        self.scheduler_constructor = scheduler
        self.scheduler_interval = scheduler_interval
        self.needs_closure = needs_closure(optim_constructor)
        self.optimizer: Optimizer | None = None
        self.scheduler: Any = None
        self.grad_norm: Tensor | None = None
        self._present: set[Tensor] = set()  # what the last step used
        self._params: list[Tensor] = []
        self._names: dict[Tensor, str] = {}
        self._groups: list[dict[str, Any]] = []  # arguments of torch's groups
        self._waiting: dict[str, Any] | None = None  # a state whose parameters have not all been seen
        if isinstance(optim_args, dict):  # torch checks them, now rather than at the first step
            construct(optim_constructor, [torch.zeros(1, requires_grad=True)], optim_args)

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Step the optimiser for ``params``, whose gradients are in ``.grad``; further arguments go to its ``step``."""
        # sets compare by identity and kept hashes: no Python per parameter
        if params != self._present:
            self._meet(set(params))
        self._clip()
        optimizer: Any = self.optimizer
        if self.needs_closure and not (args or kwargs):
            raise ValueError(
                f"{type(optimizer).__name__} evaluates the loss several times in a step, which SVI.step does not "
                "offer; call optim.minimize(svi, ...) in its place, or use pyro_sam.fit."
            )
        before = [] if self._rates is None else [param.detach().clone() for param in self._params]
        optimizer.step(*args, **kwargs)
        self._shorten(before)
        for param in self._params:
            param.grad = None
        if self.scheduler is not None and self.scheduler_interval == "step":
            self.scheduler.step()

    def minimize(self, svi: Any, *args: Any, **kwargs: Any) -> float:
        """Take the place of ``svi.step(*args, **kwargs)`` for an optimiser that needs a closure.

        All evaluations of one step see the same noise, so that a line search compares like with like. As ``svi.step``
        it knows nothing of other processes; :func:`pyro_sam.fit` averages every evaluation over them.

        Returns:
            The loss before the step.
        Raises:
            FloatingPointError: If a loss or a gradient is not finite; parameters and the optimiser's state are those
                before the step.
        """

        def evaluate() -> tuple[Any, dict[str, Tensor]]:
            with poutine.trace(param_only=True) as capture:
                loss = svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
            sites: Any = capture.trace.nodes.items()
            params = {name: site["value"].unconstrained() for name, site in sites}
            norm = float(clip_grad_norm_(params.values(), math.inf))  # changes nothing
            if not (math.isfinite(loss) and math.isfinite(norm)):
                for param in params.values():
                    param.grad = None
                raise FloatingPointError(
                    f"the loss is {float(loss):g} and its gradient's norm {norm:g}. The parameters are those before "
                    "this step. Try a lower learning rate or clip_norm."
                )
            return loss, params

        return self.descend(evaluate, Surroundings(svi.model, svi.guide).generators)

    def descend(
        self, evaluate: Callable[[], tuple[Any, Mapping[str, Tensor]]], own_streams: Sequence[Any] = ()
    ) -> float:
        """Do what :meth:`minimize` does with a function that takes the place of ``svi.loss_and_grads``.

        Args:
            evaluate: Returns a loss, and by name the parameters whose gradients it has left in ``.grad``. Where it
                raises, the step ends with parameters and the optimiser's state as they were before.
            own_streams: Generators that it draws from besides the default ones of torch, NumPy and Python, to see the
                same noise at every evaluation.

        Returns:
            The loss before the step.
        """
        start = RandomState.capture(Streams(own=tuple(own_streams)))

        def again() -> Any:
            start.restore()
            for param in self._params:
                param.grad = None
            return evaluate()

        loss, named = again()
        self.name_parameters((name, param) for name, param in named.items() if param not in self.optim_objs)
        params = set(named.values())
        self._meet(params)
        before, waiting = float(loss), [loss]  # the optimiser begins where the parameters were found

        def closure() -> Any:
            if waiting:
                return waiting.pop()
            loss, _ = again()
            self._clip()
            return loss

        with unchanged_on_error(self.optimizer):
            self(params, closure)
        return before

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the scheduler, if there is one, with its own arguments: ``ReduceLROnPlateau`` takes the loss."""
        if self.scheduler is not None:
            self.scheduler.step(*args, **kwargs)

    def name_parameters(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Tell names of parameters that the param store does not know, as under ``module_local_params``.

        States are kept by name, and parameters are ordered by it. Call it before the first step:
        ``optim.name_parameters(guide.named_parameters())``. :func:`pyro_sam.fit` does it by itself.

        Args:
            named: Pairs of name and parameter; of two names for one parameter the first counts.
        """
        for name, param in named:
            self._names.setdefault(param, name)

    # State

    def get_state(self) -> dict[str, Any]:
        """Return the state of optimiser and scheduler, of plain values and tensors only.

        Returns:
            ``names`` of the parameters in the order of ``optimizer``, the torch optimiser's state_dict; ``scheduler``,
            the scheduler's or None; ``rates``, where each replica has its own. Empty before the first step.
        Raises:
            ValueError: If a parameter has no name.
        """
        if self.optimizer is None:
            return {} if self._waiting is None else self._waiting
        names = [self._name(param) for group in self.optimizer.param_groups for param in group["params"]]
        if None in names:
            raise ValueError(
                f"{names.count(None)} of {len(names)} parameters have no name to keep their state under, as with "
                "module_local_params; call optim.name_parameters(guide.named_parameters()), and likewise for the model."
            )
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        rates = {} if self._rates is None else {"rates": list(self._rates)}
        return {"names": names, "optimizer": self.optimizer.state_dict(), "scheduler": scheduler, **rates}

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Set the state that :meth:`get_state` returned; for parameters not seen yet, when they appear.

        Learning rates are those of the state, as in torch.

        Raises:
            ValueError: If it is no such state, or one of another number of learning rates.
        """
        if state_dict and not {"names", "optimizer", "scheduler"} <= state_dict.keys():
            raise ValueError(
                "state_dict must come from JointOptim.get_state, with names, optimizer and scheduler; got "
                f"{', '.join(map(repr, state_dict)) or 'nothing'}."
            )
        # of an older version it has no rates
        rates = tuple(state_dict["rates"]) if "rates" in state_dict else self._rates
        there, here = len(rates or ()), len(self._rates or ())
        if there != here:
            raise ValueError(f"state_dict must have {here} learning rates of replicas, as this optimiser, got {there}.")
        self._rates = rates
        self._waiting = copy.deepcopy(state_dict) or None  # torch would share its tensors
        self._load_scheduler(self._waiting)
        self._consume(self._params)

    def load(self, filename: str | os.PathLike[str], map_location: Any = None) -> None:
        """Load a state that ``save`` wrote; no pickled code is run."""
        self.set_state(torch.load(filename, map_location=map_location, weights_only=True))

    def _load_scheduler(self, state: dict[str, Any] | None) -> None:
        if self.scheduler is not None and state and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])

    def _clip(self) -> None:
        if self.clip_norm is None:
            return
        gradients = [param.grad for param in self._params if param.grad is not None]
        number = next((n for param in self._params if (n := number_in(param))), None)
        if number is None or not gradients:
            self.grad_norm = clip_grad_norm_(self._params, self.clip_norm)
            return
        self.grad_norm = norms(gradients, number)
        factors = (self.clip_norm / (self.grad_norm + 1e-6)).clamp(max=1)  # as in clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(factors.to(gradient).view(-1, *[1] * (gradient.dim() - 1)))

    @torch.no_grad()
    def _shorten(self, before: Sequence[Tensor]) -> None:
        """Shorten a step taken at the largest learning rate to each replica's own."""
        if self._rates is None:
            return
        shares = torch.tensor(self._rates, dtype=torch.float64) / max(self._rates)
        for param, old in zip(self._params, before, strict=True):
            param.copy_(torch.lerp(old, param, shares.to(param).view(-1, *[1] * (param.dim() - 1))))

    def _consume(self, params: Iterable[Tensor]) -> None:
        """Load what waits for these parameters."""
        if self._waiting is None or self.optimizer is None:
            return
        saved, names = self._waiting["optimizer"], self._waiting["names"]
        place = {name: index for index, name in enumerate(names)}
        wanted = {param: place[name] for param in params if (name := self._name(param)) in place}
        present = self.optimizer.state_dict()
        for group, own in zip(self.optimizer.param_groups, present["param_groups"], strict=True):
            members = list(zip(group["params"], own["params"], strict=True))
            for param, index in members:
                if param in wanted and wanted[param] in saved["state"]:
                    present["state"][index] = saved["state"][wanted[param]]
            own.update(_options(saved["param_groups"], {wanted[param] for param, _ in members if param in wanted}))
        self.optimizer.load_state_dict(present)
        if {self._name(param) for param in self._params} >= place.keys():
            self._waiting = None

    # Parameters

    def _meet(self, params: set[Tensor]) -> None:
        """Take in what no step has used yet."""
        for param in params - self._present:
            check_replicas(self._constructor, number_in(param), self._rates, needs_closure=self.needs_closure)
        self._present = params
        new = [param for param in params if param not in self.optim_objs]
        if not new:
            return
        self._names.update({param: name for param in new if (name := self._name(param)) is not None})
        # by name: a set's order, and with it the sum behind a norm, differs from run to run
        new.sort(key=lambda param: (param not in self._names, self._names.get(param, "")))
        first = self.optimizer is None
        self._add(new)
        if first and self.scheduler_constructor is not None:
            self.scheduler = make_scheduler(self.scheduler_constructor, self.optimizer)
            self._load_scheduler(self._waiting)
        self._consume(new)

    def _name(self, param: Tensor) -> str | None:
        name = self._names.get(param)
        return pyro.get_param_store().param_name(param) if name is None else name

    def _add(self, new: Sequence[Tensor]) -> None:
        if self.optimizer is not None and self.needs_closure:
            raise ValueError(
                f"{title(self._constructor)} cannot take parameters that appear after its first step, got "
                f"{', '.join(str(self._name(param)) for param in new)}; make them exist before it."
            )
        names = {self._names.get(param) for param in new} - {None}
        for old in [param for param in self._params if self._names.get(param) in names]:
            self._forget(old)
        groups: list[tuple[dict[str, Any], list[Tensor]]] = []
        for param in new:
            args = self._arguments(param)
            members = next((members for known, members in groups if known == args), None)
            if members is None:
                groups.append((args, [param]))
            else:
                members.append(param)
        for args, members in groups:
            self._adopt(args, construct(self._constructor, members, args))
        self._params.extend(new)
        self.optim_objs.update(dict.fromkeys(new, self.optimizer))

    def _adopt(self, args: dict[str, Any], fresh: Optimizer) -> None:
        """Move the parameters of a new optimiser into the one there is."""
        (group,) = fresh.param_groups
        if self.optimizer is None:
            self.optimizer = fresh
        elif args in self._groups:  # one group for one kernel call, at the learning rate that a scheduler has come to
            self.optimizer.param_groups[self._groups.index(args)]["params"].extend(group["params"])
            self.optimizer.state.update(fresh.state)
            return
        elif self.scheduler is not None:
            raise ValueError(
                f"the scheduler cannot follow parameters with optim_args={args!r} that appear after its first step; "
                "make them exist before it, or give them the arguments of others."
            )
        else:
            self.optimizer.add_param_group(group)
            self.optimizer.state.update(fresh.state)
        self._groups.append(args)

    def _forget(self, old: Tensor) -> None:
        """Drop a parameter in whose place, under its name, there is another one."""
        optimizer = self.optim_objs.pop(old)
        for group in optimizer.param_groups:
            group["params"] = [param for param in group["params"] if param is not old]
        optimizer.state.pop(old, None)
        self._params = [param for param in self._params if param is not old]
        del self._names[old]

    def _arguments(self, param: Tensor) -> dict[str, Any]:
        args = self.pt_optim_args
        if not isinstance(args, dict):
            name = self._name(param)
            if name is None:
                raise ValueError(
                    "optim_args is a callable from a parameter's name, and a parameter has none, as with "
                    "module_local_params; call optim.name_parameters(guide.named_parameters()) before the first step."
                )
            args = args(normalize_param_name(name))
            if not isinstance(args, dict):
                raise ValueError(f"optim_args must return a dict, got {args!r} for parameter '{name}'.")
        if args.keys() & {"fused", "foreach", "differentiable"} or not can_fuse(self._constructor, args, param):
            return args
        return {**args, "fused": True}


def _options(groups: Sequence[dict[str, Any]], members: set[int]) -> dict[str, Any]:
    """Return the options of the saved group that has any of these members; how it computes is not among them."""
    group = next((group for group in groups if members & set(group["params"])), {})
    return {key: value for key, value in group.items() if key not in ("params", "fused", "foreach")}
