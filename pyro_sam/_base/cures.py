"""Errors of Pyro and torch that first mistakes end in, told again with what to change."""

import re
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_sam._base.replicas import PerReplica

P = ParamSpec("P")
R = TypeVar("R")

NO_LATENTS = (
    "The model has no latent site to infer: sample a latent in it, or call a network that has priors on its weights, "
    "pyro_sam.BayesianModule(net), where it calls a plain nn.Module now."
)
_NAMES = ("first", "second", "third", "fourth", "fifth", "sixth")


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that runs a user's model, so that known errors say what to change.

    They become a ValueError with the cure, raised from the original, which points at the user's own line.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (ValueError, RuntimeError, TypeError) as error:
            cure = find_cure(str(error), Data([*args, *kwargs.values()]))
            if cure is None or cure in str(error):  # a function within has said so
                raise
            raise ValueError(f"{_headline(str(error))}\n{cure}") from error

    return call


class Data:
    """The tensors and arrays among the arguments of a model, to tell what is wrong with them."""

    def __init__(self, args: Any) -> None:
        leaves = [_by_row(leaf) for leaf in tree_flatten(args)[0]]
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.has_numpy = any(type(leaf).__module__ == "numpy" for leaf in leaves)

    @property
    def rows(self) -> int | None:
        """Number of rows of the first tensor."""
        return next((len(tensor) for tensor in self.tensors if tensor.dim()), None)

    def not_finite(self) -> str | None:
        """Return where NaN or infinity stands, if anywhere."""
        for name, tensor in self._named():
            if not tensor.is_floating_point() or tensor.is_meta:
                continue
            wrong = (~tensor.isfinite()).nonzero()
            if len(wrong):
                rows = wrong[:, 0].unique().tolist() if tensor.dim() else []
                where = f" in row {rows[0]}" + (f" and {len(rows) - 1} more" if rows[1:] else "") if rows else ""
                return f"the {name} tensor, shape {tuple(tensor.shape)}, has NaN or infinity{where}"
        return None

    def __str__(self) -> str:
        return "; ".join(
            f"the {name} tensor has shape {tuple(t.shape)}, dtype {str(t.dtype).removeprefix('torch.')}, device "
            f"{t.device}{value_range(t)}"
            for name, t in self._named()
        )

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for i, tensor in enumerate(self.tensors):
            yield _NAMES[i] if i < len(_NAMES) else f"{i + 1}th", tensor


def _by_row(leaf: Any) -> Any:
    """Return an argument that each replica has its own rows of as one tensor, rows first."""
    return leaf.values.movedim(0, min(1, leaf.values.dim() - 1)) if isinstance(leaf, PerReplica) else leaf


def find_cure(error: str, data: Data) -> str | None:
    """Return what to change, for an error's text and the arguments that led to it; None for an unknown error."""
    for pattern, cure in _CURES:
        found = re.search(pattern, error, re.DOTALL)
        if found and (text := cure(found, data)):
            return text
    return None


def _no_rows(found: re.Match[str], data: Data) -> str | None:
    return (
        "The batch is empty: its first tensor has no rows. Look at what the loader gives, and skip such batches."
        if data.rows == 0
        else None
    )


def _plate_size(found: re.Match[str], data: Data) -> str:
    plate, site, size, given = found["plate"], found["site"], int(found["size"]), int(found["given"])
    minibatch = (
        f"give the plate the size of the whole data set and the rows of this batch: pyro.plate('{plate}', N, "
        "subsample_size=len(x))"
    )
    event = f"declare the dimension of size {given} as part of one data point: dist.Normal(...).to_event(1)"
    says = f"Plate '{plate}' takes {size} rows at a time, but site '{site}' has {given} along that dimension: "
    if given == data.rows:
        return f"{says}{minibatch}."
    return f"{says}{event}." if size == data.rows else f"{says}{minibatch}; or {event}."


def _log_prob_shape(found: re.Match[str], data: Data) -> str:
    site, expected, actual = (found[key].replace(" ", "") for key in ("site", "expected", "actual"))
    want, got = ([int(n) for n in text.split(",") if n] for text in (expected, actual))
    if len(got) > len(want) and got[len(got) - len(want) :] == want and want and got[-2] == want[-1]:
        return (
            f"The observations of site '{site}' and its distribution were broadcast against each other: one has shape "
            f"({want[-1]},), the other ({want[-1]}, 1). Take the extra dimension away, as in bnn(x).squeeze(-1) or "
            "y.squeeze(-1)."
        )
    if got and got[-1] == data.rows and not want:
        return (
            f"Site '{site}' has a value for each of the {data.rows} rows, outside of a plate: sample it inside of "
            "with pyro.plate('data', N, subsample_size=len(x)), N being the size of the whole data set."
        )
    return (
        f"Dimensions of site '{site}' are in no plate. If they belong to one value, such as a vector of weights, "
        f"declare them: dist.Normal(...).to_event({max(len(got) - len(want), 1)}). If they run over data, sample it "
        "inside of with pyro.plate('data', N, subsample_size=len(x))."
    )


