"""Errors of a GPU process."""


class WorkerError(Exception):
    """Base class. Do not raise directly."""


class RuntimeNotReady(WorkerError):
    """Work arrived before `gpu_worker.runtime.start` was called in this process."""
