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
        most: Number of entries, those to keep included, where ``limit`` is for the others alone.
    """

    def __init__(self, limit: int, keep: Callable[[V], bool] | None = None, most: int | None = None) -> None:
        self._limit, self._keep, self._most = limit, keep, most
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
        free = [k for k, v in self._entries.items() if not (self._keep and self._keep(v))]
        counted = len(self._entries) if self._most is None else len(free)
        if counted >= self._limit or len(self._entries) >= (self._most or self._limit):
            del self._entries[next(iter(free), next(iter(self._entries)))]
        self._entries[key] = value
        return value

    def values(self) -> list[V]:
        """Return all values, the latest one last."""
        return list(self._entries.values())
