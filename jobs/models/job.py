"""The job row, its attempts and its events: the database row is the job."""

from typing import Self

from django.db import models
from django.db.models.functions import Now

from jobs.models.record import OwnedQuerySet, OwnedRecord
from jobs.status import ACTIVE, LEASED, TERMINAL, AttemptOutcome, JobKind, JobState

SPEC_VERSION = 3
"""Newest that this code understands; raise it when a specification may hold what older code does not."""


class JobQuerySet(OwnedQuerySet):
    """Querysets that read as words."""

    def claimable(self) -> Self:
        """Queued, due, not past its deadline, not asked to stop, of a specification that this code understands."""
        due = models.Q(not_before__isnull=True) | models.Q(not_before__lte=Now())
        due &= models.Q(deadline__isnull=True) | models.Q(deadline__gt=Now())
        return self.filter(due, state=JobState.QUEUED, cancel_requested_at__isnull=True, spec_version__lte=SPEC_VERSION)

    def active(self) -> Self:
        """Not ended yet."""
        return self.filter(state__in=ACTIVE)

    def leased(self) -> Self:
        """Held by a worker."""
        return self.filter(state__in=LEASED)

    def lease_expired(self) -> Self:
        """Held by a worker that no longer renews; only the database clock decides."""
        return self.leased().filter(lease_until__lt=Now())


