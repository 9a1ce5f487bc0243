"""What became of jobs over time: their tries and state changes, on a job's page and as lists of their own."""

from django.contrib import admin
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.decorators import display

from jobs.admin.readonly import ReadOnlyAdmin, ReadOnlyInline, state_label
from jobs.models import JobAttempt, JobEvent


class JobAttemptInline(ReadOnlyInline):
    """Every try of the job."""

    model = JobAttempt
    fields = [
        "token",
        "worker_name",
        "started_at",
        "ended_at",
        "outcome",
        "reason",
        "from_step",
        "to_step",
        "memory_rung",
    ]
    readonly_fields = fields


class JobEventInline(ReadOnlyInline):
    """Every change of the job's state."""

    model = JobEvent
    fields = ["at", "change", "reason", "token"]
    readonly_fields = fields

    @display(description="Change")
    def change(self, event: JobEvent) -> SafeString:
        """From state to state."""
        return state_change(event)


@admin.register(JobAttempt)
class JobAttemptAdmin(ReadOnlyAdmin):
    """Tries of all jobs: which workers lose work, and why."""

    list_display = [
        "__str__",
        "worker_name",
        "outcome_column",
        "reason",
        "from_step",
        "to_step",
        "memory_rung",
        "started_at",
        "ended_at",
    ]
    list_filter = ["outcome", "started_at"]
    search_fields = ["job__id", "worker_name", "reason"]
    list_select_related = ["job"]

    @display(
        description="Outcome",
        ordering="outcome",
        label={
            "succeeded": "success",
            "failed": "danger",
            "lost": "danger",
            "released": "info",
            "preempted": "info",
            "oom": "warning",
            "device_error": "danger",
            "cancelled": "warning",
            "running": "primary",
        },
    )
    def outcome_column(self, attempt: JobAttempt) -> str:
        """How it ended."""
        return attempt.outcome or "running"


@admin.register(JobEvent)
class JobEventAdmin(ReadOnlyAdmin):
    """State changes of all jobs, newest first: the log of what happened when."""

    list_display = ["at", "job", "change", "reason", "token"]
    list_filter = ["new_state", "at"]
    search_fields = ["job__id", "reason"]
    list_select_related = ["job"]
    ordering = ["-id"]

    @display(description="Change", ordering="new_state")
    def change(self, event: JobEvent) -> SafeString:
        """From state to state."""
        return state_change(event)


def state_change(event: JobEvent) -> SafeString:
    """Both states as coloured labels."""
    if not event.old_state:
        return state_label(event.new_state)
    return format_html("{} → {}", state_label(event.old_state), state_label(event.new_state))
