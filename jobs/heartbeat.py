"""The heartbeat thread of a worker process: renews its leases, carries progress, brings back wishes and fences.

Runs on its own database connection. The work itself only touches `Hold`, which never blocks on the database.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import connection

from core.errors import Cancelled, Interrupted, Paused
from core.progress import Progress
from jobs.leases import lease_seconds, leases_renew
from jobs.models import WorkerProcess
from jobs.previews import Preview, preview_write
from jobs.status import JobKind
from jobs.taking import Claim
from jobs.workers import worker_beat

logger = logging.getLogger(__name__)

DOWNLOAD_SECONDS = 1800.0
"""One file may take this long to arrive without the work counting as stuck."""


class Fenced(Interrupted):
    """Another attempt may hold the job by now: stop at once, publish nothing."""


class Preempted(Paused):
    """Interactive work waits: save a checkpoint, then make room."""


class DeadlinePassed(Interrupted):
    """The job has computed for as long as it may, all tries together."""


class Hold:
    """One held job, as the work sees it."""

    def __init__(self, claim: Claim, shutting_down: Callable[[], bool]) -> None:
        self.job, self.token = claim.job, claim.token
        self.cancelled = False
        self.fenced = False
        self.yielding = False
        self._computes = False
        self._shutting_down = shutting_down
        self._renewed_at, self._alive_at = claim.asked_at, time.monotonic()
        self._patience_seconds = 0.0
        self._progress: dict[str, Any] = {}
        self._preview: Preview | None = None
        self.has_preview = False
        limits = {JobKind.GENERATE: "GENERATE_TIME_LIMIT_SECONDS", JobKind.TRAIN: "TRAIN_TIME_LIMIT_SECONDS"}
        self._limit_seconds = settings.LORASITE.get(limits.get(JobKind(self.job.kind), ""))
        self._began_at = time.monotonic()

    def report(self, progress: Progress) -> None:
        """A `core.progress.Report`.

        Raises:
            Fenced: The lease is lost, or could not be renewed in time.
            Cancelled: The person asked to stop.
            DeadlinePassed: All tries together took too long.
            Paused: This worker is going down, or (Preempted) a training should make room.
        """
        self.alive()
        columns = {"stage": progress.stage[:60], "progress_step": progress.step, "progress_total": progress.total}
        if progress.figures:  # Otherwise the last loss would go with the first stage that has none.
            columns["figures"] = progress.figures
        self._progress |= columns
        if progress.preview is not None:
            self._preview = Preview(step=progress.step, jpeg=progress.preview)
        self.heed()

    def heed(self) -> None:
        """Raise whatever stops the work now, as `report`; for stretches without steps that may be given up."""
        self.check()
        used = self.job.used_worker_seconds + time.monotonic() - self._began_at
        if self._limit_seconds is not None and used > self._limit_seconds:
            raise DeadlinePassed(
                f"The job computed for {used:.0f} s in all, {self._limit_seconds:g} s are allowed. Ask for less, "
                "or ask an operator for a longer limit."
            )
        if self._shutting_down():
            raise Paused("this worker is shutting down")
        if self.yielding and self.job.kind == JobKind.TRAIN:
            raise Preempted("interactive work waits")

    def check(self) -> None:
        """Raise Fenced or Cancelled where due: what also stops an upload, which no shutdown or deadline does."""
        lease = lease_seconds(self.job.kind)
        if self.fenced or time.monotonic() - self._renewed_at > lease * 0.9:
            raise Fenced(f"the lease of job {self.job.pk} is lost (token {self.token})")
        if self.cancelled:
            raise Cancelled("stopped on request")

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside the block steps are expected; before and after it, waiting is no sign of trouble."""
        self.alive()
        self._computes = True
        try:
            yield
        finally:
            self._computes = False

    def alive(self, *, patience_seconds: float = 0.0) -> None:
        """The work does something; the next sign of life may take `patience_seconds`, or a step's time if longer."""
        self._alive_at, self._patience_seconds = time.monotonic(), patience_seconds

    def watched(self, fetch: Callable[[str], Path], *, company: Sequence["Hold"] = ()) -> Callable[[str], Path]:
        """The same `fetch`, with patience for the download of one file.

        Args:
            company: Holds that wait for the same files.
        """

        def fetching(sha256: str) -> Path:
            for hold in (self, *company):
                hold.alive(patience_seconds=DOWNLOAD_SECONDS)
            path = fetch(sha256)
            for hold in (self, *company):
                hold.alive()
            return path

        return fetching

    def overdue_seconds(self) -> float:
        """How much longer than allowed the work has been silent; 0 or less is fine."""
        if not self._computes:
            return 0.0
        allowed = max(settings.LORASITE["STEP_SECONDS"], self._patience_seconds)
        return time.monotonic() - self._alive_at - allowed

    def say(self, stage: str) -> None:
        """Show a stage with the next beat, without any step."""
        self._progress |= {"stage": stage[:60]}

    def take_progress(self) -> dict[str, Any]:
        """Progress columns that are not written yet; empty when there is nothing new."""
        progress, self._progress = self._progress, {}
        return progress

    def take_preview(self) -> Preview | None:
        """The newest preview that is not written yet."""
        preview, self._preview = self._preview, None
        self.has_preview = self.has_preview or preview is not None
        return preview

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
        self._beat_began_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat. Call in the child, after the fork."""
        self._thread.start()

    def stop(self) -> None:
        """Stop beating; held jobs will be taken by others once their leases run out."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def take(self, claim: Claim) -> Hold:
        """Keep the claim's lease alive until `let_go`."""
        hold = Hold(claim, self._shutting_down)
        with self._lock:
            older = self._holds.get(claim.job.pk)
            if older is not None:  # Lost and claimed anew by this very process.
                older.fenced = True
            self._holds[claim.job.pk] = hold
        return hold

    def let_go(self, hold: Hold) -> None:
        """Renew it no longer; harmless when that was said before."""
        with self._lock:
            if self._holds.get(hold.job.pk) is hold:
                del self._holds[hold.job.pk]

    def holds(self) -> list[Hold]:
        """Everything that this process holds now."""
        with self._lock:
            return list(self._holds.values())

    def is_late(self) -> bool:
        """Whether a beat hangs, so that a job claimed now would lose its lease; a beat that fails is not late."""
        return self._beat_seconds() > lease_seconds(JobKind.GENERATE) / 2

    def overdue_seconds(self) -> float:
        """How much longer than allowed for a step the running beat takes; 0 or less is fine."""
        return self._beat_seconds() - settings.LORASITE["STEP_SECONDS"]

    def _beat_seconds(self) -> float:
        began_at = self._beat_began_at
        return 0.0 if began_at is None else time.monotonic() - began_at

    def beat(self) -> None:
        """One round: renew, write progress, learn of fences and wishes."""
        holds = {hold.job.pk: hold for hold in self.holds()}
        progress = {job_id: columns for job_id, hold in holds.items() if (columns := hold.take_progress())}
        asked_at = time.monotonic()
        answer = leases_renew({job_id: hold.token for job_id, hold in holds.items()}, progress)
        for job_id, hold in holds.items():
            if job_id in answer.fenced:
                hold.fenced = True
            else:
                hold.renewed(asked_at)
                hold.cancelled = hold.cancelled or job_id in answer.cancelled
                hold.yielding = hold.yielding or job_id in answer.yielding
        worker_beat(worker=self._worker, warm_bases=self._warm_bases())
        for job_id, hold in holds.items():
            # Last: a look that cannot be shown costs no lease.
            if not hold.fenced and (preview := hold.take_preview()):
                preview_write(job_id=job_id, token=hold.token, preview=preview)

    def _run(self) -> None:
        while not self._stop.wait(settings.LORASITE["HEARTBEAT_SECONDS"]):
            self._beat_began_at = time.monotonic()
            try:
                self.beat()
            except Exception:
                # Whatever it was: without this thread every job of the process would be lost, one after the other. The
                # work goes on; `Hold.check` stops it before the lease can have run out.
                logger.exception("heartbeat failed worker=%s", self._worker)
                connection.close()
            finally:
                self._beat_began_at = None
        connection.close()
