"""The system's allocator, told to keep what is freed: a study frees and asks for the same sizes at every step."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE = 1 << 30  # bytes


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks of up to a gigabyte, which else go back to the system and are faulted in again.

    It holds for the process, so that it is for a program to do and not for a library. Elsewhere nothing is done.

    Returns:
        Whether it was done.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not of every C library
    return mallopt is not None and bool(mallopt(_TRIM_THRESHOLD, _LARGE)) and bool(mallopt(_MMAP_THRESHOLD, _LARGE))
