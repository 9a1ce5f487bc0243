"""LoRA files from elsewhere: upload, list, detail."""

from typing import Any, cast
from uuid import UUID

from django.conf import settings
from django.core.exceptions import RequestDataTooBig
from django.http import HttpRequest, QueryDict
from drf_spectacular.utils import extend_schema, extend_schema_serializer
from rest_framework import serializers
from rest_framework.parsers import MultiPartParser
from rest_framework.request import Request
from rest_framework.response import Response

from jobs import queries
from jobs.api.base_models import BaseModelNameSerializer
from jobs.api.jobs import ACCEPTED, LOCATION, JobSerializer, accepted
from jobs.api.request_body import IDEMPOTENCY_KEY, LABEL_PATTERN, LabelField, StrictSerializer, read_idempotency_key
from jobs.api.studio_view import StudioView
from jobs.lora_imports import LoraUploadHandler, lora_import_submit, lora_imports_of
from jobs.models import LoraImport
from jobs.status import Visibility

FORM_BYTES = 1 << 20
"""What the other fields and the form itself may add to the file."""


class LoraImportSerializer(serializers.ModelSerializer[LoraImport]):
    """OutputSerializer of an import."""

    job = JobSerializer()
    base_model = BaseModelNameSerializer()
    lora_version = serializers.UUIDField(
        source="lora_version.id", default=None, allow_null=True, help_text="Null until the import succeeded."
    )

    class Meta:
        model = LoraImport
        fields = [
            "id",
            "job",
            "base_model",
            "lora_name",
            "trigger_word",
            "visibility",
            "file_name",
            "sha256",
            "size_bytes",
            "lora_version",
            "created_at",
        ]


class LoraImportListView(StudioView):
    """Your imports."""

    queryset = LoraImport.objects.none()
    filter_backends = []
    parser_classes = [MultiPartParser]

    @extend_schema_serializer(component_name="LoraUpload")
    class InputSerializer(StrictSerializer):
        """A form with the file and what to call it."""

        file = serializers.FileField(help_text="A safetensors file: kohya/WebUI, LyCORIS or diffusers.")
        base_model = LabelField(help_text="Id or name of the base model that it was trained for.")
        lora_name = LabelField(help_text="The LoRA that gets a new version; made if you have none of that name.")
        trigger_word = serializers.RegexField(LABEL_PATTERN, allow_blank=True, max_length=100, default="")
        visibility = serializers.ChoiceField(choices=Visibility.choices, default=Visibility.PRIVATE)

    def initialize_request(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Request:
        """The size cap must be in place before anybody, the CSRF check included, reads the body."""
        if request.method == "POST":
            request.upload_handlers = [LoraUploadHandler(request)]
        return super().initialize_request(request, *args, **kwargs)

    @extend_schema(operation_id="lora_imports_list", responses=LoraImportSerializer(many=True))
    def get(self, request: Request) -> Response:
        """Your imports, newest first."""
        return self.page(lora_imports_of(self.person()), LoraImportSerializer)

    @extend_schema(
        operation_id="lora_imports_create",
        request={"multipart/form-data": InputSerializer},
        parameters=[IDEMPOTENCY_KEY, LOCATION],
        responses=ACCEPTED,
    )
    def post(self, request: Request) -> Response:
        """Import a LoRA file. 400 at once for what is no LoRA; the job judges every number against the base model."""
        limit = settings.LORASITE["LORA_MAX_BYTES"]
        if int(request.META.get("CONTENT_LENGTH") or 0) > limit + FORM_BYTES:
            raise RequestDataTooBig(f"more than {limit} bytes, the most for one LoRA: save it in half precision")
        checked = self.InputSerializer(data=cast(QueryDict, request.data).dict())
        checked.is_valid(raise_exception=True)
        asked = dict(checked.validated_data)
        job = lora_import_submit(
            owner=self.person(),
            base_model=queries.base_model_chosen(asked.pop("base_model")),
            idempotency_key=read_idempotency_key(request),
            **asked,
        )
        return accepted(self, job)


class LoraImportView(StudioView):
    """One import."""

    @extend_schema(responses=LoraImportSerializer)
    def get(self, request: Request, lora_import_id: UUID) -> Response:
        """One import with its job."""
        return Response(LoraImportSerializer(queries.one(lora_imports_of(self.person()), lora_import_id)).data)
