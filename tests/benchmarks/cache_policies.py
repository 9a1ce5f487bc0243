"""Caches over bytes that only count: what `scheduler_replay` compares policies on. Nothing is stored."""

from collections import OrderedDict
from collections.abc import Hashable


class LruCache:
    """Bytes; least recently used goes first."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0
        self._entries: OrderedDict[Hashable, int] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def names(self) -> list[Hashable]:
        """Of everything in the cache."""
        return list(self._entries)

    def request(self, key: Hashable, size: int) -> bool:
        """Whether it was there; it is afterwards."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return True
        self._entries[key] = size
        self.used += size
        while self.used > self.capacity and self._entries:
            self.used -= self._entries.popitem(last=False)[1]
        return False


class S3FifoCache:
    """S3-FIFO (Yang et al., SOSP 2023) over bytes: a tenth for newcomers, a main queue, a memory of who left."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.small_capacity = capacity, capacity // 10
        self._small: OrderedDict[Hashable, int] = OrderedDict()
        self._main: OrderedDict[Hashable, int] = OrderedDict()
        self._ghost: OrderedDict[Hashable, None] = OrderedDict()
        self._hits: dict[Hashable, int] = {}
        self.small_used = self.main_used = 0

    def request(self, key: Hashable, size: int) -> bool:
        """Whether it was there; it is afterwards."""
        if key in self._hits:
            self._hits[key] = min(3, self._hits[key] + 1)
            return True
        while self.small_used + self.main_used + size > self.capacity and self._hits:
            self._evict()
        self._hits[key] = 0
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = size
            self.main_used += size
        else:
            self._small[key] = size
            self.small_used += size
        return False

    def _evict(self) -> None:
        if self._small and (self.small_used > self.small_capacity or not self._main):
            key, size = self._small.popitem(last=False)
            self.small_used -= size
            if self._hits[key] > 1:
                self._hits[key] = 0
                self._main[key] = size
                self.main_used += size
                return
            self._ghost[key] = None
            while len(self._ghost) > max(1, len(self._main)):
                self._ghost.popitem(last=False)
        else:
            key, size = self._main.popitem(last=False)
            if self._hits[key] > 0:
                self._hits[key] -= 1
                self._main[key] = size
                return
            self.main_used -= size
        del self._hits[key]
