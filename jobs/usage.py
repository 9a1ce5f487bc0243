"""How much each person used of the workers lately, and the lock that makes caps per person exact."""

from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from django.db.models import QuerySet, UUIDField
from django.db.models.functions import Now

from core.failpoints import side_effect
from jobs.models import OwnerUsage
from jobs.prepared_sql import Parameter, Read, Run
from jobs.scheduling import decayed


class LockedUsage(NamedTuple):
    """One person's row at the database's time `now`, which nobody else can change or lock."""

    worker_seconds: float
    as_of: datetime
    now: datetime


def usage_lock(owner_id: UUID) -> LockedUsage:
    """Lock this person's row, made when missing, until the transaction ends. Must run inside a transaction."""
    # One query for all but the first time: every claim and every submission passes here.
    rows = _LOCK.rows(owner_id=owner_id)
    if not rows:
        with side_effect("usage.create"):
            OwnerUsage.objects.get_or_create(owner_id=owner_id, defaults={"as_of": Now()})
        rows = _LOCK.rows(owner_id=owner_id)
    return LockedUsage(*rows[0])


def usage_locking(owner_id: UUID) -> Run:
    """The same as a statement to be sent beside others; no row comes back where there is none yet."""
    return _LOCK.run(owner_id=owner_id)


def _locked() -> "QuerySet[OwnerUsage, Any]":
    rows = OwnerUsage.objects.select_for_update().filter(pk=Parameter("owner_id", UUIDField()))
    return rows.annotate(now=Now()).values_list(*LockedUsage._fields)


_LOCK = Read(_locked)


def usage_add(*, owner_id: UUID, worker_seconds: float) -> None:
    """Count worker seconds that a try of this person's job took. Must run inside a transaction."""
    row = usage_lock(owner_id)
    total = decayed(row.worker_seconds, row.as_of, row.now) + worker_seconds
    with side_effect("usage.add"):
        OwnerUsage.objects.filter(pk=owner_id).update(worker_seconds=total, as_of=Now())
