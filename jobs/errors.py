"""Errors of the records and their rules; the API turns each into one JSON shape."""


class JobsError(Exception):
    """Base class. Do not raise directly. `code` and `http_status` are what the API answers."""

    code = "jobs_error"
    http_status = 400


class InvalidInput(JobsError):
    """A request that can never work as sent."""

    code = "invalid"


class NotFound(JobsError):
    """No such row, or it belongs to somebody else: both look the same."""

    code = "not_found"
    http_status = 404


class NotReady(JobsError):
    """The thing exists, but must be finished or prepared first."""

    code = "not_ready"
    http_status = 409


class Conflict(JobsError):
    """The row is in a state that forbids the change."""

    code = "conflict"
    http_status = 409


class IdempotencyMismatch(JobsError):
    """The same Idempotency-Key came with another body."""

    code = "idempotency_mismatch"
    http_status = 422


class TooBusy(JobsError):
    """A limit on waiting work is reached. `code` says which; come back after `retry_after_seconds`."""

    code = "too_many_jobs"
    http_status = 429

    def __init__(self, message: str, *, code: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.code, self.retry_after_seconds = code, retry_after_seconds


class InvalidTransition(JobsError):
    """A job state change that the transition table does not know."""

    code = "invalid_transition"
    http_status = 409


class LeaseLost(JobsError):
    """This attempt is fenced: another one holds the job, or its lease ran out. Publish nothing."""

    code = "lease_lost"
    http_status = 409


class ArtifactDamaged(JobsError):
    """Stored bytes do not have the hash that their name promises."""

    code = "artifact_damaged"
    http_status = 500


class ArtifactMissing(JobsError):
    """The store may not hold these bytes any more: store them again, then record the reference."""

    code = "artifact_missing"
    http_status = 503
