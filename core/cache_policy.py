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
SHIFTING, STEADY = (0.8, 0.25), (0.9, 1.0)
"""(Discount, grace) for times in which favourites change, and for others: what one request counts less than 1, and
from which share of the number of entries on ages are counted. The first lets newcomers stay for longer to show what
they are worth; the second asks for more requests before one takes the place of an old favourite."""
FORGETS_AFTER = 3000
"""Requests after which a miss of the two rules weighs a third in their comparison."""


@dataclass
class _Entry:
    """A name that is in the cache, or was."""

    size: int = 0
    requests: deque[int] = field(default_factory=lambda: deque(maxlen=REMEMBERED_REQUESTS))
    """Numbers of its last requests, oldest first."""
    is_expected: bool = False
    """Fetched ahead: the request that it was fetched for is still to come."""


class _Rates:
    """Names in a cache, judged by one rule.

    The score is `(n - discount) / (age of the oldest of its last n <= 8 requests + grace)`, the lowest goes first.
    """

    def __init__(self, rule: tuple[float, float]) -> None:
        self.rule = rule
        self.used = 0
        self.now = 0
        self.held: dict[str, _Entry] = {}
        self.ghosts: OrderedDict[str, _Entry] = OrderedDict()

    def touch(self, name: str) -> bool:
        entry = self.held.get(name)
        if entry is not None:
            self._count(entry)
        return entry is not None

    def admit(self, name: str, size: int, *, ahead: bool = False) -> None:
        self.forget(name)
        entry = self.ghosts.pop(name, None) or _Entry()
        self._count(entry)
        entry.size, entry.is_expected = size, ahead
        self.held[name] = entry
        self.used += size

    def forget(self, name: str) -> None:
        entry = self.held.pop(name, None)
        if entry is None:
            return
        self.used -= entry.size
        if entry.is_expected:
            entry.is_expected = False
            entry.requests.pop()
        if entry.requests:
            self.ghosts[name] = entry
        while len(self.ghosts) > len(self.held) + 1:
            self.ghosts.popitem(last=False)

    def victims(self) -> Iterator[str]:
        discount, grace = self.rule[0], self.rule[1] * len(self.held)
        heap = [
            ((len(entry.requests) - discount) / (self.now - entry.requests[0] + grace), name)
            for name, entry in self.held.items()
        ]
        heapq.heapify(heap)
        while heap:
            yield heapq.heappop(heap)[1]

    def room_for(self, size: int, capacity: int) -> list[str]:
        chosen, left = [], self.used
        if left + size > capacity:
            for name in self.victims():
                chosen.append(name)
                left -= self.held[name].size
                if left + size <= capacity:
                    break
        return chosen

    def request(self, name: str, size: int, capacity: int) -> bool:
        if self.touch(name):
            return True
        for victim in self.room_for(size, capacity):
            self.forget(victim)
        self.admit(name, size)
        return False

    def dump(self) -> dict[str, Any]:
        held = [[name, e.size, list(e.requests), e.is_expected] for name, e in self.held.items()]
        return {"now": self.now, "held": held, "ghosts": [[n, list(e.requests)] for n, e in self.ghosts.items()]}

    def load(self, state: dict[str, Any]) -> None:
        self.now = int(state["now"])
        for name, size, requests, is_expected in state["held"]:
            self.held[str(name)] = _Entry(int(size), _numbers(requests), bool(is_expected))
        self.ghosts = OrderedDict((str(name), _Entry(0, _numbers(requests))) for name, requests in state["ghosts"])
        self.used = sum(entry.size for entry in self.held.values())

    def _count(self, entry: _Entry) -> None:
        self.now += 1
        if entry.is_expected:
            entry.requests.pop()  # Of the fetch; this is the request that it was for.
            entry.is_expected = False
        entry.requests.append(self.now)


