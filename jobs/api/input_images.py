"""Pictures to begin from, and masks: upload, list, download, delete."""

from typing import Any
from uuid import UUID

from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.urls import reverse
from drf_spectacular.utils import extend_schema, extend_schema_serializer
from rest_framework import serializers
from rest_framework.exceptions import ValidationError
from rest_framework.parsers import MultiPartParser
from rest_framework.request import Request
from rest_framework.response import Response

from jobs import library, queries
from jobs.api.dataset_images import FILES_FIELD, RejectedFileSerializer, SizeCapHandler, read_files
from jobs.api.files import PNG, artifact_response, file_responses
from jobs.api.studio_view import StudioView
from jobs.input_images import input_images_upload
from jobs.models import InputImage
from jobs.uploads import stem_of


class InputImageSerializer(serializers.ModelSerializer[InputImage]):
    """OutputSerializer of a picture to begin from."""

    file_url = serializers.SerializerMethodField()

    class Meta:
        model = InputImage
        fields = ["id", "name", "sha256", "size_bytes", "width", "height", "created_at", "file_url"]

    def get_file_url(self, image: InputImage) -> str:
        """The stored PNG."""
        return reverse("input-image-file", args=[image.pk])


class InputUploadSerializer(serializers.Serializer[Any]):
    """What became of every file of an upload."""

    images = InputImageSerializer(many=True)
    rejected = RejectedFileSerializer(many=True)


class InputImageListView(StudioView):
    """Your pictures to begin from."""

    queryset = InputImage.objects.none()
    filter_backends = []
    parser_classes = [MultiPartParser]

    @extend_schema_serializer(component_name="InputImageUpload")
    class InputSerializer(serializers.Serializer[Any]):
        """One or many parts named `files`."""

        files = serializers.ListField(child=serializers.FileField(), help_text="PNG, JPEG or WebP pictures.")

    def initialize_request(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Request:
        """The size cap must be in place before anybody, the CSRF check included, reads the body."""
        if request.method == "POST":
            request.upload_handlers = [SizeCapHandler(request), *request.upload_handlers]
        return super().initialize_request(request, *args, **kwargs)

    @extend_schema(operation_id="input_images_list", responses=InputImageSerializer(many=True))
    def get(self, request: Request) -> Response:
        """Your pictures to begin from, newest first."""
        return self.page(queries.input_images_of(self.person()), InputImageSerializer)

    @extend_schema(
        operation_id="input_images_upload",
        request={"multipart/form-data": InputSerializer},
        responses={201: InputUploadSerializer},
    )
    def post(self, request: Request) -> Response:
        """Upload pictures or masks. 400 when not one was accepted; the same picture twice is one row."""
        result = input_images_upload(owner=self.person(), files=read_files(request))
        if not result.images:
            raise ValidationError({FILES_FIELD: [f"{file.name}: {file.reason}" for file in result.rejected]})
        return Response(InputUploadSerializer(result).data, status=201)


class InputImageView(StudioView):
    """One picture."""

    @extend_schema(responses=InputImageSerializer)
    def get(self, request: Request, image_id: UUID) -> Response:
        """One picture to begin from."""
        return Response(InputImageSerializer(queries.one(queries.input_images_of(self.person()), image_id)).data)

    @extend_schema(responses={204: None})
    def delete(self, request: Request, image_id: UUID) -> Response:
        """Remove a picture; requests under way still read it."""
        library.input_image_delete(image=queries.one(queries.input_images_of(self.person()), image_id))
        return Response(status=204)


class InputImageFileView(StudioView):
    """The stored picture."""

    @extend_schema(responses=file_responses(PNG, "The stored PNG: upright, without metadata."))
    def get(self, request: Request, image_id: UUID) -> HttpResponseBase:
        """The stored PNG."""
        image = queries.one(queries.input_images_of(self.person()), image_id)
        return artifact_response(request, image.sha256, content_type=PNG, filename=f"{stem_of(image.name)}.png")
