"""Kinds and states of jobs, and the one transition table. Only `jobs/taking.py` and `jobs/lifecycle.py` write one."""

from django.db.models import TextChoices


class JobKind(TextChoices):
    """What a job does; each kind has one Celery task and one queue."""

    PREPROCESS = "preprocess", "Prepare a dataset"
    PREPARE_BASE = "prepare_base", "Prepare a base model"
    IMPORT_LORA = "import_lora", "Import a LoRA file"
    TRAIN = "train", "Train a LoRA"
    GENERATE = "generate", "Generate images"


QUEUES: dict[JobKind, str] = {
    JobKind.PREPROCESS: "cpu",
    JobKind.IMPORT_LORA: "cpu",
    JobKind.PREPARE_BASE: "gpu",
    JobKind.TRAIN: "gpu",
    JobKind.GENERATE: "gpu",
}
"""The Celery queue of each kind. An operator may split further with Celery's own routing."""


class JobState(TextChoices):
    """Where a job stands. The last four are final and never change."""

    QUEUED = "queued", "Waiting for a worker"
    RUNNING = "running", "A worker holds the lease"
    UPLOADING = "uploading", "Computed; results are being stored"
    SUCCEEDED = "succeeded", "Results are visible"
    FAILED = "failed", "Ended with an error code and a sentence"
    CANCELLED = "cancelled", "Stopped on request"
    EXPIRED = "expired", "Waited past its deadline without starting"


LEASED = frozenset({JobState.RUNNING, JobState.UPLOADING})
"""A worker holds lease and token."""

ACTIVE = frozenset({JobState.QUEUED, JobState.RUNNING, JobState.UPLOADING})
TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.UPLOADING, JobState.FAILED, JobState.CANCELLED}),
    JobState.UPLOADING: frozenset({JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
    JobState.EXPIRED: frozenset(),
}
"""Allowed changes: from -> to. Everything else raises `InvalidTransition`."""


def sources_of(target: JobState) -> frozenset[JobState]:
    """States from which `target` may be reached."""
    return frozenset(state for state, targets in TRANSITIONS.items() if target in targets)


class AttemptOutcome(TextChoices):
    """How one try of a job ended."""

    SUCCEEDED = "succeeded", "Published its results"
    FAILED = "failed", "Raised an error"
    LOST = "lost", "The lease ran out: worker killed, frozen or cut off"
    RELEASED = "released", "The worker gave the job back (shutdown)"
    PREEMPTED = "preempted", "The job made room for interactive work"
    OUT_OF_MEMORY = "oom", "The device had too little memory; the next try saves some"
    DEVICE_ERROR = "device_error", "The device failed; its process was replaced"
    CANCELLED = "cancelled", "Stopped on request"


INTERACTIVE = frozenset({JobKind.GENERATE})
"""Kinds that somebody sits and waits for; a training makes room for them."""


class WorkerState(TextChoices):
    """Life of one worker child process."""

    STARTING = "starting", "Loading its keep-warm models"
    READY = "ready", "Waiting for or doing work"
    GONE = "gone", "Stopped, or its heartbeat is old"


class Visibility(TextChoices):
    """Who may see a LoRA."""

    PRIVATE = "private", "Only its owner"
    PUBLIC = "public", "Everyone with an account"
