"""What one worker child process knows about itself: its row, its threads, whether it must go, and how it goes.

Set by `lorasite/celery.py` when the child starts; read by the tasks.
"""

import logging
import mmap
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from django.db import DatabaseError

from core.failpoints import side_effect
from jobs.faults import Remedy
from jobs.heartbeat import Heartbeat
from jobs.models import WorkerProcess
from jobs.prefetch import Prefetcher
from jobs.uploader import Uploader
from jobs.workers import worker_gone

logger = logging.getLogger(__name__)

EXIT_RECYCLE = 0x9B
"""billiard's own code of a child that wants a successor: its pool starts one and says nothing."""
EXIT_DELAY_SECONDS = 0.5
"""Between the end of the last task and the exit, so that the parent has heard of that end."""
LAST_UPLOADS_SECONDS = 10.0
"""For uploads when the process goes; what is not stored by then goes back to the queue."""
MAX_OUT_OF_MEMORY = 2
"""Then the process is replaced: what it could not free by itself, the operating system frees."""


class ShutdownFlag:
    """One shared byte, made before the fork: the parent raises it, the children read it.

    No lock on purpose: a child killed while holding one would hang the parent's signal handler.
    """

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def raise_flag(self) -> None:
        """Tell all children that the worker is going down."""
        self._byte[0] = 1

    @property
    def is_raised(self) -> bool:
        """Whether the worker is going down."""
        return self._byte[0] == 1


def resident_bytes() -> int:
    """Memory that this process holds now; pages shared with its parent are included, pages of files are not."""
    resident, of_files = Path("/proc/self/statm").read_text().split()[1:3]
    # Mapped weights are pages of files: the kernel takes them back when it wants, and all processes share them.
    return (int(resident) - int(of_files)) * os.sysconf("SC_PAGE_SIZE")


def machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class WorkerContext:
    """One per child process.

    Args:
        free_memory: Gives back to the device what caches hold; called after running out of memory.
        memory_limit_bytes: Above this between two jobs, the process is replaced. 0: never.
        end_process: Ends this process with an exit code some moments from now.
        prefetch: Fetches ahead for the next jobs, where the process serves a GPU.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        heartbeat: Heartbeat,
        shutdown: ShutdownFlag,
        uploader: Uploader | None = None,
        *,
        free_memory: Callable[[], None] = lambda: None,
        memory_limit_bytes: int = 0,
        end_process: Callable[[int], None] | None = None,
        prefetch: Prefetcher | None = None,
    ) -> None:
        self.worker, self.heartbeat, self.shutdown = worker, heartbeat, shutdown
        self.uploader = uploader or Uploader(heartbeat)
        self.prefetch = prefetch
        self.leaving = ""
        """Why this process should be replaced; empty: it should not."""
        self._free_memory, self._memory_limit_bytes = free_memory, memory_limit_bytes
        self._end_process = end_process or _end_process_soon
        self._out_of_memory_count = 0
        self._has_left = False
        self._has_worked = False

    def may_claim(self) -> bool:
        """Whether this process may begin another job."""
        # Only after some work: a limit below what a fresh process holds would let it do nothing for ever.
        if self._memory_limit_bytes and self._has_worked and (held := resident_bytes()) > self._memory_limit_bytes:
            self.leaving = self.leaving or f"it holds {held >> 20} MiB, more than {self._memory_limit_bytes >> 20}"
        # Nobody would renew the lease of a job that begins while the heartbeat hangs: three losses make it poison.
        return not self.leaving and not self.shutdown.is_raised and not self.heartbeat.is_late()

    def after_faults(self, remedies: Collection[Remedy]) -> None:
        """Draw the consequences for the process of how the last jobs ended. Call after each work."""
        self._has_worked = True
        if Remedy.SAVE_MEMORY in remedies:
            self._free_memory()
            self._out_of_memory_count += 1
            if self._out_of_memory_count >= MAX_OUT_OF_MEMORY:
                self.leaving = f"it ran out of memory {self._out_of_memory_count} times"
        if Remedy.NEW_PROCESS in remedies:
            self.leaving = "its device failed"

    def leave_if_due(self) -> None:
        """Finish uploads and end the process, where something says so. Call as the last act of a task."""
        if not self.leaving or self._has_left:
            return
        logger.warning("worker process is replaced worker=%s reason=%s", self.worker, self.leaving)
        self.go()
        with side_effect("process.recycle"):
            self._end_process(EXIT_RECYCLE)

    def go(self) -> None:
        """Store or give back what is held, and sign off. Safe to call twice."""
        if self._has_left:
            return
        self._has_left = True
        if self.prefetch is not None:
            self.prefetch.stop()
        self.uploader.close(LAST_UPLOADS_SECONDS)
        self.heartbeat.stop()
        try:
            worker_gone(worker=self.worker)
        except DatabaseError:
            logger.exception("worker could not sign off worker=%s", self.worker)


def _end_process_soon(code: int) -> None:
    # From a thread: the task has to return first, or its doorbell would count as lost with the process.
    timer = threading.Timer(EXIT_DELAY_SECONDS, os._exit, (code,))
    timer.daemon = True
    timer.start()


_context: WorkerContext | None = None


def enter(context: WorkerContext) -> None:
    """Make `context` this process's own."""
    global _context
    _context = context


def current() -> WorkerContext:
    """This process's context.

    Raises:
        RuntimeError: The process is no worker child.
    """
    if _context is None:
        raise RuntimeError("this process is no worker: start one with `celery -A lorasite worker -Q gpu`")
    return _context
