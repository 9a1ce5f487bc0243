"""Fetches what the next jobs in line need into this machine's cache, while the process computes something else.

One thread per GPU process looks at the line with a connection of its own; others of its threads fetch. A fetch that
fails costs its job nothing: the job fetches for itself.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterable
from typing import Any

from django.db import DatabaseError, connection

from core.cache_locks import SharedLocks
from core.file_cache import FileCache
from jobs.connections import connection_refresh
from jobs.models import Job, WorkerProcess
from jobs.queue import owners_and_running, waiting_candidates
from jobs.scheduling import FETCH_LOOK_SECONDS, FETCHED_AHEAD_JOBS, Scheduler
from jobs.status import JobKind
from jobs.wakeup import announce

logger = logging.getLogger(__name__)

FETCHERS = 3
"""Files at once, so that a LoRA need not wait for a base of gigabytes."""
TRY_AGAIN_SECONDS = 10.0
"""A file that could not be fetched is left alone for so long."""
KINDS = (JobKind.GENERATE, JobKind.TRAIN)


class Prefetcher:
    """One per GPU process. `look` is one round; `start` makes threads do the rounds and the fetches.

    Args:
        worker: Whose line it is.
        files: This machine's cache.
    """

    def __init__(self, worker: WorkerProcess, files: FileCache) -> None:
        self._worker, self._files = worker, files
        self._to_fetch: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._coming: set[str] = set()
        self._not_before: dict[str, float] = {}
        self._pins: SharedLocks | None = None
        self._changed = threading.Condition()
        self._looks = self._fetches = 0
        self._wake = threading.Event()
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to look. Call in the child, after the fork."""
        fetchers = [threading.Thread(target=self._fetch_all, name="fetcher", daemon=True) for _ in range(FETCHERS)]
        self._threads = [threading.Thread(target=self._run, name="prefetch", daemon=True), *fetchers]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Look no more. A fetch that runs is given up with the process; what it wrote is swept by the next one."""
        self._stopped = True
        self._wake.set()
        for _ in range(FETCHERS):
            self._to_fetch.put(None)

    def has(self, sha256: str) -> bool:
        """Whether a file is at hand on this machine."""
        return self._files.has(sha256)

    def wait(self, seconds: float) -> bool:
        """Look at once, and wait so long for the next file that comes. False when none is coming.

        For a worker that found nothing to claim but jobs whose files are being fetched.
        """
        end = time.monotonic() + seconds
        with self._changed:
            looks, fetches = self._looks, self._fetches
            self._wake.set()
            while not self._stopped and self._fetches == fetches and (left := end - time.monotonic()) > 0:
                if self._looks > looks and not self._coming:
                    return False
                self._changed.wait(left)
            return bool(self._fetches > fetches or self._coming) and not self._stopped

    def look(self) -> list[str]:
        """One round: what the first jobs need stays, and what of it is missing is asked for. Returns the missing."""
        wanted = list(dict.fromkeys(self._wanted()))
        pins = self._files.pins()
        now = time.monotonic()
        self._not_before = {sha256: at for sha256, at in self._not_before.items() if at > now}
        missing = []
        for sha256 in wanted:
            pins.add(sha256)
            if not self._files.has(sha256) and sha256 not in self._not_before:
                missing.append(sha256)
        if self._pins is not None:
            self._pins.close()
        self._pins = pins
        with self._changed:
            new = [sha256 for sha256 in missing if sha256 not in self._coming]
            self._coming |= set(new)
            self._looks += 1
            self._changed.notify_all()
        for sha256 in new:
            self._to_fetch.put(sha256)
        if new:
            logger.info("prefetch wanted=%d missing=%d new=%d", len(wanted), len(missing), len(new))
        return missing

    def fetch(self, sha256: str) -> bool:
        """Bring one file here. Whether it came."""
        began, came = time.monotonic(), False
        try:
            self._files.get(sha256, ahead=True)
            came = True
            # Whoever left its job to others hears of it at once, on this machine or through the dispatcher.
            announce(JobKind.GENERATE)
        except Exception as error:
            # Whatever it is, the job that needs the file will meet it, too, and says so to its owner.
            self._not_before[sha256] = time.monotonic() + TRY_AGAIN_SECONDS
            logger.warning("prefetch failed file=%s came=%s reason=%s", sha256[:12], came, error, exc_info=True)
        with self._changed:
            self._coming.discard(sha256)
            self._fetches += came
            self._changed.notify_all()
        logger.info("prefetch done file=%s came=%s ms=%.0f", sha256[:12], came, 1000 * (time.monotonic() - began))
        return came

    def _wanted(self) -> Iterable[str]:
        """Hashes of what the first jobs need, the first one's first."""
        now, candidates, _ = waiting_candidates(KINDS, warm_bases=self._worker.warm_bases)
        if now is None:
            return
        owners, running = owners_and_running({candidate.owner_id for candidate in candidates}, now)
        warm = frozenset(self._worker.warm_bases)
        scheduler = Scheduler(now=now, owners=owners, running=running, warm_bases=warm)
        first = [
            candidate.job_id
            for candidate, _ in zip(scheduler.order(candidates), range(FETCHED_AHEAD_JOBS), strict=False)
        ]
        columns = ("spec", "base_model__fingerprint", "base_model__files")
        rows = {pk: row for pk, *row in Job.objects.filter(pk__in=first).values_list("pk", *columns)}
        for pk in first:
            spec, fingerprint, base_files = rows.get(pk, ({}, None, None))
            yield from _files_of(spec)
            if fingerprint and fingerprint not in warm:
                yield from base_files.values()

    def _run(self) -> None:
        while not self._stopped:
            try:
                connection_refresh()
                self.look()
            except DatabaseError:
                logger.warning("prefetch cannot read the line, trying again", exc_info=True)
                connection.close()
            except Exception:
                # Without it the jobs run all the same, only later.
                logger.exception("prefetch failed")
            self._wake.wait(FETCH_LOOK_SECONDS)
            self._wake.clear()
        connection.close()

    def _fetch_all(self) -> None:
        while (sha256 := self._to_fetch.get()) is not None and not self._stopped:
            self.fetch(sha256)
            connection.close()


def _files_of(spec: dict[str, Any]) -> Iterable[str]:
    """Hashes that a generation names."""
    for use in spec.get("loras") or ():
        yield use["sha256"]
    for name in ("init_image", "mask"):
        if spec.get(name):
            yield spec[name]
