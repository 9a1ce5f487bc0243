"""The newest look at a running job, beside its row, so that no query of jobs carries pictures.

The heartbeat writes it with the progress; it goes when the job's pictures are published, or with the next sweep.
"""

from typing import NamedTuple
from uuid import UUID

from django.db import transaction
from django.db.models.functions import Now

from core.failpoints import side_effect
from jobs.errors import NotFound
from jobs.models import Job, JobPreview, User
from jobs.status import LEASED, TERMINAL


class Preview(NamedTuple):
    """A look at the first picture of a job."""

    step: int
    """Denoising steps done."""
    jpeg: bytes
    """At most 16 KiB."""


def preview_write(*, job_id: UUID, token: int, preview: Preview) -> None:
    """Show this instead of what was shown before, unless another attempt holds the job by now."""
    with transaction.atomic():
        # The row's lock keeps a later attempt from claiming the job in between.
        if not Job.objects.leased().select_for_update().filter(pk=job_id, token=token).exists():
            return
        with side_effect("preview.write"):
            JobPreview.objects.update_or_create(
                job_id=job_id, defaults={"token": token, "step": preview.step, "jpeg": preview.jpeg, "at": Now()}
            )


def preview_drop(*, job_id: UUID) -> None:
    """The pictures themselves are there."""
    with side_effect("preview.drop"):
        JobPreview.objects.filter(job_id=job_id).delete()


def previews_sweep() -> int:
    """Remove those of jobs that ended without dropping theirs. Returns how many."""
    with side_effect("preview.sweep"):
        removed, _ = JobPreview.objects.filter(job__state__in=sorted(TERMINAL)).delete()
    return removed


def preview_of(user: User, job_id: UUID) -> JobPreview:
    """The newest preview of a person's job that is being worked on.

    Raises:
        NotFound: No such job, or it shows nothing now.
    """
    found: JobPreview | None = JobPreview.objects.filter(
        job_id=job_id, job__owner=user, job__state__in=sorted(LEASED)
    ).first()
    if found is None:
        raise NotFound(
            f"job {job_id} shows no preview now: ask for some with preview_every_steps, and look while it runs"
        )
    return found
