"""A thread of a GPU process that gives back the memory of bases that nobody has asked for in a while."""

import logging
import threading
from collections.abc import Callable

from gpu_worker.pipelines import PipelinePool

logger = logging.getLogger(__name__)


class IdleRelease(threading.Thread):
    """Looks a few times per `idle_seconds`. Start it in the child, after the fork.

    Args:
        busy: Whether the process works on a job now; then nothing is released. A job that begins between this
            question and the release gets its base from the pool under the pool's lock: it finds it, or loads it anew.
    """

    def __init__(self, pool: PipelinePool, *, idle_seconds: float, busy: Callable[[], bool]) -> None:
        super().__init__(name="idle-release", daemon=True)
        self._pool, self._idle_seconds, self._busy = pool, idle_seconds, busy
        self._ending = threading.Event()

    def run(self) -> None:
        """Until the process ends."""
        while not self._ending.wait(min(self._idle_seconds / 4, 15.0)):
            if not self._busy():
                self._pool.release_idle(self._idle_seconds)

    def stop(self) -> None:
        """For tests; a worker process just ends."""
        self._ending.set()
        self.join()
