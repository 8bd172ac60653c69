"""Recurrent layers under ``torch.func.vmap``, which has no rule for their kernels: they run row after row."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

_KERNELS = frozenset(
    f"{kind}{end}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for end in ("", "_cell")
)  # as torch calls them; those of packed sequences have the same names


class RecurrentByRow(TorchFunctionMode):
    """Inside a map, run the kernel of a recurrent layer once for each row, and all else as one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _KERNELS or torch._C._functorch.peek_interpreter_stack() is None:
            return func(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]

        def run(*tensors: Tensor) -> Any:
            given = iter(tensors)
            filled = [next(given) if tensor else leaf for leaf, tensor in zip(leaves, is_tensor, strict=True)]
            args, kwargs = tree_unflatten(filled, spec)
            return func(*args, **kwargs)

        return _ByRow.apply(run, *[leaf for leaf, tensor in zip(leaves, is_tensor, strict=True) if tensor])


class _ByRow(torch.autograd.Function):
    """A function of tensors whose rule for a map is a loop; without one it is never differentiated."""

    @staticmethod
    def forward(run: Callable[..., Any], *tensors: Tensor) -> Any:
        return run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, run: Callable[..., Any], *tensors: Tensor) -> Any:
        rows = [
            run(
                *[
                    tensor if dim is None else tensor.select(dim, i)
                    for tensor, dim in zip(tensors, in_dims[1:], strict=True)
                ]
            )
            for i in range(info.batch_size)
        ]
        if isinstance(rows[0], Tensor):
            return torch.stack(rows), 0
        return tuple(torch.stack(each) for each in zip(*rows, strict=True)), (0,) * len(rows[0])
