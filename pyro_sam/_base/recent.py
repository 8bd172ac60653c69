"""What was met lately: a dictionary that forgets what was not asked for longest."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A bounded dictionary.

    Args:
        limit: Number of entries that are kept.
        keep: Tells of a value whether to let it go only where all others are such, too.
    """

    def __init__(self, limit: int, keep: Callable[[V], bool] | None = None) -> None:
        self._limit, self._keep = limit, keep
        self._entries: dict[K, V] = {}

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        """Return whether there is such an entry."""
        return key in self._entries

    def get(self, key: K) -> V | None:
        """Return an entry, now the latest one; None if there is none."""
        if key not in self._entries:
            return None
        value = self._entries.pop(key)
        self._entries[key] = value
        return value

    def put(self, key: K, value: V) -> V:
        """Take in an entry, the latest one, and return its value."""
        self._entries.pop(key, None)
        if len(self._entries) >= self._limit:
            free = (k for k, v in self._entries.items() if not (self._keep and self._keep(v)))
            oldest = next(free, next(iter(self._entries)))
            del self._entries[oldest]
        self._entries[key] = value
        return value

    def values(self) -> list[V]:
        """Return all values, the latest one last."""
        return list(self._entries.values())
