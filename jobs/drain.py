"""What a task does with a doorbell: claim, compute, store, publish, and again until nothing is left to claim.

Holds the only place where every exception of a job is turned into an end or a retry.
"""

import errno
import logging
import time
import traceback
from collections.abc import Callable
from typing import Protocol

from django.conf import settings
from django.db import DatabaseError, transaction

from core.errors import Cancelled, CoreError, Paused
from jobs import lifecycle
from jobs.claims import job_claim
from jobs.errors import JobsError, LeaseLost
from jobs.heartbeat import Fenced, Hold
from jobs.scratch import scratch_remove
from jobs.status import JobKind
from jobs.worker_context import current

logger = logging.getLogger(__name__)

STORE_RETRY_SECONDS = 30.0
"""Delay before results that could not be stored are tried again, times the attempts so far, at most 10 minutes."""


class JobWork(Protocol):
    """One claimed job on its way. The three parts run in this order."""

    def compute(self) -> None:
        """Do the work into local files. Calls `hold.report` between steps."""

    def store(self) -> None:
        """Put the files into the artifact store; nothing is visible yet."""

    def record(self) -> None:
        """Write the result rows. Runs in the transaction that ends the job."""


class StoreFailed(Exception):
    """The results are computed but could not be stored; the job is worth another try."""


def drain(kind: JobKind, start: Callable[[Hold], JobWork]) -> None:
    """Work on jobs of one kind until none is claimable, the time is up, or the worker must go."""
    context = current()
    end = time.monotonic() + settings.LORASITE["DRAIN_SECONDS"]
    while time.monotonic() < end and not context.shutdown.is_raised:
        claim = job_claim(kinds=[kind], worker=context.worker)
        if claim is None:
            return
        with context.heartbeat.holding(claim) as hold:
            run(hold, start)


def run(hold: Hold, start: Callable[[Hold], JobWork]) -> None:
    """Take one claimed job to its end. Never raises for what a job can do wrong; a lost lease is only logged."""
    job_id, token, kind = hold.job.pk, hold.token, hold.job.kind
    began = time.monotonic()
    logger.info("job started id=%s kind=%s token=%s", job_id, kind, token)
    try:
        try:
            work = start(hold)
            try:
                work.compute()
            finally:
                hold.write_progress()
            hold.check()
            lifecycle.job_uploading(job_id=job_id, token=token)
            _store(work)
            hold.check()
            with transaction.atomic():
                work.record()
                lifecycle.job_succeed(job_id=job_id, token=token)
        except Cancelled:
            lifecycle.job_cancelled(job_id=job_id, token=token)
        except Paused as pause:
            lifecycle.job_release(job_id=job_id, token=token, reason=str(pause))
        except StoreFailed as error:
            delay = min(600.0, STORE_RETRY_SECONDS * hold.job.attempts_count)
            lifecycle.job_release(job_id=job_id, token=token, reason=str(error), delay_seconds=delay)
        except (CoreError, JobsError) as error:
            if isinstance(error, LeaseLost):
                raise
            logger.warning("job failed id=%s code=%s message=%s", job_id, error.code, error)
            lifecycle.job_fail(job_id=job_id, token=token, code=error.code, message=str(error))
        except DatabaseError:
            raise
        except Exception as error:
            if isinstance(error, Fenced):
                raise
            logger.exception("job failed id=%s code=internal", job_id)
            code, message = _surprise(error)
            lifecycle.job_fail(
                job_id=job_id, token=token, code=code, message=message, traceback=traceback.format_exc()[-20_000:]
            )
    except (Fenced, LeaseLost) as lost:
        logger.warning("job dropped id=%s token=%s reason=%s", job_id, token, lost)
    except DatabaseError:
        # Nothing can be recorded now. The lease runs out and another worker goes on from the last checkpoint.
        logger.exception("job abandoned id=%s token=%s reason=database", job_id, token)
    finally:
        scratch_remove(hold)
    logger.info("job finished id=%s kind=%s token=%s seconds=%.1f", job_id, kind, token, time.monotonic() - began)


def _store(work: JobWork) -> None:
    try:
        work.store()
    except (CoreError, JobsError, DatabaseError, Cancelled, Paused, Fenced):
        raise
    except Exception as error:
        raise StoreFailed(f"results could not be stored ({type(error).__name__}: {error})") from error


def _surprise(error: Exception) -> tuple[str, str]:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full", "The worker's disk is full. Ask an operator to free space, then retry."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "oom", "The worker ran out of memory. Use smaller pictures or a smaller batch, then retry."
    return "internal", f"Something unexpected went wrong ({type(error).__name__}). An operator can see the details."
