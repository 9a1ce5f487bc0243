"""Jobs in the admin: what happens, how far it is, what went wrong. Changed by the actions cancel and retry only."""

from typing import Any

from django.contrib import admin, messages
from django.db.models import Model, QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.template.loader import render_to_string
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.decorators import action, display
from unfold.enums import ActionVariant
from unfold.forms import BaseDialogForm

from core.errors import CoreError
from jobs.admin.guidance import preview_picture
from jobs.admin.job_history import JobAttemptInline, JobEventInline
from jobs.admin.readonly import (
    STATE_COLOURS,
    ReadOnlyAdmin,
    admin_url,
    duration,
    leave_dialog,
    pretty_json,
    record_link,
    state_label,
)
from jobs.errors import JobsError
from jobs.lifecycle import job_cancel
from jobs.models import Job
from jobs.retry import RETRYABLE, job_retry
from jobs.status import ACTIVE, JobState

HEAVY_COLUMNS = ("spec", "checkpoint", "error_traceback")


@admin.register(Job)
class JobAdmin(ReadOnlyAdmin):
    """Pieces of work. Rows are the truth: only the lifecycle writes them."""

    list_display = [
        "__str__",
        "owner",
        "state_column",
        "progress",
        "figures_line",
        "tries",
        "created_at",
        "waiting",
        "took",
    ]
    list_filter = ["state", "kind", "created_at"]
    search_fields = ["id", "owner__username", "error_code", "error_message"]
    readonly_fields = [
        "state_shown",
        "progress",
        "figures_line",
        "error",
        "result",
        "look",
        "waiting",
        "estimate",
        "took",
        "held_by",
        "memory",
        "shown_spec",
        "shown_checkpoint",
        "shown_traceback",
    ]
    fieldsets = [
        (None, {"fields": ["kind", "owner", "state_shown", "progress", "figures_line", "look", "error", "result"]}),
        (
            "Times",
            {
                "fields": [
                    "created_at",
                    "waiting",
                    "estimate",
                    "started_at",
                    "finished_at",
                    "took",
                    "deadline",
                    "not_before",
                ]
            },
        ),
        (
            "Worker",
            {
                "fields": [
                    "held_by",
                    "lease_until",
                    "cancel_requested_at",
                    "yield_requested_at",
                    "yielded_at",
                    "attempts_count",
                    "used_worker_seconds",
                ]
            },
        ),
        (
            "Configuration",
            {"fields": ["base_model", "priority", "shown_spec", "spec_hash", "spec_version", "batch_key"]},
        ),
        (
            "Recovery",
            {
                "fields": [
                    "checkpoint_step",
                    "shown_checkpoint",
                    "memory",
                    "barren_losses",
                    "store_retries",
                    "surprise_retries",
                    "shown_traceback",
                ]
            },
        ),
    ]
    inlines = [JobAttemptInline, JobEventInline]
    list_select_related = ["owner", "worker"]
    date_hierarchy = "created_at"
    actions = ["cancel_selected", "retry_selected"]
    actions_detail = ["cancel", "retry"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Job]:
        """Without the heavy columns; a job's page fetches its own."""
        return super().get_queryset(request).defer(*HEAVY_COLUMNS)

    def has_operate_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Who may cancel and retry: staff with the permission to change jobs, though no row is edited by hand."""
        return request.user.has_perm("jobs.change_job")

    @display(
        description="State", ordering="state", label={state.value: colour for state, colour in STATE_COLOURS.items()}
    )
    def state_column(self, job: Job) -> str:
        """The state as a coloured label."""
        return job.state

    @display(description="State")
    def state_shown(self, job: Job) -> SafeString:
        """The state as a coloured label with its meaning."""
        return format_html("{} {}", state_label(job.state), job.get_state_display())

    @display(description="Progress")
    def progress(self, job: Job) -> str | SafeString:
        """A bar with the stage, the percentage and the steps."""
        wish = " - asked to stop" if job.cancel_requested_at is not None and job.state in ACTIVE else ""
        return render_to_string(
            "jobs/admin/progress.html", {"job": job, "percent": job.progress_percent, "stage": job.stage + wish}
        )

    @display(description="Figures")
    def figures_line(self, job: Job) -> str:
        """Newest loss, speed and the like."""
        return ", ".join(f"{name} {_short(value)}" for name, value in job.figures.items()) or "-"

    @display(description="Tries", ordering="attempts_count")
    def tries(self, job: Job) -> int:
        """Claims so far."""
        return job.attempts_count

    @display(description="Error")
    def error(self, job: Job) -> str | SafeString:
        """The code and the sentence that the person sees."""
        if not job.error_code:
            return "-"
        return format_html('<span class="lrs-error"><b>{}</b> {}</span>', job.error_code, job.error_message)

    @display(description="Result")
    def result(self, job: Job) -> str | SafeString:
        """What the job was for, linked."""
        return record_link(_result(job))

    @display(description="Preview")
    def look(self, job: Job) -> str | SafeString:
        """What its first picture looks like now."""
        return preview_picture(job)

    @display(description="Took")
    def took(self, job: Job) -> str:
        """From the first claim to the end."""
        if job.started_at is None or job.finished_at is None:
            return "-"
        return duration((job.finished_at - job.started_at).total_seconds())

    @display(description="Waiting", ordering="queued_at")
    def waiting(self, job: Job) -> str:
        """How long a queued job waits since it last came into the line."""
        if job.state != JobState.QUEUED:
            return "-"
        return duration(max(0.0, (timezone.now() - job.queued_at).total_seconds()))

    @display(description="Estimate", ordering="estimated_seconds")
    def estimate(self, job: Job) -> str:
        """Worker seconds that were expected at submission."""
        return duration(job.estimated_seconds) if job.estimated_seconds else "-"

    @display(description="Memory savings")
    def memory(self, job: Job) -> str:
        """The rung of the ladder that the next try begins at."""
        return f"rung {job.memory_rung}, after running out of memory" if job.memory_rung else "none needed so far"

    @display(description="Held by")
    def held_by(self, job: Job) -> str | SafeString:
        """The worker that holds the lease."""
        return record_link(job.worker)

    @display(description="Specification")
    def shown_spec(self, job: Job) -> SafeString:
        """The configuration's full dump."""
        return pretty_json(job.spec)

    @display(description="Checkpoint files")
    def shown_checkpoint(self, job: Job) -> str | SafeString:
        """What another worker would go on from."""
        return pretty_json(job.checkpoint) if job.checkpoint else "none yet"

    @display(description="Traceback")
    def shown_traceback(self, job: Job) -> str | SafeString:
        """For staff only; the API never shows it."""
        return format_html('<pre class="lrs-json">{}</pre>', job.error_traceback) if job.error_traceback else "-"

    @action(description="Cancel selected jobs", permissions=["operate"])
    def cancel_selected(self, request: HttpRequest, queryset: QuerySet[Job]) -> None:
        """Ask for every selected job to stop."""
        for job in queryset:
            self._cancel(request, job)

    @action(description="Retry selected jobs", permissions=["operate"])
    def retry_selected(self, request: HttpRequest, queryset: QuerySet[Job]) -> None:
        """Submit each selected job again."""
        for job in queryset:
            self._retry(request, job)

    @action(
        description="Cancel",
        permissions=["operate"],
        icon="cancel",
        variant=ActionVariant.DANGER,
        dialog={
            "title": "Stop this job?",
            "description": "A waiting job ends at once; a running one stops at its next step and drops what it has.",
            "form_class": BaseDialogForm,
            "form_submit_text": "Stop it",
        },
    )
    def cancel(self, request: HttpRequest, form: BaseDialogForm, object_id: str) -> HttpResponse:
        """The button on a job's page."""
        job = self._job_or_404(request, object_id)
        self._cancel(request, job)
        return leave_dialog(request, admin_url(job))

    @action(
        description="Retry",
        permissions=["operate"],
        icon="replay",
        dialog={
            "title": "Try this again?",
            "description": "A new job with the same specification is submitted for the same person. This one stays.",
            "form_class": BaseDialogForm,
            "form_submit_text": "Submit",
        },
    )
    def retry(self, request: HttpRequest, form: BaseDialogForm, object_id: str) -> HttpResponse:
        """The button on a job's page."""
        job = self._job_or_404(request, object_id)
        return leave_dialog(request, admin_url(self._retry(request, job) or job))

    def get_actions_detail(self, request: HttpRequest, object_id: Any) -> list[Any]:
        """Only the button that makes sense in the job's state."""
        job = self.get_object(request, object_id)
        sensible = {"cancel": job and job.state in ACTIVE, "retry": job and job.state in RETRYABLE}
        return [
            offered
            for offered in super().get_actions_detail(request, object_id)
            if sensible[offered.action_name.rsplit("_", 1)[-1]]
        ]

    def _job_or_404(self, request: HttpRequest, object_id: str) -> Job:
        job = self.get_object(request, object_id)
        if job is None:
            raise Http404(f"no job {object_id}")
        return job

    def _cancel(self, request: HttpRequest, job: Job) -> None:
        try:
            state = job_cancel(job=job)
        except JobsError as error:
            messages.error(request, f"{job}: {error}")
        else:
            messages.success(
                request, f"{job}: {'stopped' if state not in ACTIVE else 'asked to stop at its next step'}."
            )

    def _retry(self, request: HttpRequest, job: Job) -> Job | None:
        try:
            again = job_retry(job)
        except (JobsError, CoreError) as error:
            messages.error(request, f"{job}: {error}")
            return None
        messages.success(request, f"{job}: submitted again as job {again.pk} for {again.owner}.")
        return again


def _result(job: Job) -> Model | None:
    for name in ("generation_request", "dataset_version", "training_run"):
        found: Model | None = getattr(job, name, None)
        if found is not None:
            return getattr(found, "lora_version", None) or found
    return job.base_model


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
