"""Worker processes as the database sees them, and who leads the dispatchers."""

import uuid

from django.db import models

from jobs.status import WorkerState


class WorkerProcess(models.Model):
    """One worker child process: where it runs, what it serves, what it keeps warm, when it was last heard."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    host = models.CharField(max_length=200)
    pid = models.PositiveIntegerField()
    queues = models.JSONField(default=list, help_text="Celery queues it serves.")
    device = models.CharField(max_length=60, blank=True, default="", help_text="cpu, cuda:0 ...")
    state = models.CharField(max_length=20, choices=WorkerState.choices, default=WorkerState.STARTING)
    warm_bases = models.JSONField(default=list, help_text="Fingerprints of the loaded base models.")
    started_at = models.DateTimeField(auto_now_add=True)
    heartbeat_at = models.DateTimeField()
    spec_version = models.PositiveSmallIntegerField(db_default=1, help_text="Newest job specification it understands.")

    class Meta:
        ordering = ["-started_at"]
        verbose_name_plural = "worker processes"

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"


class LeaderLease(models.Model):
    """One row per role; whoever holds an unexpired lease acts (the dispatcher)."""

    role = models.CharField(max_length=40, primary_key=True)
    holder = models.CharField(max_length=200)
    token = models.PositiveBigIntegerField(default=0)
    lease_until = models.DateTimeField()
    beat_at = models.DateTimeField()

    def __str__(self) -> str:
        return f"{self.role}: {self.holder}"
