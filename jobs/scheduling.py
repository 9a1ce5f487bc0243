"""Whose turn it is: pure rules over plain values, shared by `jobs/claims.py` and a simulator. No database, no clock."""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from jobs.status import INTERACTIVE, JobKind

HALF_LIFE_SECONDS = 4 * 3600.0
"""Work of this long ago counts half."""
TURN_SECONDS = 10.0
"""Owners whose use differs by less count as served equally, so that a warm base and age decide between them."""
AFFINITY_SECONDS = 30.0
"""A job that waited longer is never passed over for one whose base or LoRA is warm."""
FETCH_SECONDS = 2.0
"""So long a new job whose LoRA is still being fetched lets others go first: no device waits for it."""
FETCHED_AHEAD_JOBS = 4
"""The first jobs of the line whose files are fetched while devices compute."""
FETCH_LOOK_SECONDS = 1.0
"""Between two looks at them; a worker that finds nothing but such jobs causes one at once."""
STARVING_SECONDS = 600.0
"""An owner who waits and got nothing for so long has a turn, however much was used before."""
TRAINING_PATIENCE_SECONDS = 120.0
"""A training that waited longer starts although interactive work waits."""
CHARGED_AT_START_SECONDS = 30.0
"""Of its estimate, a running job counts at most this much ahead of the time it really took."""
PICTURES_PER_BATCH = 8
"""Pictures that one forward holds."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A job that waits, as far as its turn depends on it.

    Attributes:
        was_lost: Its last try was lost or given back: somebody has waited for it before. Making room is no loss.
        priority: Higher first, among one owner's jobs.
        queued_at: When it last began to wait.
        base_fingerprint: Of the base model it needs; empty when none.
        loras: Names of the LoRAs it needs, where the caller knows which are at hand.
        pictures: That it asks for, >= 1.
    """

    job_id: UUID
    owner_id: UUID
    kind: str = JobKind.GENERATE
    was_lost: bool = False
    priority: int = 0
    created_at: datetime
    queued_at: datetime
    base_fingerprint: str = ""
    loras: tuple[str, ...] = ()
    batch_key: str = ""
    estimated_seconds: float = 0.0
    pictures: int = 1


@dataclass(frozen=True, kw_only=True)
class Running:
    """A job on a worker's device; one whose results are being stored no longer is."""

    owner_id: UUID
    kind: str
    started_at: datetime
    estimated_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Owner:
    """What one person got.

    Attributes:
        used_seconds: Worker seconds of ended tries, decayed to now.
        served_at: When a try of theirs last ended; None: never.
        weight: Share beside others, > 0.
    """

    used_seconds: float = 0.0
    served_at: datetime | None = None
    weight: float = 1.0


def decayed(worker_seconds: float, as_of: datetime, now: datetime) -> float:
    """Usage as it counts at `now`, in worker seconds."""
    return float(worker_seconds * 0.5 ** (max(0.0, (now - as_of).total_seconds()) / HALF_LIFE_SECONDS))


