"""Keep the buffers of every module that runs, such as BatchNorm's running statistics, as they were."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def kept_buffers(*, on_error_only: bool = False) -> Iterator[Callable[[], None]]:
    """Undo what the body does to the buffers of the modules that it calls; gives a function that does so early.

    Modules are found as they are called, so a model may be any function, with modules anywhere in it.

    Args:
        on_error_only: Keep the body's changes unless it raises.
    """
    before: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}

    def save(module: nn.Module, args: Any) -> None:
        for name, buffer in module._buffers.items():
            if buffer is not None and (module, name) not in before:
                before[module, name] = (buffer, buffer.detach().clone())

    hook = register_module_forward_pre_hook(save)
    try:
        yield lambda: _restore(before)
    except BaseException:
        _restore(before)
        raise
    else:
        if not on_error_only:
            _restore(before)
    finally:
        hook.remove()


def _restore(before: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]]) -> None:
    for (module, name), (buffer, value) in before.items():
        # through .data: a graph that saved the buffer must not take this for a change
        buffer.data.copy_(value)
        module._buffers[name] = buffer
