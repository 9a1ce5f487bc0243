"""Which class of retry an exception belongs to: the one table. `jobs/endings.py` acts on it.

Device and memory errors of torch are known by their names, so that a cpu worker never loads torch.
"""

import errno
from dataclasses import dataclass
from enum import Enum

from django.db import DatabaseError, DataError, IntegrityError

from core.errors import Cancelled, CoreError, Paused
from jobs.backoff import is_transient
from jobs.errors import JobsError, LeaseLost
from jobs.heartbeat import DeadlinePassed, Fenced, Preempted

MAX_STORE_RETRIES = 8
"""Releases because the store did not answer while inputs were fetched; results and checkpoints never count."""
MAX_SURPRISE_RETRIES = 1
"""Further tries after a program error: another machine may know better, a third one will not."""


class Remedy(Enum):
    """What is done about a fault."""

    DROP = "the lease is lost: publish nothing, record nothing"
    CANCEL = "somebody asked to stop"
    RELEASE = "the worker goes down: another one goes on"
    PREEMPT = "make room for interactive work"
    FAIL = "trying again cannot help"
    WAIT = "store or network are away: try later"
    SAVE_MEMORY = "try again with less memory"
    NEW_PROCESS = "the device failed: this process cannot compute any more"
    FREE_DISK = "free what is ours, try once more, then fail"
    ONCE_MORE = "a program error: one more try"
    ABANDON = "the database is away: nothing can be recorded, the lease runs out"


@dataclass(frozen=True)
class Fault:
    """An exception as a person should see it.

    Attributes:
        code: Of the job row, where it fails.
        message: One sentence.
    """

    remedy: Remedy
    code: str
    message: str


DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
DEVICE_WORDS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "device-side assert", "NCCL error")


def fault_of(error: BaseException) -> Fault:
    """The class of an exception. The order matters: the first row that fits wins."""
    text = str(error) or type(error).__name__
    match error:
        case Fenced() | LeaseLost():
            return Fault(Remedy.DROP, "lease_lost", text)
        case Cancelled():
            return Fault(Remedy.CANCEL, "cancelled", text)
        case Preempted():
            return Fault(Remedy.PREEMPT, "preempted", text)
        case Paused():
            return Fault(Remedy.RELEASE, "released", text)
        case DeadlinePassed():
            return Fault(Remedy.FAIL, "deadline", text)
        case _ if _is_disk_full(error):
            return Fault(
                Remedy.FREE_DISK, "disk_full", "The worker's disk is full. Ask an operator to free space, then retry."
            )
        # A broken rule of the database is a program error, and it says so again on every try.
        case DatabaseError() if not isinstance(error, IntegrityError | DataError):
            return Fault(Remedy.ABANDON, "database", text)
        case _ if is_transient(error):
            return Fault(Remedy.WAIT, "store_unavailable", f"the store did not answer ({type(error).__name__}: {text})")
        case CoreError() | JobsError():
            return Fault(Remedy.FAIL, error.code, text)
        case _ if _is_out_of_memory(error):
            return Fault(
                Remedy.SAVE_MEMORY,
                "oom",
                "The worker ran out of memory in every way that saves some. "
                "Use smaller pictures or a smaller batch, then retry.",
            )
        case _ if _is_device_error(error):
            return Fault(Remedy.NEW_PROCESS, "device_error", f"the device failed ({type(error).__name__}: {text:.200})")
    return Fault(
        Remedy.ONCE_MORE,
        "internal",
        f"Something unexpected went wrong ({type(error).__name__}). An operator can see the details.",
    )


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_FULL


def _is_out_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError; CUDA libraries raise a RuntimeError with the same words from their own allocations.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("out of memory" in str(error) or "ALLOC_FAILED" in str(error)))
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error))
    )


def _is_device_error(error: BaseException) -> bool:
    return type(error).__name__ == "AcceleratorError" or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in DEVICE_WORDS)
    )
