"""Time, memory, operations and host synchronisations of a training step."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], float]

WARM_UP = 3  # steps before anything is measured
TURN = 4  # steps in a row


@dataclass(frozen=True)
class Timing:
    """Seconds per step: median, and 10th and 90th percentile."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """What one contender's step costs besides time.

    Attributes:
        held: Bytes that stay allocated between steps: parameters, the optimiser's state, gradients that are kept.
        peak: Largest number of bytes during a step, ``held`` included. The data and the network's own weights, which
            all contenders share, count in neither.
        operations: Number of aten operations that PyTorch dispatched; None for a compiled one.
        syncs: Number of times that Python read a tensor's value, and so waited for the device; None for a compiled one.
    """

    held: int
    peak: int
    operations: int | None
    syncs: int | None


class Operations(TorchDispatchMode):
    """Counts aten operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a call."""
        self.count += 1
        return func(*args, **(kwargs or {}))


class Syncs(TorchFunctionMode):
    """Counts what makes Python wait for the device: reading the value of a tensor."""

    READS = frozenset(
        [torch.equal, *(getattr(torch.Tensor, n) for n in ("item", "tolist", "__bool__", "__float__", "__int__"))]
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a call."""
        self.count += func in self.READS
        return func(*args, **(kwargs or {}))


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Have collections look only at what the body makes: they are quick, and free nothing that was there before."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def wait(device: torch.device) -> None:
    """Wait until the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(steps: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Time the steps by the wall clock, round by round, so that a machine's ups and downs meet all alike.

    In a round each contender takes its turn, in an order that changes: one step that does not count, as it finds the
    caches full of another contender's code and data, and ``TURN`` steps in a row, as in training, whose mean counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, orders = list(steps), Random(0)
    with only_new_garbage():
        gc.disable()  # else one contender pays for another's garbage
        for _ in range(rounds):
            orders.shuffle(order)
            for name in order:
                steps[name]()
                wait(device)
                start = perf_counter()
                for _ in range(TURN):
                    steps[name]()
                wait(device)
                seconds[name].append((perf_counter() - start) / TURN)
            gc.collect()
        gc.enable()
    return {name: Timing(*map(float, np.percentile(values, [50, 10, 90]))) for name, values in seconds.items()}


def allocated(work: Callable[[], Any], device: torch.device) -> tuple[Any, int, int]:
    """Return what ``work`` returns, the bytes that it left allocated, and the most that it had allocated.

    On CUDA the allocator tells. On the CPU the sum over the profiler's records of allocations and releases does.
    """
    with only_new_garbage():
        return _allocated(work, device)


def _allocated(work: Callable[[], Any], device: torch.device) -> tuple[Any, int, int]:
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        gc.collect()
        left, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return result, left - before, most - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = work()
        gc.collect()
    records: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = [e.nbytes() for e in records if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
    levels = np.cumsum([0, *sizes])
    return result, int(levels[-1]), int(levels.max())


def build(make: Callable[[], Step], device: torch.device, *, compiled: bool = False) -> tuple[Step, Figures]:
    """Build a contender, warm it up, and measure all but its time."""

    def warm() -> Step:
        step = make()
        for _ in range(WARM_UP):
            step()
        return step

    step, held, _ = allocated(warm, device)
    _, _, more = allocated(step, device)
    if compiled:
        return step, Figures(held, held + more, None, None)
    with Operations() as operations:
        step()
    with Syncs() as syncs:
        step()
    return step, Figures(held, held + more, operations.count, syncs.count)
