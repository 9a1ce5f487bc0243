"""Notices within a second that a worker process of this machine died, instead of waiting for its lease to run out.

Each worker process holds a file lock for as long as it lives; the kernel frees it however the process ends. Its
successor and the dispatcher try the locks; a lease whose holder is on another machine still needs its time.
"""

import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from uuid import UUID

from django.conf import settings

from core.failpoints import side_effect
from jobs import lifecycle
from jobs.models import Job, WorkerProcess
from jobs.workers import live_workers, worker_died

logger = logging.getLogger(__name__)

_held: list[IO[bytes]] = []
"""Never closed: the lock lives as long as the process."""


def life_lock_take(worker: WorkerProcess) -> None:
    """Hold this worker process's lock until the process ends. Call after the fork, before the first claim."""
    folder = _folder()
    with side_effect("life_lock.take"):
        folder.mkdir(parents=True, exist_ok=True)
        # Locked before it gets its name: nobody ever sees the file of a living process without its lock.
        unnamed = folder / f"new-{worker.pk}"
        file = unnamed.open("wb")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(folder / f"{worker.pk}.{_boot_id()}")
    _held.append(file)


def dead_workers_close() -> int:
    """Jobs of worker processes of this machine that are no more count as lost at once. Returns how many.

    Only locks of this very boot are tried: a folder shared with other machines may not share its locks.
    """
    lost = 0
    for path, worker_id, boot_id in list(_locks()):
        if boot_id != _boot_id():
            if not live_workers().filter(pk=worker_id).exists():
                with side_effect("life_lock.remove_old"):
                    path.unlink(missing_ok=True)
            continue
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            continue  # Somebody else was faster.
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # It lives.
            lost += _died(worker_id)
            with side_effect("life_lock.remove"):
                path.unlink(missing_ok=True)
    return lost


def _died(worker_id: UUID) -> int:
    lost = 0
    for job in Job.objects.leased().filter(worker_id=worker_id).select_related("worker"):
        lost += lifecycle.job_lost(job=job, reason=f"worker process {job.worker} died", only_expired=False) is not None
    gone = worker_died(worker_id=worker_id)
    if gone or lost:
        logger.warning("worker process died id=%s lost_jobs=%d", worker_id, lost)
    return lost


def _locks() -> Iterator[tuple[Path, UUID, str]]:
    for path in sorted(_folder().glob("*.*")):
        worker_id, _, boot_id = path.name.partition(".")
        try:
            yield path, UUID(worker_id), boot_id
        except ValueError:
            logger.warning("unknown file among the locks of workers, remove it: %s", path)


def _folder() -> Path:
    return Path(settings.LORASITE["DATA"]) / "workers"


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
