"""How much each person used of the workers lately, and the lock that makes caps per person exact."""

from uuid import UUID

from django.db.models.functions import Now

from core.failpoints import side_effect
from jobs.models import OwnerUsage
from jobs.scheduling import decayed


def usage_lock(owner_id: UUID) -> OwnerUsage:
    """This person's row, locked until the transaction ends; made when missing. Must run inside a transaction."""
    rows = OwnerUsage.objects.select_for_update().annotate(now=Now()).filter(pk=owner_id)
    # One query for all but the first time: every claim and every submission passes here.
    row = rows.first()
    if row is None:
        with side_effect("usage.create"):
            OwnerUsage.objects.get_or_create(owner_id=owner_id, defaults={"as_of": Now()})
        row = rows.get()
    return row


def usage_add(*, owner_id: UUID, worker_seconds: float) -> None:
    """Count worker seconds that a try of this person's job took. Must run inside a transaction."""
    row = usage_lock(owner_id)
    total = decayed(row.worker_seconds, row.as_of, row.now) + worker_seconds  # type: ignore[attr-defined]
    with side_effect("usage.add"):
        OwnerUsage.objects.filter(pk=owner_id).update(worker_seconds=total, as_of=Now())
