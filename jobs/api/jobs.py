"""Jobs as everybody's answer shows them; list, detail, cancel, events."""

from typing import Any
from uuid import UUID

import django_filters
from django.urls import reverse
from drf_spectacular.utils import (
    OpenApiParameter,
    OpenApiResponse,
    extend_schema,
    extend_schema_field,
    extend_schema_serializer,
)
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from jobs import lifecycle, queries
from jobs.api.pagination import EventPagination
from jobs.api.request_body import StrictSerializer, read_input
from jobs.api.studio_view import StudioView
from jobs.models import Job, JobAttempt, JobEvent
from jobs.status import JobKind, JobState


class ProgressSerializer(serializers.Serializer[Any]):
    """How far a job is."""

    step = serializers.IntegerField()
    total = serializers.IntegerField()
    percent = serializers.IntegerField(help_text="0-100; 100 only when succeeded.")


class JobErrorSerializer(serializers.Serializer[Any]):
    """Why a job failed."""

    code = serializers.CharField()
    message = serializers.CharField()


class RecordLinkSerializer(serializers.Serializer[Any]):
    """A record and where to read it."""

    type = serializers.CharField(
        help_text="dataset_version, training, generation, base_model, lora_import; what a training or an import "
        "results in is a lora_version."
    )
    id = serializers.UUIDField()
    url = serializers.CharField()


class AttemptSerializer(serializers.ModelSerializer[JobAttempt]):
    """One try of a job by one worker."""

    number = serializers.IntegerField(source="token")
    worker = serializers.CharField(source="worker_name")

    class Meta:
        model = JobAttempt
        fields = ["number", "worker", "started_at", "ended_at", "outcome", "reason", "from_step", "to_step"]


class JobSerializer(serializers.ModelSerializer[Job]):
    """OutputSerializer of a job."""

    progress = serializers.SerializerMethodField()
    figures = serializers.DictField(help_text="Newest loss, speed and the like.")
    error = serializers.SerializerMethodField()
    attempts = AttemptSerializer(many=True)
    request = serializers.SerializerMethodField(help_text="The record that this job fills, there from the start.")
    result = serializers.SerializerMethodField(help_text="What came out; null until the job succeeded.")
    url = serializers.SerializerMethodField()

    class Meta:
        model = Job
        fields = [
            "id",
            "kind",
            "state",
            "stage",
            "progress",
            "figures",
            "error",
            "estimated_seconds",
            "created_at",
            "started_at",
            "finished_at",
            "attempts",
            "cancel_requested_at",
            "request",
            "result",
            "url",
        ]
        read_only_fields = fields

    @extend_schema_field(ProgressSerializer)
    def get_progress(self, job: Job) -> dict[str, int]:
        """Steps done, steps in all, percent."""
        return {"step": job.progress_step, "total": job.progress_total, "percent": job.progress_percent}

    @extend_schema_field(JobErrorSerializer(allow_null=True))
    def get_error(self, job: Job) -> dict[str, str] | None:
        """Code and sentence; the traceback is for staff."""
        return {"code": job.error_code, "message": job.error_message} if job.error_code else None

    @extend_schema_field(RecordLinkSerializer(allow_null=True))
    def get_request(self, job: Job) -> dict[str, str] | None:
        """The request row."""
        return _request_link(job)

    @extend_schema_field(RecordLinkSerializer(allow_null=True))
    def get_result(self, job: Job) -> dict[str, str] | None:
        """The request row once it is filled; of a training or an import the LoRA version, for use in generations."""
        if job.state != JobState.SUCCEEDED:
            return None
        if job.kind not in (JobKind.TRAIN, JobKind.IMPORT_LORA):
            return _request_link(job)
        run = getattr(job, LINKS[JobKind(job.kind)][0], None)
        version = getattr(run, "lora_version", None)
        return version and _link("lora_version", version.pk, "lora", version.lora_id)

    def get_url(self, job: Job) -> str:
        """Where to poll."""
        return job_url(job)


