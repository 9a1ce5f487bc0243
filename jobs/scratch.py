"""Local folders of running attempts, one per token: a frozen attempt that wakes up cannot touch its successor's."""

import logging
import shutil
from contextlib import suppress
from pathlib import Path

from django.conf import settings

from core.failpoints import side_effect
from jobs.heartbeat import Hold
from jobs.models import Job

logger = logging.getLogger(__name__)


def _root() -> Path:
    return Path(settings.LORASITE["DATA"]) / "scratch"


def scratch_open(hold: Hold) -> Path:
    """An empty folder for this attempt."""
    folder = _root() / str(hold.job.pk) / str(hold.token)
    with side_effect("scratch.open"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    return folder


def scratch_remove(hold: Hold) -> None:
    """Remove this attempt's folder, whatever became of it: what counts is in the artifact store."""
    folder = _root() / str(hold.job.pk) / str(hold.token)
    with side_effect("scratch.remove"):
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # Another attempt's folder is in there, or it is gone.
            folder.parent.rmdir()


def scratch_sweep() -> int:
    """Remove folders of attempts that a crash ended: their job is held with another token, or by nobody.

    Called when a worker process starts. Returns the number of folders removed.
    """
    removed = 0
    for folder in _root().glob("*/*"):
        job_id, token = folder.parent.name, folder.name
        if token.isdigit() and not Job.objects.leased().filter(pk=job_id, token=int(token)).exists():
            with side_effect("scratch.sweep"):
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):
                    folder.parent.rmdir()
            removed += 1
    if removed:
        logger.info("scratch swept folders=%d", removed)
    return removed