def _value(found: re.Match[str], data: Data) -> str:
    if where := data.not_finite():
        return f"In the batch {where}: clean the data, or leave such rows out."
    support, kind = found["support"], found["kind"]
    classes = re.search(r"upper_bound=(\d+)", support)
    if "Categorical" in kind and classes:
        rule = (
            f"must be whole numbers from 0 to {classes[1]}, because the network has {int(classes[1]) + 1} outputs. "
            "Number the classes from 0, or give the network one output per class"
        )
    elif "Bernoulli" in kind:
        rule = "must be 0 or 1"
    else:
        rule = f"of a {kind} must be in {support}"
    return f"Labels or observations {rule}. Given: {data}."


def _parameter(found: re.Match[str], data: Data) -> str | None:
    if where := data.not_finite():
        return f"In the batch {where}: clean the data, or leave such rows out."
    if "nan" in found["rest"]:
        return (
            "The batch is finite, so the parameters are not: an earlier step diverged. Lower the learning rate or rho, "
            "clip gradients, and start from fresh parameters."
        )
    if found["name"] == "probs":
        return f"Outputs of a network are no probabilities: give them as logits, dist.{found['kind']}(logits=...)."
    return None


def _broadcast(found: re.Match[str], data: Data) -> str:
    return (
        f"The observations have another shape than their distribution. Labels of a Categorical are whole numbers, one "
        f"per row, not one-hot rows: give y.argmax(-1), or use OneHotCategorical. Given: {data}."
    )


def _numpy(found: re.Match[str], data: Data) -> str | None:
    return "Pyro and torch take tensors, not NumPy arrays: give torch.as_tensor(x)." if data.has_numpy else None


def _dtype(found: re.Match[str], data: Data) -> str | None:
    if not data.tensors:
        return None
    return (
        f"Data and parameters differ in dtype: convert the inputs to the network's, as in x.to(torch.float32), and "
        f"observations of Bernoulli, Normal and other real likelihoods to floating point, y.float(). Given: {data}."
    )


def _device(found: re.Match[str], data: Data) -> str:
    return (
        "Data, network and guide are on different devices. Move the network first, net.to(device), and only then make "
        "the guide, whose parameters go where the network is (after pyro.clear_param_store(), if there was one "
        f"before); give each batch as x.to(device). Given: {data}."
    )


def _unobserved(found: re.Match[str], data: Data) -> str:
    site = found["site"]
    return (
        f"Site '{site}' was not observed when the guide was started. If it holds the labels, pass them: obs=y in the "
        f"model, and guide(x, y) or svi.step(x, y), not guide(x). If '{site}' is a discrete latent, have it summed out "
        "by pyro.infer.config_enumerate."
    )


def _no_latents(found: re.Match[str], data: Data) -> str:
    return NO_LATENTS


def _subsample(found: re.Match[str], data: Data) -> str:
    return (
        "A plate was given more rows than its size. Its size is that of the whole data set, at least len(x); for new "
        "data let the model use len(x) where there are no labels: pyro.plate('data', N if y is not None else len(x), "
        "subsample_size=len(x))."
    )


_CURES: list[tuple[str, Callable[[re.Match[str], Data], str | None]]] = [
    (r"", _no_rows),
    (
        r"Shape mismatch inside plate\('(?P<plate>.+?)'\) at site (?P<site>\S+) dim -?\d+, "
        r"(?P<size>\d+) vs (?P<given>\d+)",
        _plate_size,
    ),
    (
        r'at site "(?P<site>.+?)", invalid log_prob shape\s+Expected \[(?P<expected>[^]]*)\], '
        r"actual \[(?P<actual>[^]]*)\]",
        _log_prob_shape,
    ),
    (
        r"Expected value argument .*? to be within the support \((?P<support>.+?)\) of the distribution "
        r"(?P<kind>\w+)\(",
        _value,
    ),
    (r"Expected parameter (?P<name>\w+) .*? of distribution (?P<kind>\w+)\((?P<rest>.*)", _parameter),
    (r"Value is not broadcastable with batch_shape\+event_shape", _broadcast),
    (r"must be (a )?Tensor", _numpy),
    (r"must have the same dtype|can't be cast to the desired output type|expected scalar type|same dtype", _dtype),
    (r"on the same device|is not on the expected device|same device as|but found at least two devices", _device),
    (r"Continuous inference cannot handle discrete sample site '(?P<site>.+?)'", _unobserved),
    (r"found no latent variables", _no_latents),
    (r"subsample_size does not match len\(subsample\)", _subsample),
]


def _headline(error: str) -> str:
    """Return an error's text without the values and the shapes of all sites, which fill the screen."""
    return re.split(r"\nTrace Shapes:|(?<=found invalid values):", error)[0].strip()


def value_range(tensor: Tensor) -> str:
    """Return where a tensor's values lie, for a message; empty where that cannot be said."""
    if tensor.is_meta or not tensor.numel() or tensor.is_complex():
        return ""
    return f", values from {tensor.amin().item():g} to {tensor.amax().item():g}"
