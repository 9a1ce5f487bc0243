"""Base models: everybody sees them all, operators register them."""

from typing import Any
from uuid import UUID

from drf_spectacular.utils import extend_schema, extend_schema_field
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from core.base_facts import BaseFacts
from jobs import queries
from jobs.api.studio_view import StudioView
from jobs.models import BaseModel
from jobs.status import JobState


class BaseModelNameSerializer(serializers.ModelSerializer[BaseModel]):
    """A base model where something else is described."""

    class Meta:
        model = BaseModel
        fields = ["id", "name"]


class BaseModelSerializer(serializers.ModelSerializer[BaseModel]):
    """OutputSerializer of a base model."""

    ready = serializers.SerializerMethodField()
    facts = serializers.SerializerMethodField(help_text="Null until it is prepared.")
    state = serializers.ChoiceField(
        source="job.state",
        choices=JobState.choices,
        default=None,
        allow_null=True,
        help_text="Of its newest preparation.",
    )

    class Meta:
        model = BaseModel
        fields = ["id", "name", "keep_warm", "ready", "fingerprint", "facts", "state"]

    def get_ready(self, base_model: BaseModel) -> bool:
        """Whether jobs may use it."""
        return bool(base_model.fingerprint)

    @extend_schema_field(BaseFacts)  # type: ignore[arg-type]  # its pydantic extension
    def get_facts(self, base_model: BaseModel) -> dict[str, Any] | None:
        """Sizes, tokens and defaults of the prepared model."""
        return base_model.facts or None


class BaseModelListView(StudioView):
    """Base models."""

    queryset = BaseModel.objects.none()
    filter_backends = []

    @extend_schema(operation_id="base_models_list", responses=BaseModelSerializer(many=True))
    def get(self, request: Request) -> Response:
        """All base models of this installation, newest first."""
        return self.page(queries.base_models(), BaseModelSerializer)


class BaseModelView(StudioView):
    """One base model."""

    @extend_schema(responses=BaseModelSerializer)
    def get(self, request: Request, base_model_id: UUID) -> Response:
        """One base model."""
        return Response(BaseModelSerializer(queries.one(queries.base_models(), base_model_id)).data)
