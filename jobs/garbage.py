"""Removes blobs that nothing needs: the dispatcher calls `garbage_sweep`, `manage.py garbage` shows or runs it by hand.

A blob goes only when its row was not renewed for GARBAGE_AFTER_SECONDS and no column of `artifact_references` names it,
and both are asked again under the lock that every writer takes (`artifact_announce`, `artifacts_pin`).
"""

import logging
import random
import time
from dataclasses import dataclass

from django.conf import settings
from django.db import connection, transaction
from django.db.models import QuerySet
from django.db.models.functions import Now

from core.failpoints import side_effect
from jobs.artifact_references import referenced
from jobs.artifacts import artifact_name, blob_store
from jobs.backoff import is_transient
from jobs.database_clock import after
from jobs.models import Artifact
from jobs.previews import previews_sweep

logger = logging.getLogger(__name__)

SWEEP_EVERY_SECONDS = 600.0
"""How often the dispatcher calls `garbage_sweep`."""
SWEEP_SECONDS = 5.0
"""A sweep begins no new piece of work after this time."""
PAGE = 500
"""Rows or names looked at together."""
REMOVED_TOGETHER = 20
"""Blobs removed in one transaction, which holds their locks (on SQLite: the only write lock) meanwhile."""
LEFTOVER_SECONDS = 24 * 3600.0
"""Age at which half-written files and multipart uploads belong to nobody: no transfer lasts so long."""


@dataclass
class SweepResult:
    """What one sweep did, in blobs."""

    adopted: int = 0
    renewed: int = 0
    removed: int = 0
    leftovers: int = 0


_listed_up_to: str | None = None
"""Where the next listing goes on; a fresh process begins anywhere, so that restarts do not hide the rest."""


def garbage_sweep(*, seconds: float = SWEEP_SECONDS, leftover_seconds: float = LEFTOVER_SECONDS) -> SweepResult:
    """One bounded piece of work: adopt what no row knows, remove what nothing needs, clear what was half written.

    A store that does not answer ends the sweep early; the next one goes on.
    """
    result, end = SweepResult(), time.monotonic() + seconds
    previews_sweep()
    try:
        result.adopted = _adopt_page()
        seen: set[str] = set()
        while time.monotonic() < end and (candidates := old_artifacts(PAGE, seen)):
            result.renewed += _renew(referenced(candidates))
            result.removed += _remove_unreferenced(candidates, end)
        result.leftovers = blob_store().leftovers_remove(leftover_seconds, PAGE)
    except Exception as error:
        if not is_transient(error):
            raise
        logger.warning("garbage sweep ended early reason=%s", error)
    if result != SweepResult():
        logger.info("garbage swept %s", result)
    return result


def garbage_sweep_whole(*, leftover_seconds: float = LEFTOVER_SECONDS) -> SweepResult:
    """As `garbage_sweep`, over the whole store. Raises what the store raises."""
    result, name = SweepResult(), ""
    previews_sweep()
    while page := blob_store().names_after(name, PAGE):
        result.adopted += artifacts_adopt(page)
        name = page[-1][0]
    seen: set[str] = set()
    while candidates := old_artifacts(PAGE, seen):
        result.renewed += _renew(referenced(candidates))
        result.removed += _remove_unreferenced(candidates, float("inf"))
    while removed := blob_store().leftovers_remove(leftover_seconds, PAGE):
        result.leftovers += removed
    return result


def unreferenced_artifacts() -> list[Artifact]:
    """Rows of known blobs that nothing names now, oldest first; young ones may be on their way to a reference."""
    rows = list(Artifact.objects.order_by("put_at"))
    needed = referenced(row.pk for row in rows)
    return [row for row in rows if row.pk not in needed]


def old_artifacts(limit: int, seen: set[str]) -> list[str]:
    """Hashes whose rows were not renewed for GARBAGE_AFTER_SECONDS, oldest first, but those in `seen`; adds to it."""
    oldest = _old().order_by("put_at").values_list("pk", flat=True)[:limit]
    found = [sha256 for sha256 in oldest if sha256 not in seen]
    seen |= set(found)
    return found


def artifacts_adopt(blobs: list[tuple[str, int]]) -> int:
    """Give rows to blobs that have none, so that they age like all others. Returns how many."""
    sizes = {name.rsplit("/", 1)[1]: size for name, size in blobs if _is_blob_name(name)}
    unknown = sizes.keys() - set(Artifact.objects.filter(pk__in=sizes).values_list("pk", flat=True))
    with side_effect("artifact.adopt"):
        Artifact.objects.bulk_create(
            [Artifact(sha256=sha256, size_bytes=sizes[sha256], put_at=Now()) for sha256 in sorted(unknown)],
            ignore_conflicts=True,  # A writer announced it meanwhile.
        )
    return len(unknown)


def artifacts_remove(shas: list[str]) -> int:
    """Remove those blobs, with their rows, that are still old and unreferenced under the lock. Returns how many.

    A writer of the same bytes either renewed the row before, so that it is not old here, or waits for the lock and
    then finds no row. A crash in between leaves at most a row without a blob: it is removed by a later sweep, and
    `artifacts_pin` does not accept it.
    """
    with side_effect("garbage.commit"), transaction.atomic():
        old = _lock_free_ones(_old().filter(pk__in=shas))
        # A new statement sees everything that was committed before the locks were ours.
        dead = sorted(set(old) - referenced(old))
        for sha256 in dead:
            blob_store().delete(artifact_name(sha256))
        with side_effect("artifact.forget"):
            Artifact.objects.filter(pk__in=dead).delete()
    return len(dead)


def _old() -> QuerySet[Artifact]:
    return Artifact.objects.filter(put_at__lt=after(-settings.LORASITE["GARBAGE_AFTER_SECONDS"]))


def _adopt_page() -> int:
    global _listed_up_to
    if _listed_up_to is None:
        _listed_up_to = f"sha256/{random.randrange(256):02x}"
    page = blob_store().names_after(_listed_up_to, PAGE)
    adopted = artifacts_adopt(page)
    _listed_up_to = page[-1][0] if len(page) == PAGE else ""
    return adopted


def _renew(needed: set[str]) -> int:
    """Rows in use go to the end of the line, so that the oldest ones are always those to look at."""
    with transaction.atomic():
        free = _lock_free_ones(Artifact.objects.filter(pk__in=needed))
        with side_effect("artifact.renew"):
            return Artifact.objects.filter(pk__in=free).update(put_at=Now())


def _lock_free_ones(rows: QuerySet[Artifact]) -> list[str]:
    """Lock those rows that no writer holds. What one holds is being renewed, and who never waits is in no deadlock."""
    skip_locked = connection.features.has_select_for_update_skip_locked
    return list(rows.select_for_update(skip_locked=skip_locked).order_by("pk").values_list("pk", flat=True))


def _remove_unreferenced(candidates: list[str], end: float) -> int:
    removed = 0
    left = sorted(_old().filter(pk__in=candidates).values_list("pk", flat=True))
    for start in range(0, len(left), REMOVED_TOGETHER):
        if time.monotonic() > end:
            break
        removed += artifacts_remove(left[start : start + REMOVED_TOGETHER])
    return removed


def _is_blob_name(name: str) -> bool:
    try:
        return artifact_name(name.rsplit("/", 1)[1]) == name
    except ValueError:
        return False
