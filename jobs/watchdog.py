"""The watchdog thread of a worker process: work or a heartbeat that makes no step any more costs its process.

A thread cannot stop a stuck one, so the process ends; Celery's pool starts its successor.
"""

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Callable

from django.conf import settings
from django.db import DatabaseError, connection

from core.failpoints import side_effect
from jobs import lifecycle
from jobs.errors import LeaseLost
from jobs.heartbeat import Heartbeat, Hold
from jobs.models import Job
from jobs.status import AttemptOutcome

logger = logging.getLogger(__name__)

EXIT_STUCK = 70
CLOSING_SECONDS = 10.0
"""For closing the tries in the database; afterwards the process ends all the same, and the leases run out."""


class Watchdog:
    """One per process.

    Args:
        heartbeat: Knows what is held.
        end_process: Ends this process at once with an exit code.
    """

    def __init__(self, heartbeat: Heartbeat, *, end_process: Callable[[int], None] = os._exit) -> None:
        self._heartbeat, self._end_process = heartbeat, end_process
        self._stop = threading.Event()

    def start(self) -> None:
        """Begin to watch. Call in the child, after the fork."""
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stop.set()

    def look(self) -> bool:
        """Whether a job or the heartbeat is stuck; then the tries are closed and the process ends."""
        stuck = [hold for hold in self._heartbeat.holds() if hold.overdue_seconds() > 0]
        if self._heartbeat.overdue_seconds() > 0:
            logger.critical("heartbeat stuck")
        elif not stuck:
            return False
        for hold in stuck:
            logger.critical("job stuck id=%s token=%s stage=%s", hold.job.pk, hold.token, hold.job.stage)
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        # In a thread of its own: a database that does not answer must not keep the process alive.
        closing = threading.Thread(target=self._close, args=(stuck,), daemon=True)
        closing.start()
        closing.join(CLOSING_SECONDS)
        with side_effect("process.end_stuck"):
            self._end_process(EXIT_STUCK)
        return True

    def _close(self, stuck: list[Hold]) -> None:
        for hold in self._heartbeat.holds():
            try:
                close_try(hold, is_stuck=hold in stuck)
            except (DatabaseError, Job.DoesNotExist):
                logger.exception("try of a stuck process could not be closed id=%s", hold.job.pk)
        connection.close()

    def _run(self) -> None:
        while not self._stop.wait(min(1.0, settings.LORASITE["STEP_SECONDS"] / 4)):
            try:
                if self.look():
                    return
            except Exception:
                # Nobody else would ever end this process: look again.
                logger.exception("the watchdog failed")


def close_try(hold: Hold, *, is_stuck: bool) -> None:
    """End a try of a process that ends: the stuck one is lost, what else it held goes back to the queue."""
    job = Job.objects.get(pk=hold.job.pk)
    if job.token != hold.token:
        return
    try:
        if is_stuck:
            reason = f"no step for {settings.LORASITE['STEP_SECONDS']:g} s"
            lifecycle.job_lost(job=job, reason=reason, outcome=AttemptOutcome.LOST, only_expired=False)
        else:
            lifecycle.job_release(
                job_id=job.pk,
                token=hold.token,
                reason="another job or the heartbeat of its process was stuck, so that was replaced",
            )
    except LeaseLost:
        logger.info("try ended meanwhile id=%s token=%s", job.pk, hold.token)
