"""Prepared versions of datasets: list and detail."""

from typing import Any
from uuid import UUID

import django_filters
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from jobs import queries
from jobs.api.jobs import JobSerializer
from jobs.api.studio_view import StudioView
from jobs.models import DatasetVersion


class LeftOutSerializer(serializers.Serializer[Any]):
    """A picture that preparation left out."""

    name = serializers.CharField()
    reason = serializers.CharField()


class DatasetVersionSerializer(serializers.ModelSerializer[DatasetVersion]):
    """OutputSerializer of a version."""

    dataset = serializers.UUIDField(source="dataset_id")
    ready = serializers.BooleanField(source="is_ready")
    rejected = LeftOutSerializer(many=True)
    job = JobSerializer()

    class Meta:
        model = DatasetVersion
        fields = ["id", "dataset", "number", "ready", "manifest_hash", "image_count", "rejected", "created_at", "job"]


class DatasetVersionFilter(django_filters.FilterSet):
    """?dataset=ID"""

    dataset = django_filters.UUIDFilter(field_name="dataset_id")

    class Meta:
        model = DatasetVersion
        fields: list[str] = []


class DatasetVersionListView(StudioView):
    """Your dataset versions."""

    queryset = DatasetVersion.objects.none()
    filterset_class = DatasetVersionFilter

    @extend_schema(operation_id="dataset_versions_list", responses=DatasetVersionSerializer(many=True))
    def get(self, request: Request) -> Response:
        """Your dataset versions, newest first."""
        return self.page(queries.dataset_versions_of(self.person()), DatasetVersionSerializer)


class DatasetVersionView(StudioView):
    """One dataset version."""

    @extend_schema(responses=DatasetVersionSerializer)
    def get(self, request: Request, version_id: UUID) -> Response:
        """One version with its job."""
        version = queries.one(queries.dataset_versions_of(self.person()), version_id)
        return Response(DatasetVersionSerializer(version).data)
