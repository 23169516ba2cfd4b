"""A priority queue whose items can be moved and taken out."""

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=Hashable)
Key = tuple[Any, ...]


class Heap(Generic[T]):
    """Items by key, the least first; of equal keys, the one put first. `put` and `remove` are O(log n) amortised."""

    def __init__(self) -> None:
        self._entries: list[tuple[Key, int, T]] = []  # some are out of date: `_current` tells
        self._current: dict[T, tuple[Key, int]] = {}
        self._puts = 0

    def __len__(self) -> int:
        return len(self._current)

    def __contains__(self, item: T) -> bool:
        return item in self._current

    def __iter__(self) -> Iterator[T]:
        """In no order that means anything, but in the same one for the same history."""
        return iter(self._current)

    def key(self, item: T) -> Key:
        return self._current[item][0]

    def put(self, item: T, key: Key) -> None:
        """Add an item, or move it."""
        known = self._current.get(item)
        if known is not None and known[0] == key:
            return
        self._puts += 1
        self._current[item] = key, self._puts
        heappush(self._entries, (key, self._puts, item))
        self._tidy()

    def remove(self, item: T) -> None:
        """Idempotent."""
        if self._current.pop(item, None) is not None:
            self._tidy()

    def first(self) -> T | None:
        """The item of the least key."""
        while self._entries:
            key, number, item = self._entries[0]
            if self._current.get(item) == (key, number):
                return item
            heappop(self._entries)
        return None

    def _tidy(self) -> None:
        """Keep memory in proportion to the items, whatever comes and goes beneath the first."""
        if len(self._entries) > 2 * len(self._current) + 32:
            self._entries = [(key, number, item) for item, (key, number) in self._current.items()]
            heapify(self._entries)
