"""Generations: start, list, detail with the pictures."""

from typing import Any
from uuid import UUID

from django.urls import reverse
from drf_spectacular.utils import extend_schema, extend_schema_field, extend_schema_serializer
from pydantic import Field, create_model, model_validator
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from core.config import Config, GenerateConfig, LoraUse
from core.errors import ConfigError
from core.webui_names import understand_webui_names
from jobs import queries, submission
from jobs.api.base_models import BaseModelNameSerializer
from jobs.api.jobs import ACCEPTED, LOCATION, JobSerializer, accepted
from jobs.api.request_body import IDEMPOTENCY_KEY, Label, read_config, read_idempotency_key
from jobs.api.studio_view import StudioView
from jobs.generation_specs import picture_sha256
from jobs.models import GenerationLora, GenerationRequest, User


class LoraChoice(Config):
    """One LoRA in a generation."""

    lora: UUID = Field(description="Id of a LoRA (its newest version) or of a LoRA version; yours or public.")
    weight: float = Field(1.0, ge=-4, le=4, description=LoraUse.model_fields["weight"].description)


GENERATE_FIELDS: dict[str, Any] = {
    name: (field.annotation, field)
    for name, field in GenerateConfig.model_fields.items()
    if name not in ("loras", "init_image", "mask")
}
"""As in `GenerateConfig`, so that the rules of a value are written once; what is stored is named by id, never by hash:
whoever knows a hash has no right to its bytes."""

GENERATE_FIELDS |= {
    side: (
        int | None,
        Field(None, ge=32, le=2048, description=f"{side.title()} in px. Null: the base's native."),
    )
    for side in ("width", "height")
}


class GenerationRequestInput(Config):
    """What a generation names besides the settings of `GenerateConfig`."""

    base_model: Label = Field(description="Id or name.")
    loras: tuple[LoraChoice, ...] = Field(
        (), max_length=8, description="LoRAs to apply together, at most 8; those in the prompt (<lora:name:1>) count."
    )
    init_image: UUID | None = Field(
        None, description="Begin from this picture (img2img): uploaded for it, of a dataset, or generated. All yours."
    )
    mask: UUID | None = Field(None, description="White where init_image may change (inpainting). A picture of yours.")
    styles: tuple[Label, ...] = Field((), max_length=8, description="Names of your styles, applied in this order.")

    @model_validator(mode="before")
    @classmethod
    def _webui_names(cls, values: Any) -> Any:
        return understand_webui_names(values) if isinstance(values, dict) else values


GenerationInput = create_model("GenerationInput", __base__=GenerationRequestInput, **GENERATE_FIELDS)
GenerationInput.__doc__ = "InputSerializer of a generation."


@extend_schema_serializer(component_name="GenerationLora")
class LoraUseSerializer(serializers.ModelSerializer[GenerationLora]):
    """A LoRA version that a generation used."""

    lora = serializers.UUIDField(source="lora_version.lora_id")
    lora_version = serializers.UUIDField(source="lora_version_id")
    name = serializers.CharField(source="lora_version.lora.name")
    number = serializers.IntegerField(source="lora_version.number")

    class Meta:
        model = GenerationLora
        fields = ["lora", "lora_version", "name", "number", "weight"]


class PictureSerializer(serializers.Serializer[Any]):
    """A generated picture where its request is described."""

    id = serializers.UUIDField()
    seed = serializers.IntegerField()
    image_format = serializers.CharField()
    url = serializers.SerializerMethodField()

    def get_url(self, image: Any) -> str:
        """The picture itself."""
        return reverse("image-file", args=[image.pk])


class GenerationSerializer(serializers.ModelSerializer[GenerationRequest]):
    """OutputSerializer of a generation."""

    job = JobSerializer()
    base_model = BaseModelNameSerializer()
    loras = LoraUseSerializer(source="lora_uses", many=True)
    images = PictureSerializer(many=True)
    config = serializers.SerializerMethodField(help_text="All settings, defaults written out.")

    class Meta:
        model = GenerationRequest
        fields = ["id", "job", "base_model", "loras", "images", "config", "created_at"]

    @extend_schema_field(GenerateConfig)  # type: ignore[arg-type]  # its pydantic extension
    def get_config(self, request: GenerationRequest) -> dict[str, Any]:
        """The job's specification; one of a newer version as it is."""
        try:
            return GenerateConfig.parse(request.job.spec).model_dump(mode="json")
        except ConfigError:
            return dict(request.job.spec)


class GenerationListView(StudioView):
    """Your generations."""

    queryset = GenerationRequest.objects.none()
    filter_backends = []

    @extend_schema(operation_id="generations_list", responses=GenerationSerializer(many=True))
    def get(self, request: Request) -> Response:
        """Your generations, newest first."""
        return self.page(queries.generations_of(self.person()), GenerationSerializer)

    @extend_schema(request=GenerationInput, parameters=[IDEMPOTENCY_KEY, LOCATION], responses=ACCEPTED)
    def post(self, request: Request) -> Response:
        """Generate pictures. 404 names the LoRA or base model that you may not use or that does not exist."""
        asked = read_config(request, GenerationInput)
        versions = queries.lora_versions_chosen(self.person(), [choice.lora for choice in asked.loras])
        job = submission.generation_submit(
            owner=self.person(),
            base_model=queries.base_model_chosen(asked.base_model),
            loras=[(version, choice.weight) for version, choice in zip(versions, asked.loras, strict=True)],
            values=_values(self.person(), asked),
            styles=asked.styles,
            idempotency_key=read_idempotency_key(request),
        )
        return accepted(self, job)


def _values(person: User, asked: Any) -> dict[str, Any]:
    """What was asked for, with hashes in place of the ids of the person's own pictures."""
    named = {name: getattr(asked, name) for name in ("init_image", "mask")}
    values: dict[str, Any] = asked.model_dump(exclude={"base_model", "loras", "styles", *named}, exclude_none=True)
    return values | {name: picture_sha256(person, chosen) for name, chosen in named.items() if chosen is not None}


class GenerationView(StudioView):
    """One generation."""

    @extend_schema(responses=GenerationSerializer)
    def get(self, request: Request, generation_id: UUID) -> Response:
        """One generation with its pictures."""
        return Response(GenerationSerializer(queries.one(queries.generations_of(self.person()), generation_id)).data)
