"""Trainings in the admin: the loss curve and the sample pictures by step and prompt."""

from typing import Any
from uuid import UUID

from django.contrib import admin
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.template.loader import render_to_string
from django.urls import URLPattern, path, reverse
from django.utils.safestring import SafeString
from unfold.decorators import display

from jobs.admin.loss_curve import loss_curve
from jobs.admin.readonly import ReadOnlyAdmin, record_link, state_label
from jobs.admin.thumbnails import picture_response, thumbnail
from jobs.models import TrainingRun


@admin.register(TrainingRun)
class TrainingRunAdmin(ReadOnlyAdmin):
    """Requests to train a LoRA, and how they went."""

    list_display = ["lora_name", "owner", "dataset_version", "base_model", "job_state", "percent", "loss", "created_at"]
    list_filter = ["job__state", "base_model", "created_at"]
    search_fields = ["lora_name", "owner__username", "dataset_version__dataset__name"]
    readonly_fields = ["job_state", "result", "curve", "sample_grid"]
    fields = [
        "lora_name",
        "owner",
        "dataset_version",
        "base_model",
        "job_state",
        "result",
        "curve",
        "sample_grid",
        "created_at",
    ]
    list_select_related = ["owner", "dataset_version__dataset", "base_model", "job"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[TrainingRun]:
        """Without the losses; a training's page fetches its own."""
        heavy = ["losses", "samples", "dataset_version__manifest", "dataset_version__rejected", "job__spec"]
        return super().get_queryset(request).select_related(*self.list_select_related).defer(*heavy)

    def get_urls(self) -> list[URLPattern]:
        """Adds the sample pictures."""
        return [
            path(
                f"<uuid:pk>/samples/<str:sha256>/{size}/",
                self.admin_site.admin_view(self.sample_view),
                {"reduced": size == "thumbnail"},
                name=f"jobs_trainingrun_sample_{size}",
            )
            for size in ("picture", "thumbnail")
        ] + super().get_urls()

    def sample_view(self, request: HttpRequest, pk: UUID, sha256: str, reduced: bool) -> HttpResponse:
        """One sample picture of a run that this person may see."""
        run = self.get_queryset(request).filter(pk=pk).first()
        known = {sample["sha256"] for sample in run.samples} if run else set()
        if run is None or sha256 not in known or not self.has_view_permission(request, run):
            raise Http404("no such sample")
        return picture_response(sha256, reduced=reduced)

    @display(description="Job", ordering="job__state")
    def job_state(self, run: TrainingRun) -> str | SafeString:
        """State of its job, linked."""
        return record_link(run.job, state_label(run.job.state))

    @display(description="Done")
    def percent(self, run: TrainingRun) -> str:
        """Progress of its job."""
        return f"{run.job.progress_percent} %"

    @display(description="Loss")
    def loss(self, run: TrainingRun) -> str:
        """The newest that the worker told."""
        newest = run.job.figures.get("loss")
        return f"{newest:.4g}" if isinstance(newest, int | float) else "-"

    @display(description="LoRA")
    def result(self, run: TrainingRun) -> str | SafeString:
        """The version that came out."""
        return record_link(getattr(run, "lora_version", None))

    @display(description="Loss curve")
    def curve(self, run: TrainingRun) -> str | SafeString:
        """Loss by step, drawn on the server."""
        return loss_curve(run.losses)

    @display(description="Samples")
    def sample_grid(self, run: TrainingRun) -> str | SafeString:
        """A row for each step, a column for each prompt."""
        if not run.samples:
            return "none yet"
        prompts = list(dict.fromkeys(sample["prompt"] for sample in run.samples))
        steps = sorted({sample["step"] for sample in run.samples})
        cells = {(sample["step"], sample["prompt"]): _sample_thumbnail(run, sample) for sample in run.samples}
        rows = [
            {"step": "before" if step == 0 else f"step {step}", "cells": [cells.get((step, p), "") for p in prompts]}
            for step in steps
        ]
        return render_to_string("jobs/admin/sample_grid.html", {"prompts": prompts, "rows": rows})


def _sample_thumbnail(run: TrainingRun, sample: dict[str, Any]) -> SafeString:
    name = "admin:jobs_trainingrun_sample_"
    small, whole = (reverse(name + size, args=[run.pk, sample["sha256"]]) for size in ("thumbnail", "picture"))
    return thumbnail(small, whole, f"step {sample['step']}: {sample['prompt']}")
