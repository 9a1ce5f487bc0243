"""Local folders of a running attempt, one per token: a frozen attempt that wakes up cannot touch its successor's."""

import shutil
from pathlib import Path

from django.conf import settings

from jobs.heartbeat import Hold


def scratch_open(hold: Hold) -> Path:
    """An empty folder for this attempt; folders of earlier attempts of the same job on this machine are removed."""
    of_job = Path(settings.LORASITE["DATA"]) / "scratch" / str(hold.job.pk)
    shutil.rmtree(of_job, ignore_errors=True)
    folder = of_job / str(hold.token)
    folder.mkdir(parents=True)
    return folder


def scratch_remove(hold: Hold) -> None:
    """Remove this job's folders; what counts is in the artifact store by now."""
    shutil.rmtree(Path(settings.LORASITE["DATA"]) / "scratch" / str(hold.job.pk), ignore_errors=True)
