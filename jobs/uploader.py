"""The uploader thread of a worker process: stores results and checkpoints while the process computes the next job.

It keeps lease and token of a job until its results are visible, and never gives one up because the store is away.
Runs on its own database connection.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from botocore.exceptions import BotoCoreError, ClientError
from django.db import connection, transaction

from core.errors import Paused
from core.failpoints import side_effect
from jobs import lifecycle
from jobs.backoff import Backoff, is_transient
from jobs.connections import connection_refresh
from jobs.endings import job_end
from jobs.heartbeat import Heartbeat, Hold
from jobs.scratch import scratch_remove

logger = logging.getLogger(__name__)

MOST_PENDING = 16
MOST_PENDING_BYTES = 4 << 30
"""Results that wait on this machine; beyond either bound the process computes nothing new."""
IDLE_SECONDS = 5.0
"""Without anything to store, the database connection is closed."""
LOOK_SECONDS = 0.5
"""Between two looks at cancel wishes and lost leases of jobs whose upload waits."""


class Storable(Protocol):
    """Computed work with its files on this machine's disk."""

    def store(self) -> None:
        """Put the files into the artifact store, one try each. Called again after an error; nothing is visible yet."""

    def record(self) -> None:
        """Write the result rows. Runs in the transaction that ends the job."""


class Upload:
    """Something on its way into the store."""

    def __init__(self, hold: Hold, attempt: Callable[[], None], *, is_result: bool, size_bytes: int = 0) -> None:
        self.hold, self.attempt, self.is_result, self.size_bytes = hold, attempt, is_result, size_bytes
        self.due_at = 0.0
        self.since = time.monotonic()
        self.backoff = Backoff()
        self.is_done = threading.Event()
        self.succeeded = False

    def is_due(self) -> bool:
        """Whether the wait is over, or the job needs no more waiting."""
        lost = self.hold.fenced or self.hold.cancelled
        return lost or time.monotonic() >= self.due_at


def result_upload(hold: Hold, work: Storable, *, size_bytes: int) -> Upload:
    """The results of a job, which make it SUCCEEDED."""

    def attempt() -> None:
        hold.check()
        work.store()
        hold.check()
        with side_effect("result.commit"), transaction.atomic():
            work.record()
            lifecycle.job_succeed(job_id=hold.job.pk, token=hold.token)

    return Upload(hold, attempt, is_result=True, size_bytes=size_bytes)


