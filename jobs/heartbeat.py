"""The heartbeat thread of a worker process: renews its leases, carries progress, brings back cancel wishes and fences.

Runs on its own database connection. The work itself only touches `Hold`, which never blocks on the database.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import DatabaseError, connection

from core.errors import Cancelled, Interrupted, Paused
from core.progress import Progress
from jobs.leases import leases_renew
from jobs.lifecycle import Claim
from jobs.models import WorkerProcess
from jobs.workers import worker_beat

logger = logging.getLogger(__name__)


class Fenced(Interrupted):
    """Another attempt may hold the job by now: stop at once, publish nothing."""


class Hold:
    """One held job, as the work sees it."""

    def __init__(self, claim: Claim, shutting_down: Callable[[], bool]) -> None:
        self.job, self.token = claim.job, claim.token
        self.cancelled = False
        self.fenced = False
        self._shutting_down = shutting_down
        self._renewed_at = time.monotonic()
        self._progress: dict[str, Any] = {}

    def report(self, progress: Progress) -> None:
        """A `core.progress.Report`.

        Raises:
            Fenced: The lease is lost, or could not be renewed in time.
            Cancelled: The person asked to stop.
            Paused: This worker is going down.
        """
        self._progress |= {
            "stage": progress.stage[:60],
            "progress_step": progress.step,
            "progress_total": progress.total,
        }
        if progress.figures:  # Otherwise the last loss would go with the first stage that has none.
            self._progress["figures"] = progress.figures
        self.check()
        if self._shutting_down():
            raise Paused("this worker is shutting down")

    def check(self) -> None:
        """Raise Fenced or Cancelled where due. For stretches without steps, such as uploads."""
        lease = settings.LORASITE["LEASE_SECONDS"]
        if self.fenced or time.monotonic() - self._renewed_at > lease * 0.9:
            raise Fenced(f"the lease of job {self.job.pk} is lost (token {self.token})")
        if self.cancelled:
            raise Cancelled("stopped on request")

    def take_progress(self) -> dict[str, Any]:
        """Progress columns that are not written yet; empty when there is nothing new."""
        progress, self._progress = self._progress, {}
        return progress

    def write_progress(self) -> None:
        """Write the newest progress now instead of with the next beat, so that the end of a try shows its last step."""
        if progress := self.take_progress():
            leases_renew({self.job.pk: self.token}, {self.job.pk: progress})

    def renewed(self, asked_at: float) -> None:
        """The database confirmed the lease; counted from before the question, which is the safe side."""
        self._renewed_at = asked_at


class Heartbeat:
    """Renews all leases of this process in one UPDATE per beat."""

    def __init__(
        self,
        worker: WorkerProcess,
        *,
        warm_bases: Callable[[], list[str]] = list,
        shutting_down: Callable[[], bool] = lambda: False,
    ) -> None:
        self._worker = worker
        self._warm_bases = warm_bases
        self._shutting_down = shutting_down
        self._holds: dict[UUID, Hold] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat. Call in the child, after the fork."""
        self._thread.start()

    def stop(self) -> None:
        """Stop beating; held jobs will be taken by others once their leases run out."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    @contextmanager
    def holding(self, claim: Claim) -> Iterator[Hold]:
        """Keep the claim's lease alive inside the block."""
        hold = Hold(claim, self._shutting_down)
        with self._lock:
            self._holds[claim.job.pk] = hold
        try:
            yield hold
        finally:
            with self._lock:
                self._holds.pop(claim.job.pk, None)

    def beat(self) -> None:
        """One round: renew, write progress, learn of fences and cancel wishes."""
        with self._lock:
            holds = dict(self._holds)
        progress = {job_id: columns for job_id, hold in holds.items() if (columns := hold.take_progress())}
        asked_at = time.monotonic()
        fenced, cancelled = leases_renew({job_id: hold.token for job_id, hold in holds.items()}, progress)
        for job_id, hold in holds.items():
            if job_id in fenced:
                hold.fenced = True
            else:
                hold.renewed(asked_at)
                hold.cancelled = hold.cancelled or job_id in cancelled
        worker_beat(worker=self._worker, warm_bases=self._warm_bases())

    def _run(self) -> None:
        while not self._stop.wait(settings.LORASITE["HEARTBEAT_SECONDS"]):
            try:
                self.beat()
            except DatabaseError:
                # The work goes on; `Hold.check` stops it before the lease can have run out.
                logger.exception("heartbeat failed worker=%s", self._worker)
                connection.close()
        connection.close()
