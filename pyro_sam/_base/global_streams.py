"""Python's and NumPy's global random streams: whether they move, found out at a tenth of what a copy of them costs."""

import ctypes
import random
from typing import Any

import numpy as np

from pyro_sam._base.random_state import Streams

_WORDS = 624 * 4 + 4  # bytes of a Mersenne twister


class GlobalStreams:
    """Where the two streams were at a mark, so that a step can find out that it drew from them, and begin again."""

    def __init__(self) -> None:
        self._python: Any = None
        self._numpy: Any = None
        self._words = b""

    def mark(self) -> None:
        """Note where they are now."""
        self._python, words = random.getstate(), _words()
        # half a pair of normals that NumPy keeps can go without a word of it moving
        if self._numpy is None or words != self._words or self._numpy["has_gauss"]:
            self._words, self._numpy = words, np.random.get_state(legacy=False)  # noqa: NPY002

    def moved(self) -> Streams:
        """Return which of them have moved; of two draws from NumPy's at least one shows."""
        return Streams(python=random.getstate() != self._python, numpy=_words() != self._words)

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002


def _words() -> bytes:
    """Return what NumPy's stream draws from, read off its memory."""
    generator: Any = np.random.mtrand._rand._bit_generator
    if type(generator) is not np.random.MT19937:
        return repr(generator.state).encode()
    return ctypes.string_at(generator.ctypes.state_address, _WORDS)
