"""Which file of a cache goes first: a pure rule over names and sizes, without files, clocks or randomness.

The cache of a node (`core/file_cache.py`), the simulator and the benchmarks drive this very class.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

REMEMBERED_REQUESTS = 8
"""Of each name. The last eight of a popular one are young, so that its fall shows soon; a rare one's tell its rate."""
NEWCOMER_DISCOUNT = 0.8
"""One request says little: it counts 0.2, the second 1.2. What is asked for once leaves before what came back."""
GRACE_SHARE = 0.25
"""Ages are counted from this share of the number of entries, or the newest would always be the most popular."""


@dataclass
class _Entry:
    """A name that is in the cache, or was."""

    size: int = 0
    requests: deque[int] = field(default_factory=lambda: deque(maxlen=REMEMBERED_REQUESTS))
    """Numbers of its last requests, oldest first."""
    is_expected: bool = False
    """Fetched ahead: the request that it was fetched for is still to come."""


class CachePolicy:
    """Keeps the names that are asked for most often per request of all, judged by each one's last requests.

    The score is `(n - 0.8) / (age of the oldest of its last n <= 8 requests + grace)`, the lowest goes first: LRU-K
    (O'Neil et al., SIGMOD 1993) with the rate estimate of hyperbolic caching (Blankstein et al., ATC 2017). So a scan
    of names that are asked for once pushes nothing out, and last week's favourite leaves. Sizes do not enter the
    score: a byte kept is worth the rate of its file, whatever the size. As many names as are in the cache are
    remembered after they left (the ghosts), so that one that comes back is no stranger.

    Args:
        capacity: Bytes; may be changed at any time.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        """Bytes of everything in the cache."""
        self._now = 0
        self._held: dict[str, _Entry] = {}
        self._ghosts: OrderedDict[str, _Entry] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)

    def names(self) -> list[str]:
        """Of everything in the cache."""
        return list(self._held)

    def size_of(self, name: str) -> int:
        """Bytes of an entry; 0 when it is not in the cache."""
        entry = self._held.get(name)
        return entry.size if entry else 0

    def touch(self, name: str) -> bool:
        """One request. Whether it is in the cache; a name that is not is remembered only by `admit`."""
        entry = self._held.get(name)
        if entry is None:
            return False
        self._count(entry)
        return True

    def admit(self, name: str, size: int, *, ahead: bool = False) -> None:
        """It is in the cache from now on, with the request that brought it; the caller has made room.

        Args:
            size: Bytes, >= 0. Admitting again corrects the size.
            ahead: Nobody has asked for it yet; its first request will not count twice.
        """
        self.forget(name)
        entry = self._ghosts.pop(name, None) or _Entry()
        self._count(entry)
        entry.size, entry.is_expected = size, ahead
        self._held[name] = entry
        self.used += size

    def forget(self, name: str) -> None:
        """It is not in the cache any more; harmless when it was not."""
        entry = self._held.pop(name, None)
        if entry is None:
            return
        self.used -= entry.size
        if entry.is_expected:
            entry.is_expected = False
            entry.requests.pop()
        if entry.requests:
            self._ghosts[name] = entry
        while len(self._ghosts) > len(self._held) + 1:
            self._ghosts.popitem(last=False)

    def victims(self) -> Iterator[str]:
        """Everything in the cache, what should go first first. Found one by one; the caller may pass some over."""
        grace = GRACE_SHARE * len(self._held)
        heap = [(self._score(entry, grace), name) for name, entry in self._held.items()]
        heapq.heapify(heap)
        while heap:
            yield heapq.heappop(heap)[1]

    def room_for(self, size: int) -> list[str]:
        """The names that must go so that `size` more bytes fit, where nothing is in use."""
        chosen, left = [], self.used
        if left + size > self.capacity:
            for name in self.victims():
                chosen.append(name)
                left -= self._held[name].size
                if left + size <= self.capacity:
                    break
        return chosen

    def request(self, name: str, size: int, *, ahead: bool = False) -> bool:
        """Whether it was there; it is afterwards. For simulations: real files are fetched between the two."""
        if name in self._held:
            return ahead or self.touch(name)
        for victim in self.room_for(size):
            self.forget(victim)
        self.admit(name, size, ahead=ahead)
        return False

    def dump(self) -> dict[str, Any]:
        """Everything as JSON values."""
        held = [[name, e.size, list(e.requests), e.is_expected] for name, e in self._held.items()]
        return {"now": self._now, "held": held, "ghosts": [[n, list(e.requests)] for n, e in self._ghosts.items()]}

    @classmethod
    def load(cls, state: dict[str, Any], capacity: int) -> "CachePolicy":
        """What `dump` gave.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        policy = cls(capacity)
        policy._now = int(state["now"])
        for name, size, requests, is_expected in state["held"]:
            policy._held[str(name)] = _Entry(int(size), _numbers(requests), bool(is_expected))
        policy._ghosts = OrderedDict((str(name), _Entry(0, _numbers(requests))) for name, requests in state["ghosts"])
        policy.used = sum(entry.size for entry in policy._held.values())
        return policy

    def _count(self, entry: _Entry) -> None:
        self._now += 1
        if entry.is_expected:
            entry.requests.pop()  # Of the fetch; this is the request that it was for.
            entry.is_expected = False
        entry.requests.append(self._now)

    def _score(self, entry: _Entry, grace: float) -> float:
        return (len(entry.requests) - NEWCOMER_DISCOUNT) / (self._now - entry.requests[0] + grace)


def _numbers(requests: list[int]) -> deque[int]:
    return deque(map(int, requests), maxlen=REMEMBERED_REQUESTS)
