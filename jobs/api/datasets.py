"""Datasets: create, list, read, delete, and start their preparation."""

from typing import Any
from uuid import UUID

from drf_spectacular.utils import extend_schema, extend_schema_field, extend_schema_serializer
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from core.config import PreprocessConfig
from jobs import library, queries, submission
from jobs.api.jobs import ACCEPTED, LOCATION, accepted
from jobs.api.request_body import (
    IDEMPOTENCY_KEY,
    LabelField,
    StrictSerializer,
    read_config,
    read_idempotency_key,
    read_input,
)
from jobs.api.studio_view import StudioView
from jobs.models import Dataset, DatasetVersion

SHOWN_VERSIONS = 10


class VersionSummarySerializer(serializers.ModelSerializer[DatasetVersion]):
    """A version where its dataset is described."""

    ready = serializers.BooleanField(source="is_ready")

    class Meta:
        model = DatasetVersion
        fields = ["id", "number", "ready", "image_count"]


class DatasetSerializer(serializers.ModelSerializer[Dataset]):
    """OutputSerializer of a dataset."""

    image_count = serializers.IntegerField(default=0)
    versions = serializers.SerializerMethodField(help_text=f"The newest {SHOWN_VERSIONS}, newest first.")

    class Meta:
        model = Dataset
        fields = ["id", "name", "created_at", "image_count", "versions"]

    @extend_schema_field(VersionSummarySerializer(many=True))
    def get_versions(self, dataset: Dataset) -> Any:
        """All are listed under /dataset-versions/?dataset=ID."""
        return VersionSummarySerializer(list(dataset.versions.all())[:SHOWN_VERSIONS], many=True).data


class DatasetListView(StudioView):
    """Your datasets."""

    queryset = Dataset.objects.none()
    filter_backends = []

    @extend_schema_serializer(component_name="DatasetInput")
    class InputSerializer(StrictSerializer):
        """A dataset begins with a name."""

        name = LabelField()

    @extend_schema(operation_id="datasets_list", responses=DatasetSerializer(many=True))
    def get(self, request: Request) -> Response:
        """Your datasets, newest first."""
        return self.page(queries.datasets_of(self.person()), DatasetSerializer)

    @extend_schema(request=InputSerializer, responses={201: DatasetSerializer})
    def post(self, request: Request) -> Response:
        """A new, empty dataset. 409 when you have one of that name."""
        dataset = library.dataset_create(owner=self.person(), **read_input(request, self.InputSerializer))
        return Response(DatasetSerializer(dataset).data, status=201)


class DatasetView(StudioView):
    """One dataset."""

    @extend_schema(responses=DatasetSerializer)
    def get(self, request: Request, dataset_id: UUID) -> Response:
        """One dataset."""
        return Response(DatasetSerializer(queries.one(queries.datasets_of(self.person()), dataset_id)).data)

    @extend_schema(responses={204: None})
    def delete(self, request: Request, dataset_id: UUID) -> Response:
        """Remove a dataset with its pictures. 409 when a training used it or it is being prepared."""
        library.dataset_delete(dataset=queries.one(queries.datasets_of(self.person()), dataset_id))
        return Response(status=204)


class DatasetPreprocessView(StudioView):
    """Prepare a dataset."""

    @extend_schema(request=PreprocessConfig, parameters=[IDEMPOTENCY_KEY, LOCATION], responses=ACCEPTED)
    def post(self, request: Request, dataset_id: UUID) -> Response:
        """Make the next version of a dataset: crop, caption, freeze. All fields are optional."""
        dataset = queries.one(queries.datasets_of(self.person()), dataset_id)
        job = submission.preprocess_submit(
            owner=self.person(),
            dataset=dataset,
            config=read_config(request, PreprocessConfig),
            idempotency_key=read_idempotency_key(request),
        )
        return accepted(self, job)