class Scheduler:
    """The order of turns at one moment for one worker.

    1. lost work; 2. owners who starve, longest first; 3. whose LoRA is not still being fetched; 4. the owner
    who was served least for their weight; among one owner's jobs 5. priority; then 6. a base (and LoRA) that is warm,
    7. age, 8. id. Owners at a limit are left out.

    Args:
        now: The one clock; times in the future count as now.
        owners: What each person got; nobody is missing who got something.
        running: Everything that runs now.
        limits: {kind: jobs of one person that may run at once}; other kinds have no limit.
        warm_bases: Fingerprints loaded in this worker.
        warm_loras: LoRAs at hand in this worker; empty: it does not fetch ahead, and they decide nothing.
    """

    def __init__(
        self,
        *,
        now: datetime,
        owners: Mapping[UUID, Owner] | None = None,
        running: Sequence[Running] = (),
        limits: Mapping[str, int] | None = None,
        warm_bases: frozenset[str] = frozenset(),
        warm_loras: frozenset[str] = frozenset(),
    ) -> None:
        self.now = now
        self._owners = owners or {}
        self._limits = limits or {}
        self._warm_bases, self._warm_loras = warm_bases, warm_loras
        self._counts: dict[tuple[UUID, str], int] = {}
        self._busy: set[UUID] = set()
        self._seconds: dict[UUID, float] = {}
        for job in running:
            key = (job.owner_id, job.kind)
            self._counts[key] = self._counts.get(key, 0) + 1
            self._busy.add(job.owner_id)
            charged = max(self._waited(job.started_at), min(job.estimated_seconds, CHARGED_AT_START_SECONDS))
            self._seconds[job.owner_id] = self._seconds.get(job.owner_id, 0.0) + charged

    def know_warm(self, loras: Iterable[str]) -> None:
        """More LoRAs that are at hand, of jobs seen later."""
        self._warm_loras = self._warm_loras.union(loras)

    def served(self, owner_id: UUID) -> float:
        """Worker seconds that count for this owner now, divided by the weight."""
        owner = self._owners.get(owner_id, Owner())
        return (owner.used_seconds + self._seconds.get(owner_id, 0.0)) / owner.weight

    def may_run(self, job: Candidate, *, chosen: Sequence[Candidate] = ()) -> bool:
        """Whether the owner is below the limit of this kind, `chosen` counted as running."""
        limit = self._limits.get(job.kind)
        if limit is None:
            return True
        more = sum((other.owner_id, other.kind) == (job.owner_id, job.kind) for other in chosen)
        return self._counts.get((job.owner_id, job.kind), 0) + more < limit

    def order(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Best first, found one by one. Each job that comes out counts as served for those that follow."""
        own: dict[UUID, list[Candidate]] = {}
        for job in candidates:
            if self.may_run(job):
                own.setdefault(job.owner_id, []).append(job)
        starving = {owner_id for owner_id, jobs in own.items() if self._starves(owner_id, jobs)}
        heads = []
        for owner_id, jobs in own.items():
            # Last is best, so that taking it costs nothing.
            jobs.sort(key=self._within_owner, reverse=True)
            heads.append((self._between_owners(jobs[-1], 0.0, owner_id in starving), owner_id, 0.0))
        heapq.heapify(heads)
        while heads:
            _, owner_id, ahead = heapq.heappop(heads)
            job = own[owner_id].pop()
            yield job
            if own[owner_id]:
                ahead += max(job.estimated_seconds, 1.0)
                heapq.heappush(heads, (self._between_owners(own[owner_id][-1], ahead, False), owner_id, ahead))

    def batch(
        self,
        first: Candidate,
        companions: Iterable[Candidate],
        *,
        at_most: int,
        pictures: int = PICTURES_PER_BATCH,
    ) -> list[Candidate]:
        """`first` and those that share its forward: same non-empty batch key, so many `pictures` in all, in order.

        One that was lost before runs alone: should it take its worker down again, nobody else is lost with it.

        Args:
            companions: Waiting jobs; those of another key, and `first` itself, are passed over.
            at_most: Jobs, >= 1.
        """
        chosen, asked = [first], first.pictures
        if first.batch_key and first.kind == JobKind.GENERATE and at_most > 1 and not first.was_lost:
            same = [job for job in companions if job.batch_key == first.batch_key and job.kind == first.kind]
            for job in self.order(job for job in same if not job.was_lost):
                if len(chosen) >= at_most:
                    break
                fits = asked + job.pictures <= pictures
                new = job.job_id != first.job_id and not self.is_coming(job)
                if new and fits and self.may_run(job, chosen=chosen):
                    chosen.append(job)
                    asked += job.pictures
        return chosen

    def is_coming(self, job: Candidate) -> bool:
        """Whether a LoRA of it is not at hand and there was hardly time to fetch it: a free worker may leave it, too.

        A worker that fetches ahead takes it as soon as it is there; taken now, it would hold a device that computes
        nothing. One whose LoRAs nobody names (`warm_loras` empty) never is.
        """
        if not self._warm_loras or self._warm_loras.issuperset(job.loras):
            return False
        return self._waited(job.queued_at) < FETCH_SECONDS

    def may_start(self, job: Candidate, *, interactive: Iterable[Candidate], free_workers: int) -> bool:
        """Whether work that nobody sits and waits for may take this worker.

        A training that made room would otherwise take back at once the place that it gave.

        Args:
            interactive: Waiting jobs of kinds that people sit and wait for.
            free_workers: Other workers that could take those.
        """
        if job.kind in INTERACTIVE or free_workers > 0 or self._waited(job.queued_at) > TRAINING_PATIENCE_SECONDS:
            return True
        return not any(self.may_run(other) for other in interactive)

    def _within_owner(self, job: Candidate) -> tuple[bool, int, int, datetime, UUID]:
        return (not job.was_lost, -job.priority, self._cold(job), job.created_at, job.job_id)

    def _between_owners(
        self, head: Candidate, ahead_seconds: float, starves: bool
    ) -> tuple[bool, bool, bool, int, int, datetime, UUID]:
        weight = self._owners.get(head.owner_id, Owner()).weight
        turns = int((self.served(head.owner_id) + ahead_seconds / weight) // TURN_SECONDS)
        if starves:
            turns = 0
        cold = 0 if starves else self._cold(head)
        return (not head.was_lost, not starves, self.is_coming(head), turns, cold, head.created_at, head.job_id)

    def _cold(self, job: Candidate) -> int:
        """0: everything is at hand, or the job waited too long for that to matter; 1: a LoRA is not; 2: the base."""
        if self._waited(job.queued_at) > AFFINITY_SECONDS:
            return 0
        if job.base_fingerprint and job.base_fingerprint not in self._warm_bases:
            return 2
        return int(not self._warm_loras.issuperset(job.loras)) if self._warm_loras else 0

    def _starves(self, owner_id: UUID, jobs: Sequence[Candidate]) -> bool:
        if owner_id in self._busy or self._waited(min(job.queued_at for job in jobs)) <= STARVING_SECONDS:
            return False
        served_at = self._owners.get(owner_id, Owner()).served_at
        return served_at is None or self._waited(served_at) > STARVING_SECONDS

    def _waited(self, since: datetime) -> float:
        return max(0.0, (self.now - since).total_seconds())
