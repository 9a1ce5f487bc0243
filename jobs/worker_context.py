"""What one worker child process knows about itself: its row, its heartbeat, and whether it must go.

Set by `lorasite/celery.py` when the child starts; read by the tasks.
"""

import mmap
from dataclasses import dataclass

from jobs.heartbeat import Heartbeat
from jobs.models import WorkerProcess


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


@dataclass(frozen=True)
class WorkerContext:
    """One per child process."""

    worker: WorkerProcess
    heartbeat: Heartbeat
    shutdown: ShutdownFlag


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