class Job(OwnedRecord):
    """One piece of work. Only `jobs/taking.py` and `jobs/lifecycle.py` write `state`, by guarded updates.

    `token` is the fencing token: it grows with every claim, and every write of a worker names the token it got.
    """

    kind = models.CharField(max_length=20, choices=JobKind.choices)
    state = models.CharField(max_length=20, choices=JobState.choices, default=JobState.QUEUED)
    spec = models.JSONField(help_text="The configuration's full dump.")
    spec_version = models.PositiveSmallIntegerField(
        db_default=1,
        help_text="Workers take jobs up to their own version only: deploys can be rolling.",
    )
    spec_hash = models.CharField(max_length=64)
    idempotency_key = models.CharField(max_length=200, null=True, blank=True)  # noqa: DJ001 - NULLs do not collide
    request_hash = models.CharField(max_length=64, blank=True, default="", help_text="Of the submitted request body.")
    priority = models.SmallIntegerField(default=0, help_text="Higher goes first among one person's jobs.")
    base_model = models.ForeignKey(
        "jobs.BaseModel", null=True, blank=True, on_delete=models.PROTECT, related_name="jobs"
    )
    batch_key = models.CharField(
        max_length=64, blank=True, db_default="", help_text="Requests with the same key may share one forward."
    )
    estimated_seconds = models.FloatField(db_default=0.0, help_text="Worker seconds that it will probably take.")
    queued_at = models.DateTimeField(db_default=Now(), help_text="When it last began to wait.")

    token = models.PositiveBigIntegerField(default=0)
    worker = models.ForeignKey(
        "jobs.WorkerProcess", null=True, blank=True, on_delete=models.SET_NULL, related_name="held_jobs"
    )
    lease_until = models.DateTimeField(null=True, blank=True)
    not_before = models.DateTimeField(null=True, blank=True, help_text="Retry delay: not claimed before this time.")
    deadline = models.DateTimeField(null=True, blank=True, help_text="EXPIRED when still queued then.")
    cancel_requested_at = models.DateTimeField(null=True, blank=True)
    yield_requested_at = models.DateTimeField(
        null=True, blank=True, help_text="Interactive work waits: save a checkpoint and go back to the queue."
    )
    yielded_at = models.DateTimeField(null=True, blank=True, help_text="When it last made room.")

    attempts_count = models.PositiveIntegerField(default=0, help_text="Claims so far.")
    barren_losses = models.PositiveIntegerField(default=0, help_text="Losses in a row without checkpoint progress.")
    store_retries = models.PositiveSmallIntegerField(db_default=0, help_text="Releases because the store was away.")
    surprise_retries = models.PositiveSmallIntegerField(db_default=0, help_text="Tries that ended in a program error.")
    memory_rung = models.PositiveSmallIntegerField(
        db_default=0, help_text="How far down the ladder of memory savings it is; 0 is the fastest way."
    )
    checkpoint = models.JSONField(null=True, blank=True, help_text="{file name: sha256} of the newest checkpoint.")
    checkpoint_step = models.PositiveIntegerField(default=0)

    stage = models.CharField(max_length=60, blank=True, default="")
    progress_step = models.PositiveIntegerField(default=0)
    progress_total = models.PositiveIntegerField(default=0)
    figures = models.JSONField(default=dict, help_text="Newest loss, speed and the like.")

    error_code = models.CharField(max_length=40, blank=True, default="")
    error_message = models.TextField(blank=True, default="")
    error_traceback = models.TextField(blank=True, default="", help_text="For staff only.")

    started_at = models.DateTimeField(null=True, blank=True, help_text="First claim.")
    finished_at = models.DateTimeField(null=True, blank=True)
    used_worker_seconds = models.FloatField(default=0.0, help_text="Sum over all attempts.")

    objects = JobQuerySet.as_manager()  # type: ignore[misc]

    class Meta:
        ordering = ["-created_at"]
        indexes = [
            models.Index(fields=["state", "kind", "created_at"], name="job_queue"),
            models.Index(fields=["owner", "-created_at"], name="job_of_owner"),
            # Small whatever the history: only what waits, and only what is held.
            models.Index(
                fields=["kind", "owner", "-priority", "created_at"],
                name="job_waiting",
                condition=models.Q(state=JobState.QUEUED),
            ),
            models.Index(fields=["lease_until"], name="job_leased", condition=models.Q(state__in=sorted(LEASED))),
        ]
        constraints = [
            models.UniqueConstraint(fields=["owner", "idempotency_key"], name="job_idempotency_key_unique_per_owner"),
            models.CheckConstraint(condition=models.Q(kind__in=JobKind.values), name="job_kind_known"),
            models.CheckConstraint(condition=models.Q(state__in=JobState.values), name="job_state_known"),
            models.CheckConstraint(
                condition=models.Q(state__in=sorted(LEASED), lease_until__isnull=False)
                | (~models.Q(state__in=sorted(LEASED)) & models.Q(lease_until__isnull=True)),
                name="job_lease_exactly_while_held",
            ),
            models.CheckConstraint(
                condition=models.Q(state__in=sorted(TERMINAL), finished_at__isnull=False)
                | (~models.Q(state__in=sorted(TERMINAL)) & models.Q(finished_at__isnull=True)),
                name="job_finished_exactly_when_final",
            ),
            models.CheckConstraint(
                condition=~models.Q(state=JobState.FAILED) | ~models.Q(error_code=""), name="job_failure_has_a_code"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.kind} {str(self.id)[:8]}"

    @property
    def progress_percent(self) -> int:
        """0-100; 100 only when succeeded."""
        if self.state == JobState.SUCCEEDED:
            return 100
        return min(99, 100 * self.progress_step // self.progress_total) if self.progress_total else 0


class JobAttempt(models.Model):
    """One try of a job by one worker, kept for the person to see."""

    id = models.BigAutoField(primary_key=True)
    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="attempts")
    token = models.PositiveBigIntegerField()
    worker = models.ForeignKey("jobs.WorkerProcess", null=True, on_delete=models.SET_NULL, related_name="attempts")
    worker_name = models.CharField(max_length=200)
    started_at = models.DateTimeField()
    ended_at = models.DateTimeField(null=True, blank=True)
    outcome = models.CharField(max_length=20, choices=AttemptOutcome.choices, blank=True, default="")
    reason = models.TextField(blank=True, default="")
    from_step = models.PositiveIntegerField(default=0, help_text="Step that the try went on from.")
    to_step = models.PositiveIntegerField(default=0, help_text="Last step that it left behind.")
    memory_rung = models.PositiveSmallIntegerField(db_default=0, help_text="Memory savings in force; 0 is none.")

    class Meta:
        ordering = ["token"]
        constraints = [
            models.UniqueConstraint(fields=["job", "token"], name="attempt_token_unique_per_job"),
            models.UniqueConstraint(
                fields=["job"], condition=models.Q(ended_at__isnull=True), name="attempt_one_open_per_job"
            ),
            models.CheckConstraint(
                condition=models.Q(ended_at__isnull=True, outcome="")
                | (models.Q(ended_at__isnull=False) & ~models.Q(outcome="")),
                name="attempt_outcome_exactly_when_ended",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.job} attempt {self.token}"


class JobPreview(models.Model):
    """The newest look at a running job's first picture; there while it runs."""

    job = models.OneToOneField(Job, primary_key=True, on_delete=models.CASCADE, related_name="preview")
    token = models.PositiveBigIntegerField(help_text="Of the attempt that drew it.")
    step = models.PositiveIntegerField(help_text="Denoising steps done.")
    jpeg = models.BinaryField(max_length=16 * 1024)
    at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ["-at"]

    def __str__(self) -> str:
        return f"{self.job_id} at step {self.step}"


class JobEvent(models.Model):
    """One state change of a job; the bigint id serves as a cursor."""

    id = models.BigAutoField(primary_key=True)
    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="events")
    at = models.DateTimeField()
    old_state = models.CharField(max_length=20, choices=JobState.choices, blank=True, default="")
    new_state = models.CharField(max_length=20, choices=JobState.choices)
    token = models.PositiveBigIntegerField(default=0)
    reason = models.CharField(max_length=300, blank=True, default="")

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return f"{self.job}: {self.old_state or 'new'} → {self.new_state}"
