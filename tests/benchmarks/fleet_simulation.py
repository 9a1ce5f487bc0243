"""Workers, LoRAs and people on a clock that is only counted: what `scheduler_replay` plays its traces on.

Whose turn it is decides the production class `jobs.scheduling.Scheduler`; nothing here sleeps, stores or computes.
"""

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, cast
from uuid import UUID

from jobs.scheduling import Candidate, Owner, Running, Scheduler, decayed
from jobs.status import JobKind

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
SEEN_PER_OWNER = 2
PREFETCHED_JOBS = 4
"""The first jobs of the line (by turn, whatever is warm) whose LoRAs every worker fetches beside its work."""


@dataclass(frozen=True)
class Arrival:
    """One request: when (s), whose, with which LoRA."""

    at: float
    owner: int
    lora: str


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


class Waiting(NamedTuple):
    """A request in the line; compares by number, which is its age."""

    number: int
    arrival: Arrival
    candidate: Candidate


@dataclass
class Worker:
    """A device with room for some LoRAs (least recently used goes first) and threads that fetch."""

    slots: int
    resident: OrderedDict[str, None] = field(default_factory=OrderedDict)
    fetching: dict[str, float] = field(default_factory=dict)
    """LoRA: when it will be here, s."""
    busy: bool = False

    def hold(self, lora: str) -> None:
        self.resident[lora] = None
        self.resident.move_to_end(lora)
        while len(self.resident) > self.slots:
            self.resident.popitem(last=False)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What a trace runs on. Seconds.

    Attributes:
        fair: The production rules; otherwise first come, first served.
        prefetch: LoRAs of the first waiting jobs are fetched while a worker works; under the fair rules, while it is
            free as well, and it takes a new job when its LoRA has come.
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
        self.fetches = 0
        """Reads of a LoRA from S3."""
        self._line: dict[int, deque[Waiting]] = {}
        self._waiting = 0
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
            if what == "fetched":
                worker, lora = about
                worker.fetching.pop(lora, None)
                worker.hold(lora)
                if not self.fleet.fair or all(other.busy for other in self.workers):
                    continue
            elif what == "arrival":
                self._line.setdefault(about.owner, deque()).append(
                    Waiting(number, about, self._candidate(number, about))
                )
                self._waiting += 1
            else:
                worker, key, served = about
                worker.busy = False
                self._count(served.arrival.owner, served.ended - served.started)
                del self._running[key]
                done.append(served)
            for worker in self.workers:
                if self._waiting and not worker.busy:
                    self._start(worker)
            if self.fleet.prefetch and self._waiting:
                self._fetch_ahead()
        return done

    def _at(self, when: float, what: str, about: Any) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what, about))

    def _start(self, worker: Worker) -> None:
        first = self._first(worker)
        if first is None:
            return
        job = first.arrival
        self._line[job.owner].remove(first)
        self._waiting -= 1
        if not self._line[job.owner]:
            del self._line[job.owner]
        ready = self.fleet.swap
        if job.lora not in worker.resident:
            self.fetches += job.lora not in worker.fetching
            ready += worker.fetching.get(job.lora, self.now + self.fleet.miss) - self.now
        worker.hold(job.lora)
        worker.busy = True
        self._running[first.number] = Running(
            owner_id=_name(job.owner),
            kind=JobKind.GENERATE,
            started_at=_moment(self.now),
            estimated_seconds=self.fleet.service,
        )
        end = self.now + ready + self.fleet.service
        self._at(end, "ended", (worker, first.number, Served(job, self.now, end)))

    def _first(self, worker: Worker) -> Waiting | None:
        """Whom this free worker takes now."""
        at_hand = frozenset(worker.resident)
        first = next(iter(self._order(1, at_hand)), None)
        if first is not None and self.fleet.fair and self._rules(at_hand).is_coming(first.candidate):
            return None
        return first

    def _order(self, count: int, at_hand: frozenset[str] = frozenset()) -> list[Waiting]:
        """The first of the line: of each person's oldest, as many as a claim looks at."""
        per_owner = max(count, SEEN_PER_OWNER)
        seen = [waiting for own in self._line.values() for waiting in itertools.islice(own, per_owner)]
        if not self.fleet.fair:
            return heapq.nsmallest(count, seen)
        by_id = {waiting.candidate.job_id: waiting for waiting in seen}
        ordered = self._rules(at_hand).order([waiting.candidate for waiting in seen])
        return [by_id[candidate.job_id] for candidate in itertools.islice(ordered, count)]

    def _rules(self, at_hand: frozenset[str]) -> Scheduler:
        now = _moment(self.now)
        return Scheduler(
            now=now,
            owners={
                _name(owner): Owner(used_seconds=decayed(used, _moment(at), now), served_at=_moment(at))
                for owner, (used, at) in ((owner, self._used[owner]) for owner in self._line if owner in self._used)
            },
            running=tuple(self._running.values()),
            limits={JobKind.GENERATE: self.fleet.limit},
            warm_loras=at_hand,
        )

    def _fetch_ahead(self) -> None:
        # A line shorter than what is fetched needs no order.
        short = self._waiting <= PREFETCHED_JOBS
        next_ones = itertools.chain(*self._line.values()) if short else self._order(PREFETCHED_JOBS)
        loras = [waiting.arrival.lora for waiting in next_ones]
        for worker in self.workers:
            if worker.busy or self.fleet.fair:
                for lora in loras:
                    if lora not in worker.resident and lora not in worker.fetching:
                        self.fetches += 1
                        worker.fetching[lora] = self.now + self.fleet.miss
                        self._at(self.now + self.fleet.miss, "fetched", (worker, lora))

    def _candidate(self, number: int, arrival: Arrival) -> Candidate:
        return Candidate(
            job_id=_name(number),
            owner_id=_name(arrival.owner),
            created_at=_moment(arrival.at),
            queued_at=_moment(arrival.at),
            loras=(arrival.lora,),
            estimated_seconds=self.fleet.service,
        )

    def _count(self, owner: int, seconds: float) -> None:
        used, at = self._used.get(owner, (0.0, self.now))
        self._used[owner] = (decayed(used, _moment(at), _moment(self.now)) + seconds, self.now)


def _name(number: int) -> UUID:
    """The rules only compare and hash ids; numbers do both several times as fast as UUIDs."""
    return cast(UUID, number)


def _moment(seconds: float) -> datetime:
    return BEGIN + timedelta(seconds=seconds)
