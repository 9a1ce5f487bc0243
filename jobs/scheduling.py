"""Which job a worker should take next: a pure function over plain values, shared with simulations. No database here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What the order depends on.

    Attributes:
        was_lost: An earlier attempt lost its worker or was released; somebody has waited long already.
        priority: Higher first, among one owner's jobs.
        base_fingerprint: Of the base model it needs; empty when none.
    """

    job_id: UUID
    owner_id: UUID
    was_lost: bool
    priority: int
    created_at: datetime
    base_fingerprint: str


def claim_order(
    candidates: Iterable[Candidate], *, owner_seconds: Mapping[UUID, float], warm_bases: frozenset[str]
) -> list[Candidate]:
    """Best first: lost work, then the least served owner, priority, a base that is already loaded, and age.

    Args:
        candidates: Claimable jobs.
        owner_seconds: Worker seconds that each owner used lately (an owner not in it used none).
        warm_bases: Fingerprints loaded in this worker.
    """
    return sorted(
        candidates,
        key=lambda job: (
            not job.was_lost,
            owner_seconds.get(job.owner_id, 0.0),
            -job.priority,
            job.base_fingerprint not in warm_bases,
            job.created_at,
            job.job_id,
        ),
    )
