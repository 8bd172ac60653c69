"""The allocator keeps what a study frees, so that the next step does not fault it in again."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from pyro_sam.study import allocator

_FAULTS = """
import resource, sys, torch
from pyro_sam.study.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
[torch.ones(2_000_000) for _ in range(16)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    [torch.ones(2_000_000) for _ in range(16)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str) -> int:
    run = subprocess.run([sys.executable, "-c", _FAULTS, word], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_not_faulted_in_again() -> None:
    pages = 16 * 2_000_000 * 4 // 4096
    assert faults("keep") < 2 * pages
    assert faults("not") > 5 * pages  # of ten times


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: SimpleNamespace())
    assert not allocator.keep_freed_memory()  # a C library without mallopt