LINKS = {
    JobKind.PREPROCESS: ("dataset_version", "dataset-version"),
    JobKind.TRAIN: ("training_run", "training"),
    JobKind.GENERATE: ("generation_request", "generation"),
    JobKind.IMPORT_LORA: ("lora_import", "lora-import"),
    JobKind.PREPARE_BASE: ("prepared_base", "base-model"),
}
"""Kind of job -> (relation of its request row, name of the route that shows it)."""


def _request_link(job: Job) -> dict[str, str] | None:
    relation, route = LINKS[JobKind(job.kind)]
    row = getattr(job, relation, None)
    return row and _link(route.replace("-", "_"), row.pk, route, row.pk)


def _link(kind: str, row_id: UUID, route: str, route_id: UUID) -> dict[str, str]:
    return {"type": kind, "id": str(row_id), "url": reverse(route, args=[route_id])}


def job_url(job: Job) -> str:
    """Address of a job, relative to the site."""
    return reverse("job", args=[job.pk])


LOCATION = OpenApiParameter(
    "Location", str, OpenApiParameter.HEADER, response=[202], description="Where to poll the job."
)
ACCEPTED = {202: OpenApiResponse(JobSerializer, description="Accepted; poll the job at its `url`.")}


def accepted(view: StudioView, job: Job) -> Response:
    """202 with the job and its address."""
    job = queries.one(queries.jobs_of(view.person()), job.pk)
    return Response(JobSerializer(job).data, status=202, headers={"Location": job_url(job)})


class JobFilter(django_filters.FilterSet):
    """?kind=&state="""

    kind = django_filters.ChoiceFilter(choices=JobKind.choices)
    state = django_filters.ChoiceFilter(choices=JobState.choices)

    class Meta:
        model = Job
        fields: list[str] = []


class JobListView(StudioView):
    """Your jobs."""

    queryset = Job.objects.none()
    filterset_class = JobFilter

    @extend_schema(operation_id="jobs_list", responses=JobSerializer(many=True))
    def get(self, request: Request) -> Response:
        """Your jobs, newest first."""
        return self.page(queries.jobs_of(self.person()), JobSerializer)


class JobView(StudioView):
    """One job."""

    @extend_schema(responses=JobSerializer)
    def get(self, request: Request, job_id: UUID) -> Response:
        """One job with its attempts."""
        return Response(JobSerializer(queries.one(queries.jobs_of(self.person()), job_id)).data)


class JobCancelView(StudioView):
    """Cancel a job."""

    class InputSerializer(StrictSerializer):
        """No fields: the address says it all."""

    @extend_schema(operation_id="jobs_cancel", request=None, responses={200: JobSerializer})
    def post(self, request: Request, job_id: UUID) -> Response:
        """Stop a job: a waiting one at once, a running one at its next step. 409 when it has ended."""
        read_input(request, self.InputSerializer)
        lifecycle.job_cancel(job=queries.one(queries.jobs_of(self.person()), job_id))
        return Response(JobSerializer(queries.one(queries.jobs_of(self.person()), job_id)).data)


class JobEventsView(StudioView):
    """State changes of a job."""

    queryset = JobEvent.objects.none()
    pagination_class = EventPagination
    filter_backends = []

    @extend_schema_serializer(component_name="JobEvent")
    class OutputSerializer(serializers.ModelSerializer[JobEvent]):
        """One state change."""

        class Meta:
            model = JobEvent
            fields = ["id", "at", "old_state", "new_state", "reason"]

    @extend_schema(operation_id="jobs_events_list", responses=OutputSerializer(many=True))
    def get(self, request: Request, job_id: UUID) -> Response:
        """Every state change of a job, oldest first."""
        job = queries.one(queries.jobs_of(self.person()), job_id)
        return self.page(queries.job_events(job), self.OutputSerializer)
