"""Keep the buffers of every module that runs, such as BatchNorm's running statistics, as they were."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class Buffers:
    """The buffers of modules, as they were before.

    Modules are found as they are called, so a model may be any function, with modules anywhere in it.

    Args:
        modules: Modules whose buffers may change though they are not called, as by another method of theirs.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._before: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}
        self._modules = [module for module in modules if module._buffers]
        self._hook: Any = None

    def watch(self) -> None:
        """Look at modules that are called from now on."""
        for module in self._modules:
            self._save(module, ())
        self._hook = register_module_forward_pre_hook(self._save)

    def look_away(self) -> None:
        """Look no more: torch calls modules faster that nobody watches."""
        if self._hook is not None:
            self._hook.remove()

    def restore(self) -> None:
        """Put back what the buffers were."""
        for (module, name), (buffer, value) in self._before.items():
            # through .data: a graph that saved the buffer must not take this for a change
            if not _is_expanded(buffer):  # nobody can have written into it
                buffer.data.copy_(value)
            module._buffers[name] = buffer

    def now(self) -> dict[tuple[nn.Module, str], Tensor | None]:
        """Return what the buffers of the modules that were called are now, as copies."""
        present = {key: key[0]._buffers.get(key[1]) for key in self._before}
        return {key: None if buffer is None else buffer.detach().clone() for key, buffer in present.items()}

    def _save(self, module: nn.Module, args: Any) -> None:
        for name, buffer in module._buffers.items():
            if buffer is not None and (module, name) not in self._before:
                self._before[module, name] = (buffer, buffer.detach().clone())


def _is_expanded(tensor: Tensor) -> bool:
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


@contextmanager
def called_modules() -> Iterator[dict[nn.Module, None]]:
    """Collect the modules that the body calls."""
    modules: dict[nn.Module, None] = {}
    hook = register_module_forward_pre_hook(lambda module, args: modules.update({module: None}))
    try:
        yield modules
    finally:
        hook.remove()


@contextmanager
def kept_buffers(modules: Iterable[nn.Module] = (), *, on_error_only: bool = False) -> Iterator[Buffers]:
    """Undo what the body does to the buffers of the modules that it calls.

    Args:
        modules: Modules to keep as well though they are not called.
        on_error_only: Keep the body's changes unless it raises.
    """
    buffers = Buffers(modules)
    buffers.watch()
    try:
        yield buffers
    except BaseException:
        buffers.restore()
        raise
    else:
        if not on_error_only:
            buffers.restore()
    finally:
        buffers.look_away()