class CachePolicy:
    """Keeps the names that are asked for most often per request of all, judged by each one's last requests.

    LRU-K (O'Neil et al., SIGMOD 1993) with the rate estimate of hyperbolic caching (Blankstein et al., ATC 2017):
    names that are asked for once push out no favourite, and last week's favourite leaves. Sizes do not enter the
    score, since a byte kept is worth the rate of its file, whatever the size. As many names as are in the cache are
    remembered after they left (the ghosts), so that one that comes back is no stranger. How much a newcomer counts is
    learnt: two shadows play the same requests by one rule each, and the rule that missed fewer bytes of late decides.

    Args:
        capacity: Bytes; may be changed at any time.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._real = _Rates(SHIFTING)
        self._shadows = (_Rates(SHIFTING), _Rates(STEADY))
        self._missed = [0.0, 0.0]
        """Bytes that each shadow missed, older ones weighing less."""

    def __contains__(self, name: str) -> bool:
        return name in self._real.held

    def __len__(self) -> int:
        return len(self._real.held)

    @property
    def used(self) -> int:
        """Bytes of everything in the cache."""
        return self._real.used

    def names(self) -> list[str]:
        """Of everything in the cache."""
        return list(self._real.held)

    def size_of(self, name: str) -> int:
        """Bytes of an entry; 0 when it is not in the cache."""
        entry = self._real.held.get(name)
        return entry.size if entry else 0

    def touch(self, name: str) -> bool:
        """One request. Whether it is in the cache; a name that is not is remembered only by `admit`."""
        if not self._real.touch(name):
            return False
        self._learn(name, self._real.held[name].size)
        return True

    def admit(self, name: str, size: int, *, ahead: bool = False) -> None:
        """It is in the cache from now on, with the request that brought it; the caller has made room.

        Args:
            size: Bytes, >= 0. Admitting again corrects the size.
            ahead: Nobody has asked for it yet; its first request will not count twice.
        """
        self._real.admit(name, size, ahead=ahead)
        if not ahead:
            self._learn(name, size)

    def forget(self, name: str) -> None:
        """It is not in the cache any more; harmless when it was not."""
        self._real.forget(name)

    def victims(self) -> Iterator[str]:
        """Everything in the cache, what should go first first. Found one by one; the caller may pass some over."""
        return self._real.victims()

    def room_for(self, size: int) -> list[str]:
        """The names that must go so that `size` more bytes fit, where nothing is in use."""
        return self._real.room_for(size, self.capacity)

    def request(self, name: str, size: int, *, ahead: bool = False) -> bool:
        """Whether it was there; it is afterwards. For simulations: real files are fetched between the two."""
        if name in self:
            return ahead or self.touch(name)
        for victim in self.room_for(size):
            self.forget(victim)
        self.admit(name, size, ahead=ahead)
        return False

    def dump(self) -> dict[str, Any]:
        """Everything as JSON values."""
        shadows = [shadow.dump() for shadow in self._shadows]
        return {"missed": list(self._missed), "real": self._real.dump(), "shadows": shadows}

    @classmethod
    def load(cls, state: dict[str, Any], capacity: int) -> "CachePolicy":
        """What `dump` gave.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        policy = cls(capacity)
        policy._missed = [float(missed) for missed in state["missed"]]
        for rates, values in zip((policy._real, *policy._shadows), (state["real"], *state["shadows"]), strict=True):
            rates.load(values)
        policy._choose()
        return policy

    def _learn(self, name: str, size: int) -> None:
        for number, shadow in enumerate(self._shadows):
            missed = 0 if shadow.request(name, size, self.capacity) else size
            self._missed[number] += missed - self._missed[number] / FORGETS_AFTER
        self._choose()

    def _choose(self) -> None:
        shifting, steady = self._missed
        self._real.rule = SHIFTING if shifting <= steady else STEADY


def _numbers(requests: list[int]) -> deque[int]:
    return deque(map(int, requests), maxlen=REMEMBERED_REQUESTS)
