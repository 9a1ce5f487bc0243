"""Trainings: start, list, detail with losses and sample pictures."""

from typing import Any
from uuid import UUID

from django.http.response import HttpResponseBase
from django.urls import reverse
from drf_spectacular.utils import extend_schema, extend_schema_field
from pydantic import Field
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from core.config import Config
from core.train_config import TrainConfig
from jobs import queries, submission
from jobs.api.base_models import BaseModelNameSerializer
from jobs.api.files import PNG, artifact_response, file_responses
from jobs.api.jobs import ACCEPTED, LOCATION, JobSerializer, accepted
from jobs.api.request_body import IDEMPOTENCY_KEY, Label, read_config, read_idempotency_key
from jobs.api.studio_view import StudioView
from jobs.errors import NotFound
from jobs.models import TrainingRun


class TrainingInput(Config):
    """InputSerializer of a training."""

    dataset_version: UUID = Field(description="A version that is ready.")
    base_model: Label = Field(description="Id or name.")
    lora_name: Label = Field(description="The LoRA that gets a new version; made if you have none of that name.")
    config: TrainConfig = Field(default_factory=TrainConfig)


class SampleSerializer(serializers.Serializer[Any]):
    """A sample picture of a training."""

    step = serializers.IntegerField(help_text="0: before training.")
    prompt = serializers.CharField()
    url = serializers.CharField()


class TrainingSummarySerializer(serializers.ModelSerializer[TrainingRun]):
    """OutputSerializer of a training in a list: without losses and samples."""

    job = JobSerializer()
    dataset_version = serializers.UUIDField(source="dataset_version_id")
    base_model = BaseModelNameSerializer()
    lora_version = serializers.UUIDField(
        source="lora_version.id", default=None, allow_null=True, help_text="Null until the training succeeded."
    )

    class Meta:
        model = TrainingRun
        fields = ["id", "job", "dataset_version", "base_model", "lora_name", "lora_version", "created_at"]


class TrainingSerializer(TrainingSummarySerializer):
    """OutputSerializer of one training."""

    config = serializers.SerializerMethodField(help_text="All settings, defaults written out.")
    losses = serializers.ListField(child=serializers.FloatField(), help_text="Loss of every step, in order.")
    samples = serializers.SerializerMethodField()

    class Meta(TrainingSummarySerializer.Meta):
        fields = [*TrainingSummarySerializer.Meta.fields, "config", "losses", "samples"]

    @extend_schema_field(TrainConfig)  # type: ignore[arg-type]  # its pydantic extension
    def get_config(self, run: TrainingRun) -> dict[str, Any]:
        """The job's specification."""
        return dict(run.job.spec)

    @extend_schema_field(SampleSerializer(many=True))
    def get_samples(self, run: TrainingRun) -> list[dict[str, Any]]:
        """Sample pictures with their addresses."""
        return [
            {
                "step": sample["step"],
                "prompt": sample["prompt"],
                "url": reverse("training-sample", args=[run.pk, sample["sha256"]]),
            }
            for sample in run.samples
        ]


class TrainingListView(StudioView):
    """Your trainings."""

    queryset = TrainingRun.objects.none()
    filter_backends = []

    @extend_schema(operation_id="trainings_list", responses=TrainingSummarySerializer(many=True))
    def get(self, request: Request) -> Response:
        """Your trainings, newest first."""
        return self.page(queries.trainings_of(self.person()).defer("losses", "samples"), TrainingSummarySerializer)

    @extend_schema(request=TrainingInput, parameters=[IDEMPOTENCY_KEY, LOCATION], responses=ACCEPTED)
    def post(self, request: Request) -> Response:
        """Train a LoRA on a dataset version. 409 when the version or the base model is not ready."""
        asked = read_config(request, TrainingInput)
        job = submission.training_submit(
            owner=self.person(),
            dataset_version=queries.one(queries.dataset_versions_of(self.person()), asked.dataset_version),
            base_model=queries.base_model_chosen(asked.base_model),
            lora_name=asked.lora_name,
            config=asked.config,
            idempotency_key=read_idempotency_key(request),
        )
        return accepted(self, job)


class TrainingView(StudioView):
    """One training."""

    @extend_schema(responses=TrainingSerializer)
    def get(self, request: Request, training_id: UUID) -> Response:
        """One training with its losses and sample pictures."""
        return Response(TrainingSerializer(queries.one(queries.trainings_of(self.person()), training_id)).data)


class TrainingSampleView(StudioView):
    """A sample picture."""

    @extend_schema(responses=file_responses(PNG, "The sample picture."))
    def get(self, request: Request, training_id: UUID, sha256: str) -> HttpResponseBase:
        """A sample picture of a training."""
        run = queries.one(queries.trainings_of(self.person()), training_id)
        if sha256 not in {sample["sha256"] for sample in run.samples}:
            raise NotFound(f"training {training_id} has no sample picture {sha256!r:.80}")
        return artifact_response(request, sha256, content_type=PNG, filename=f"{run.lora_name}-{sha256[:8]}.png")
