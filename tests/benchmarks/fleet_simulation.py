"""Workers, LoRAs and people on a clock that is only counted: what `scheduler_replay` plays its traces on.

Whose turn it is decides the production class `jobs.scheduling.Scheduler`, what a machine keeps the production class
`core.cache_policy.CachePolicy`; nothing here sleeps, stores or computes.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, cast
from uuid import UUID

from core.cache_policy import CachePolicy
from jobs.scheduling import (
    FETCH_LOOK_SECONDS,
    FETCHED_AHEAD_JOBS,
    Candidate,
    Owner,
    Running,
    Scheduler,
    decayed,
)
from jobs.status import JobKind
from tests.benchmarks.cache_policies import LruCache

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
SEEN_PER_OWNER = 2


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


class Machine:
    """A disk with room for some LoRAs, shared by all devices of the machine, and threads that fetch."""

    def __init__(self, room: int, *, ours: bool) -> None:
        self.cache: CachePolicy | LruCache = CachePolicy(room) if ours else LruCache(room)
        self.fetching: dict[str, float] = {}
        """LoRA: when it will be here, s."""
        self.wanted: frozenset[str] = frozenset()
        """Of the first jobs in line, as last seen: pinned."""

    def bring(self, lora: str, *, ahead: bool) -> None:
        """It is on the disk now. What the first jobs in line wait for is not removed, as in the real cache."""
        if isinstance(self.cache, LruCache):
            self.cache.request(lora, 1)
            return
        if lora not in self.cache:
            for victim in self.cache.victims():
                if self.cache.used + 1 <= self.cache.capacity:
                    break
                if victim not in self.wanted:
                    self.cache.forget(victim)
            self.cache.admit(lora, 1, ahead=ahead)
        elif not ahead:
            self.cache.touch(lora)


@dataclass(eq=False)
class Worker:
    """A device of a machine."""

    machine: Machine
    busy: bool = False


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What a trace runs on. Seconds.

    Attributes:
        machines: That the workers are spread over.
        room: LoRAs on a machine's disk for each of its workers.
        fair: The production rules; otherwise first come, first served.
        ours: The production policy of the cache; otherwise least recently used.
        prefetch: LoRAs of the first waiting jobs are fetched beside the work: at each look, and under the fair rules
            at once where a free worker finds only jobs whose LoRA is not here; it takes them when it has come.
        limit: Jobs of one person at once under the fair rules.
    """

    workers: int = 4
    machines: int = 1
    room: int = 16
    service: float = 4.3
    miss: float = 1.5
    swap: float = 0.005
    fair: bool = True
    ours: bool = True
    prefetch: bool = True
    limit: int = 4


class Simulation:
    """One run of a trace."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.machines = [
            Machine(fleet.room * fleet.workers // fleet.machines, ours=fleet.ours) for _ in range(fleet.machines)
        ]
        self.workers = [Worker(self.machines[number % fleet.machines]) for number in range(fleet.workers)]
        self.now = 0.0
        self.fetches = 0
        """Reads of a LoRA from S3."""
        self._line: dict[int, deque[Waiting]] = {}
        self._waiting = 0
        self._running: dict[int, Running] = {}
        self._used: dict[int, tuple[float, float]] = {}
        self._events: list[tuple[float, int, str, Any]] = []
        self._look_at = -1.0
        self._numbers = itertools.count()

    def run(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Everything that arrived, in the order in which it ended."""
        done: list[Served] = []
        for arrival in arrivals:
            self._at(arrival.at, "arrival", arrival)
        while self._events:
            self.now, number, what, about = heapq.heappop(self._events)
            if what == "fetched":
                machine, lora = about
                machine.fetching.pop(lora, None)
                machine.bring(lora, ahead=True)
            elif what == "arrival":
                self._line.setdefault(about.owner, deque()).append(
                    Waiting(number, about, self._candidate(number, about))
                )
                self._waiting += 1
            elif what == "ended":
                worker, key, served = about
                worker.busy = False
                self._count(served.arrival.owner, served.ended - served.started)
                del self._running[key]
                done.append(served)
            left = False
            for worker in self.workers:
                if self._waiting and not worker.busy:
                    left |= not self._start(worker)
            if self.fleet.prefetch and self._waiting:
                if left or what == "look":
                    self._fetch_ahead()
                if self._look_at <= self.now:
                    self._look_at = self.now + FETCH_LOOK_SECONDS
                    self._at(self._look_at, "look", None)
        return done

    def _at(self, when: float, what: str, about: Any) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what, about))

    def _start(self, worker: Worker) -> bool:
        """Whether this free worker took a job."""
        machine = worker.machine
        first = self._first(machine)
        if first is None:
            return False
        job = first.arrival
        self._line[job.owner].remove(first)
        self._waiting -= 1
        if not self._line[job.owner]:
            del self._line[job.owner]
        ready = self.fleet.swap
        if job.lora not in machine.cache:
            if job.lora not in machine.fetching:
                self.fetches += 1
                machine.fetching[job.lora] = self.now + self.fleet.miss
                self._at(self.now + self.fleet.miss, "fetched", (machine, job.lora))
            ready += machine.fetching[job.lora] - self.now
        machine.bring(job.lora, ahead=False)
        worker.busy = True
        self._running[first.number] = Running(
            owner_id=_name(job.owner),
            kind=JobKind.GENERATE,
            started_at=_moment(self.now),
            estimated_seconds=self.fleet.service,
        )
        end = self.now + ready + self.fleet.service
        self._at(end, "ended", (worker, first.number, Served(job, self.now, end)))
        return True

    def _first(self, machine: Machine) -> Waiting | None:
        """Whom a free worker of this machine takes now."""
        at_hand = frozenset(("", *machine.cache.names())) if self.fleet.fair and self.fleet.prefetch else frozenset()
        for first in self._order(self._waiting if self.fleet.fair else 1, at_hand):
            if not self._rules(at_hand).is_coming(first.candidate):
                return first
        return None

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
        short = self._waiting <= FETCHED_AHEAD_JOBS
        next_ones = itertools.chain(*self._line.values()) if short else self._order(FETCHED_AHEAD_JOBS)
        loras = [waiting.arrival.lora for waiting in next_ones]
        for machine in self.machines:
            machine.wanted = frozenset(loras)
            for lora in loras:
                if lora not in machine.cache and lora not in machine.fetching:
                    self.fetches += 1
                    machine.fetching[lora] = self.now + self.fleet.miss
                    self._at(self.now + self.fleet.miss, "fetched", (machine, lora))

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
