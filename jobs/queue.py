"""Reads of the waiting line: what a claim may choose from, and how many jobs of each kind wait."""

from collections.abc import Sequence
from uuid import UUID

from django.db.models import Count, Sum

from jobs.database_clock import after
from jobs.models import Job
from jobs.scheduling import Candidate

CANDIDATES_PER_CLAIM = 50
FAIRNESS_WINDOW_HOURS = 24


def claimable_candidates(kinds: Sequence[str]) -> list[Candidate]:
    """The oldest claimable jobs of these kinds, lost work first; one query, at most `CANDIDATES_PER_CLAIM` rows."""
    rows = (
        Job.objects.claimable()
        .filter(kind__in=kinds)
        .order_by("-attempts_count", "created_at")
        .values_list("id", "owner_id", "attempts_count", "priority", "created_at", "base_model__fingerprint")
    )[:CANDIDATES_PER_CLAIM]
    return [
        Candidate(
            job_id=job_id,
            owner_id=owner_id,
            was_lost=attempts > 0,
            priority=priority,
            created_at=created_at,
            base_fingerprint=fingerprint or "",
        )
        for job_id, owner_id, attempts, priority, created_at, fingerprint in rows
    ]


def recent_owner_seconds() -> dict[UUID, float]:
    """Worker seconds that each owner used in the last day; the measure of fairness."""
    recent = Job.objects.filter(started_at__gt=after(-3600 * FAIRNESS_WINDOW_HOURS))
    return dict(recent.values_list("owner_id").annotate(Sum("used_worker_seconds")).order_by())


def waiting_by_kind() -> dict[str, int]:
    """{kind: number of claimable jobs}; kinds without any are absent."""
    return dict(Job.objects.claimable().values_list("kind").annotate(Count("id")).order_by())