class Uploader:
    """One per process. `turn` does the work; `start` makes a thread call it.

    Args:
        heartbeat: Keeps the leases until a result is visible.
        most_pending, most_pending_bytes: Backpressure.
    """

    def __init__(
        self, heartbeat: Heartbeat, *, most_pending: int = MOST_PENDING, most_pending_bytes: int = MOST_PENDING_BYTES
    ) -> None:
        self._heartbeat = heartbeat
        self._most_pending, self._most_pending_bytes = most_pending, most_pending_bytes
        self._pending: list[Upload] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)

    def start(self) -> None:
        """Begin to work in a thread. Call in the child, after the fork."""
        self._thread.start()

    def add(self, upload: Upload) -> Upload:
        """Store this as soon as possible. A checkpoint takes the place of an older one of its job that still waits."""
        with self._changed:
            self._pending = [old for old in self._pending if old.hold is not upload.hold or self._keeps(old, upload)]
            self._pending.append(upload)
            self._changed.notify_all()
        return upload

    @staticmethod
    def _keeps(old: Upload, new: Upload) -> bool:
        if not old.is_result:
            old.is_done.set()  # Superseded: whoever waited for it waits for the newer one.
        return old.is_result

    def drop_checkpoints(self, hold: Hold) -> None:
        """This try has ended; what still waits of its checkpoints is nobody's any more."""
        with self._changed:
            self._pending = [upload for upload in self._pending if upload.hold is not hold or upload.is_result]

    def pending_count(self) -> int:
        """Results that are not visible yet."""
        with self._changed:
            return sum(upload.is_result for upload in self._pending)

    def wait_for_room(self, *, give_up: Callable[[], bool]) -> bool:
        """Wait until one more result may be computed. False when `give_up` says so first."""
        while not give_up():
            with self._changed:
                if self.has_room():
                    return True
                self._changed.wait(LOOK_SECONDS)
        return False

    def has_room(self) -> bool:
        """Whether one more result may be computed."""
        with self._changed:
            results = [upload for upload in self._pending if upload.is_result]
            stored_bytes = sum(upload.size_bytes for upload in results)
            return len(results) < self._most_pending and stored_bytes < self._most_pending_bytes

    def wait_for(self, upload: Upload, seconds: float) -> bool:
        """Whether it is in the store within this time."""
        if not self._thread.is_alive():
            self.turn()
            return upload.succeeded
        upload.is_done.wait(seconds)
        return upload.succeeded

    def close(self, seconds: float) -> None:
        """Store what can be stored in this time, give the rest back to the queue, and end the thread."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.pending_count():
            if self._thread.is_alive():
                with self._changed:
                    self._changed.wait(min(LOOK_SECONDS, max(0.0, end - time.monotonic())))
            else:
                self.turn()
                time.sleep(0.05)
        with self._changed:
            self._stopped = True
            left, self._pending = self._pending, []
            self._changed.notify_all()
        for upload in left:
            if upload.is_result:
                # The thread may be storing this very one: the token decides which of the two writes counts.
                self._end(upload, Paused("this worker goes down before the results were stored"))

    def turn(self) -> None:
        """Try everything that is due, once."""
        with self._changed:
            due = [upload for upload in self._pending if upload.is_due()]
        for upload in due:
            self._try(upload)

    def _try(self, upload: Upload) -> None:
        try:
            upload.attempt()
        except Exception as error:  # noqa: BLE001 - becomes a wait or the end of this try
            connection_refresh()
            if _may_heal(error):
                self._later(upload, error)
            else:
                self._end(upload, error)
            return
        upload.succeeded = True
        if upload.is_result:
            scratch_remove(upload.hold)
            logger.info("job stored id=%s seconds=%.2f", upload.hold.job.pk, time.monotonic() - upload.since)
        self._forget(upload)

    def _later(self, upload: Upload, error: Exception) -> None:
        delay = upload.backoff.next_delay()
        if delay is None:
            upload.backoff = Backoff()
            delay = upload.backoff.cap_seconds
        upload.due_at = time.monotonic() + delay
        if upload.is_result:
            minutes = (time.monotonic() - upload.since) / 60
            upload.hold.say(f"the store is away, waiting for {minutes:.0f} min" if minutes >= 1 else "storing, again")
        logger.warning(
            "store failed id=%s result=%s in_seconds=%.1f reason=%s: %s",
            upload.hold.job.pk, upload.is_result, delay, type(error).__name__, error,
        )  # fmt: skip

    def _end(self, upload: Upload, error: Exception) -> None:
        if upload.is_result:
            job_end(upload.hold, error)
        else:  # A training goes on without it: the next checkpoint is due soon.
            logger.warning("checkpoint not stored id=%s reason=%r", upload.hold.job.pk, error)
        self._forget(upload)

    def _forget(self, upload: Upload) -> None:
        if upload.is_result:
            self._heartbeat.let_go(upload.hold)
        with self._changed:
            self._pending = [other for other in self._pending if other is not upload]
            self._changed.notify_all()
        upload.is_done.set()

    def _run(self) -> None:
        while not self._stopped:
            self.turn()
            with self._changed:
                if not self._pending and not self._stopped:
                    if not self._changed.wait(IDLE_SECONDS):
                        connection.close()
                elif not any(upload.is_due() for upload in self._pending):
                    self._changed.wait(LOOK_SECONDS)
        connection.close()


def _may_heal(error: Exception) -> bool:
    """Results are worth more than a store's bad answer: also what only an operator can mend is waited for."""
    return is_transient(error) or isinstance(error, ClientError | BotoCoreError)
