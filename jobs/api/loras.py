"""LoRAs: own and public ones; change, delete, and download for other tools."""

from uuid import UUID

from django.http.response import HttpResponseBase
from django.urls import reverse
from drf_spectacular.utils import extend_schema, extend_schema_serializer
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from jobs import library, queries
from jobs.api.base_models import BaseModelNameSerializer
from jobs.api.files import SAFETENSORS, ZIP, archive_response, artifact_response, file_responses
from jobs.api.permissions import OwnerChangesOthersRead
from jobs.api.request_body import LABEL_PATTERN, LabelField, StrictSerializer, read_input
from jobs.api.studio_view import StudioView
from jobs.errors import NotFound
from jobs.models import Lora, LoraVersion
from jobs.status import Visibility


class LoraVersionSerializer(serializers.ModelSerializer[LoraVersion]):
    """OutputSerializer of a version."""

    size_bytes = serializers.IntegerField(source="kohya_size_bytes", help_text="Of the kohya/WebUI file.")
    facts = serializers.DictField(help_text="Rank, alpha, modules, final loss and the like.")
    peft_files = serializers.DictField(child=serializers.CharField(), help_text="{file name: SHA-256}.")
    file_url = serializers.SerializerMethodField()
    peft_url = serializers.SerializerMethodField()
    diffusers_url = serializers.SerializerMethodField()

    class Meta:
        model = LoraVersion
        fields = [
            "id",
            "number",
            "kohya_sha256",
            "model_hash",
            "size_bytes",
            "facts",
            "created_at",
            "file_url",
            "peft_files",
            "peft_url",
            "diffusers_url",
        ]

    def get_file_url(self, version: LoraVersion) -> str:
        """The kohya/WebUI file."""
        return reverse("lora-version-file", args=[version.pk])

    def get_peft_url(self, version: LoraVersion) -> str:
        """The PEFT folder as a ZIP."""
        return reverse("lora-version-peft", args=[version.pk])

    def get_diffusers_url(self, version: LoraVersion) -> str | None:
        """The file for diffusers; null where there is none."""
        return reverse("lora-version-diffusers", args=[version.pk]) if version.diffusers_sha256 else None


class LoraSerializer(serializers.ModelSerializer[Lora]):
    """OutputSerializer of a LoRA."""

    base_model = BaseModelNameSerializer()
    owner = serializers.CharField(source="owner.username")
    versions = LoraVersionSerializer(many=True)

    class Meta:
        model = Lora
        fields = ["id", "name", "base_model", "trigger_word", "visibility", "owner", "created_at", "versions"]


class LoraListView(StudioView):
    """LoRAs."""

    queryset = Lora.objects.none()
    filter_backends = []

    @extend_schema(operation_id="loras_list", responses=LoraSerializer(many=True))
    def get(self, request: Request) -> Response:
        """Your LoRAs and the public ones, newest first."""
        return self.page(queries.loras_visible_to(self.person()), LoraSerializer)


class LoraView(StudioView):
    """One LoRA."""

    permission_classes = [*StudioView.permission_classes, OwnerChangesOthersRead]

    @extend_schema_serializer(component_name="LoraChange")
    class InputSerializer(StrictSerializer):
        """What the owner may change."""

        name = LabelField()
        trigger_word = serializers.RegexField(LABEL_PATTERN, allow_blank=True, max_length=100)
        visibility = serializers.ChoiceField(choices=Visibility.choices)

    @extend_schema(responses=LoraSerializer)
    def get(self, request: Request, lora_id: UUID) -> Response:
        """One LoRA with its versions, newest first."""
        return Response(LoraSerializer(queries.one(queries.loras_visible_to(self.person()), lora_id)).data)

    @extend_schema(request=InputSerializer, responses=LoraSerializer)
    def patch(self, request: Request, lora_id: UUID) -> Response:
        """Change name, trigger word or visibility; only the owner may."""
        lora = queries.one(queries.loras_visible_to(self.person()), lora_id)
        self.permit(request, lora)
        lora = library.lora_update(lora=lora, values=read_input(request, self.InputSerializer, partial=True))
        return Response(LoraSerializer(lora).data)

    @extend_schema(responses={204: None})
    def delete(self, request: Request, lora_id: UUID) -> Response:
        """Remove a LoRA with all versions; only the owner may. 409 when a generation used it."""
        lora = queries.one(queries.loras_visible_to(self.person()), lora_id)
        self.permit(request, lora)
        library.lora_delete(lora=lora)
        return Response(status=204)


class LoraVersionFileView(StudioView):
    """The kohya/WebUI file."""

    @extend_schema(responses=file_responses(SAFETENSORS, "The kohya/WebUI file, for A1111, Forge, ComfyUI and others."))
    def get(self, request: Request, version_id: UUID) -> HttpResponseBase:
        """The kohya/WebUI file."""
        version = queries.one(queries.lora_versions_visible_to(self.person()), version_id)
        return artifact_response(
            request,
            version.kohya_sha256,
            content_type=SAFETENSORS,
            filename=f"{_download_stem(version)}.safetensors",
            attachment=True,
        )


class LoraVersionPeftView(StudioView):
    """The PEFT folder."""

    @extend_schema(responses=file_responses(ZIP, "The PEFT folder as a ZIP, for diffusers and peft."))
    def get(self, request: Request, version_id: UUID) -> HttpResponseBase:
        """The PEFT folder as a ZIP."""
        version = queries.one(queries.lora_versions_visible_to(self.person()), version_id)
        if not version.peft_files:
            raise NotFound(f"LoRA version {version_id} has no PEFT folder: download its kohya/WebUI file")
        return archive_response(request, version.peft_files, filename=f"{_download_stem(version)}-peft.zip")


class LoraVersionDiffusersView(StudioView):
    """The file for diffusers."""

    @extend_schema(responses=file_responses(SAFETENSORS, "pytorch_lora_weights.safetensors, for `load_lora_weights`."))
    def get(self, request: Request, version_id: UUID) -> HttpResponseBase:
        """The file for diffusers."""
        version = queries.one(queries.lora_versions_visible_to(self.person()), version_id)
        if not version.diffusers_sha256:
            raise NotFound(f"LoRA version {version_id} has no file for diffusers: download its kohya/WebUI file")
        return artifact_response(
            request,
            version.diffusers_sha256,
            content_type=SAFETENSORS,
            filename=f"{_download_stem(version)}-diffusers.safetensors",
            attachment=True,
        )


def _download_stem(version: LoraVersion) -> str:
    return f"{version.lora.name}-v{version.number}"
