"""Workers, LoRAs and people on a clock that is only counted: what `scheduler_replay` plays its traces on.

Whose turn it is decides the production class `jobs.scheduling.Scheduler`; nothing here sleeps, stores or computes.
"""

import heapq
import itertools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from jobs.scheduling import Candidate, Owner, Running, Scheduler, decayed
from jobs.status import JobKind

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
SEEN_PER_OWNER = 2
PREFETCHED_JOBS = 4
"""The first jobs of the line whose LoRAs a worker fetches while it works."""


@dataclass(frozen=True)
class Arrival:
    """One request: when (s), whose, with which LoRA."""

    at: float
    owner: int
    lora: int


@dataclass(frozen=True)
class Served:
    """One request that ended; seconds."""

    arrival: Arrival
    started: float
    ended: float

    @property
    def wait(self) -> float:
        return self.started - self.arrival.at

    @property
    def latency(self) -> float:
        return self.ended - self.arrival.at


@dataclass
class Worker:
    """A device with room for some LoRAs (least recently used goes first) and threads that fetch."""

    slots: int
    resident: OrderedDict[int, None] = field(default_factory=OrderedDict)
    fetching: dict[int, float] = field(default_factory=dict)
    """LoRA: when it will be here, s."""
    busy: bool = False

    def hold(self, lora: int) -> None:
        self.resident[lora] = None
        self.resident.move_to_end(lora)
        while len(self.resident) > self.slots:
            self.resident.popitem(last=False)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What a trace runs on. Seconds.

    Attributes:
        fair: The production rules; otherwise first come, first served.
        prefetch: LoRAs of the first waiting jobs are fetched while a worker works.
        shared: The workers are of one node and share what all of them hold; otherwise each has its own.
        limit: Jobs of one person at once under the fair rules.
    """

    workers: int = 4
    slots: int = 16
    service: float = 4.3
    miss: float = 1.5
    swap: float = 0.005
    fair: bool = True
    prefetch: bool = True
    shared: bool = False
    limit: int = 4


class Simulation:
    """One run of a trace."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.workers = [Worker(fleet.slots) for _ in range(fleet.workers)]
        if fleet.shared:
            node = Worker(fleet.workers * fleet.slots)
            self.workers = [Worker(node.slots, node.resident, node.fetching) for _ in range(fleet.workers)]
        self.now = 0.0
        self._line: dict[int, deque[tuple[int, Arrival]]] = defaultdict(deque)
        self._running: dict[int, Running] = {}
        self._used: dict[int, tuple[float, float]] = {}
        self._events: list[tuple[float, int, str, Any]] = []
        self._numbers = itertools.count()

    def run(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Everything that arrived, in the order in which it ended."""
        done: list[Served] = []
        for arrival in arrivals:
            self._at(arrival.at, "arrival", arrival)
        while self._events:
            self.now, number, what, about = heapq.heappop(self._events)
            if what == "arrival":
                self._line[about.owner].append((number, about))
            elif what == "fetched":
                worker, lora = about
                worker.fetching.pop(lora, None)
                worker.hold(lora)
            else:
                worker, key, served = about
                worker.busy = False
                self._count(served.arrival.owner, served.ended - served.started)
                del self._running[key]
                done.append(served)
            for worker in self.workers:
                if not worker.busy:
                    self._start(worker)
            if self.fleet.prefetch:
                self._fetch_ahead()
        return done

    def _at(self, when: float, what: str, about: Any) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what, about))

    def _start(self, worker: Worker) -> None:
        first = next(iter(self._order(worker, 1)), None)
        if first is None:
            return
        number, job = first
        self._line[job.owner].remove(first)
        if not self._line[job.owner]:
            del self._line[job.owner]
        if job.lora in worker.resident:
            ready = self.fleet.swap
        else:
            ready = worker.fetching.get(job.lora, self.now + self.fleet.miss) - self.now + self.fleet.swap
        worker.hold(job.lora)
        worker.busy = True
        self._running[number] = Running(
            owner_id=UUID(int=job.owner),
            kind=JobKind.GENERATE,
            started_at=_moment(self.now),
            estimated_seconds=self.fleet.service,
        )
        end = self.now + ready + self.fleet.service
        self._at(end, "ended", (worker, number, Served(job, self.now, end)))

    def _order(self, worker: Worker, count: int) -> list[tuple[int, Arrival]]:
        """The first of the line as this worker would take them."""
        if not self.fleet.fair:
            heads = heapq.merge(*(itertools.islice(own, count) for own in self._line.values()))
            return list(itertools.islice(heads, count))
        seen = {
            entry[0]: entry
            for own in self._line.values()
            for entry in itertools.islice(own, max(count, SEEN_PER_OWNER))
        }
        if not seen:
            return []
        now = _moment(self.now)
        scheduler = Scheduler(
            now=now,
            owners={
                UUID(int=owner): Owner(used_seconds=decayed(used, _moment(at), now), served_at=_moment(at))
                for owner, (used, at) in self._used.items()
                if owner in self._line
            },
            running=tuple(self._running.values()),
            limits={JobKind.GENERATE: self.fleet.limit},
            warm_loras=frozenset(map(str, worker.resident)),
        )
        candidates = [
            Candidate(
                job_id=UUID(int=number),
                owner_id=UUID(int=job.owner),
                created_at=_moment(job.at),
                queued_at=_moment(job.at),
                loras=(str(job.lora),),
                estimated_seconds=self.fleet.service,
            )
            for number, job in seen.values()
        ]
        return [seen[job.job_id.int] for job in itertools.islice(scheduler.order(candidates), count)]

    def _fetch_ahead(self) -> None:
        for worker in self.workers:
            if not worker.busy or not self._line:
                continue
            for _, job in self._order(worker, PREFETCHED_JOBS):
                if job.lora not in worker.resident and job.lora not in worker.fetching:
                    worker.fetching[job.lora] = self.now + self.fleet.miss
                    self._at(self.now + self.fleet.miss, "fetched", (worker, job.lora))

    def _count(self, owner: int, seconds: float) -> None:
        used, at = self._used.get(owner, (0.0, self.now))
        self._used[owner] = (decayed(used, _moment(at), _moment(self.now)) + seconds, self.now)


def _moment(seconds: float) -> datetime:
    return BEGIN + timedelta(seconds=seconds)


class LruCache:
    """Bytes; least recently used goes first."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0
        self._entries: OrderedDict[Hashable, int] = OrderedDict()

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
