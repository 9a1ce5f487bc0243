"""Jobs that are computed together: each from its claim to the uploader, or to the end of its try, on its own time.

Called by `jobs/drain.py`; what they compute together is none of its business.
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from core.failpoints import side_effect
from jobs import lifecycle
from jobs.endings import job_end
from jobs.faults import Remedy, fault_of
from jobs.heartbeat import Hold
from jobs.uploader import result_upload
from jobs.worker_context import WorkerContext

logger = logging.getLogger(__name__)

SHARED_FATES = frozenset(
    {Remedy.WAIT, Remedy.SAVE_MEMORY, Remedy.NEW_PROCESS, Remedy.FREE_DISK, Remedy.ABANDON, Remedy.RELEASE}
)
"""Faults of the machine or its surroundings, which meet all requests of a forward alike."""


class JobWork(Protocol):
    """One claimed job on its way. The parts run in this order; `store` and `record` in the uploader's thread."""

    hold: Hold

    def compute(self) -> None:
        """Do the work into local files. Calls `hold.report` between steps."""

    def files(self) -> list[Path]:
        """What was computed, all of it in local files."""

    def store(self) -> None:
        """Put the files into the artifact store, one try each; nothing is visible yet. May be called again."""

    def record(self) -> None:
        """Write the result rows. Runs in the transaction that ends the job."""


Start = Callable[[Hold], JobWork]
Join = Callable[[int], Sequence[Hold]]
"""Jobs that may be taken along now, at most so many pictures in all."""
Together = Callable[[Sequence[Any], Callable[[int], Sequence[Any]], Callable[[Any, Exception | None], None]], None]
"""Computes several works: takes the first ones, a way to get more, and whom to tell of each what stopped it, or None.

Raises what stopped all works that it has told nothing of."""


def nobody(room: int) -> Sequence[Hold]:
    """A `Join` for jobs that keep to themselves."""
    return ()


class Company:
    """The jobs of one run.

    Args:
        join: Asked for more while `together` computes.
    """

    def __init__(self, context: WorkerContext, start: Start, *, join: Join = nobody) -> None:
        self._context, self._start, self._join = context, start, join
        self._under_way: dict[JobWork, ExitStack] = {}
        self.remedies: set[Remedy] = set()
        """What had to be done about those that did not come as far as the uploader."""
        self.count = 0

    def compute(self, holds: Sequence[Hold], together: Together | None) -> None:
        """Take these and all that join to the uploader, or to their end."""
        works = self._admit(holds)
        if works and together is not None:
            try:
                together(works, lambda room: self._admit(self._join(room)), self._done)
            except Exception as error:
                if fault_of(error).remedy in SHARED_FATES or self.count == 1:
                    for work in tuple(self._under_way):
                        self._done(work, error)
                else:
                    # It may be the fault, or the wish, of one of them: nobody else may suffer from it.
                    logger.exception("jobs could not be computed together count=%d", self.count)
        self._compute_one_by_one()

    def _compute_one_by_one(self) -> None:
        for computing in self._under_way.values():
            computing.close()  # Whose turn comes later may be silent until then.
        for work in tuple(self._under_way):
            error = None
            try:
                with work.hold.computing():
                    work.compute()
            except Exception as stopped:  # noqa: BLE001 - becomes the end of this try
                error = stopped
            self._done(work, error)

    def _admit(self, holds: Sequence[Hold]) -> list[JobWork]:
        works = []
        for hold in holds:
            self.count += 1
            logger.info("job started id=%s kind=%s token=%s", hold.job.pk, hold.job.kind, hold.token)
            try:
                work = self._start(hold)
            except Exception as error:  # noqa: BLE001 - becomes the end of this try
                self._end(hold, error)
                continue
            self._under_way[work] = ExitStack()
            self._under_way[work].enter_context(hold.computing())
            works.append(work)
        return works

    def _done(self, work: JobWork, error: Exception | None) -> None:
        self._under_way.pop(work).close()
        error = error or self._hand_over(work)
        if error is not None:
            self._end(work.hold, error)

    def _hand_over(self, work: JobWork) -> Exception | None:
        """Computed files are safe on this disk: the job is UPLOADING, nobody waits for its upload."""
        hold = work.hold
        try:
            hold.write_progress()
            hold.check()
            size_bytes = 0
            for path in work.files():
                size_bytes += path.stat().st_size
                _sync(path)
            lifecycle.job_uploading(job_id=hold.job.pk, token=hold.token)
        except Exception as error:  # noqa: BLE001 - becomes the end of this try
            return error
        self._context.uploader.drop_checkpoints(hold)
        self._context.uploader.add(result_upload(hold, work, size_bytes=size_bytes))
        return None

    def _end(self, hold: Hold, error: Exception) -> None:
        self._context.uploader.drop_checkpoints(hold)
        self.remedies.add(job_end(hold, error))
        self._context.heartbeat.let_go(hold)


def _sync(path: Path) -> None:
    with side_effect("result.sync"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
