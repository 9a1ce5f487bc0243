"""Pictures of a dataset: upload, list, caption, delete, download."""

from typing import Any, cast
from uuid import UUID

from django.conf import settings
from django.core.exceptions import RequestDataTooBig
from django.core.files.uploadedfile import UploadedFile
from django.core.files.uploadhandler import FileUploadHandler
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.urls import reverse
from drf_spectacular.utils import extend_schema, extend_schema_serializer
from rest_framework import serializers
from rest_framework.exceptions import ValidationError
from rest_framework.parsers import MultiPartParser
from rest_framework.request import Request
from rest_framework.response import Response

from jobs import library, queries, uploads
from jobs.api.files import PNG, artifact_response, file_responses
from jobs.api.pagination import OldestFirstPagination
from jobs.api.request_body import StrictSerializer, read_input
from jobs.api.studio_view import StudioView
from jobs.models import DatasetImage

FILES_FIELD = "files"
MAX_REQUEST_FILE_SIZES = 16
"""A whole request may be as large as this many of the largest files."""


class DatasetImageSerializer(serializers.ModelSerializer[DatasetImage]):
    """OutputSerializer of an uploaded picture."""

    dataset = serializers.UUIDField(source="dataset_id")
    file_url = serializers.SerializerMethodField()

    class Meta:
        model = DatasetImage
        fields = [
            "id",
            "dataset",
            "name",
            "caption",
            "sha256",
            "size_bytes",
            "width",
            "height",
            "created_at",
            "file_url",
        ]

    def get_file_url(self, image: DatasetImage) -> str:
        """The stored PNG: upright, without metadata."""
        return reverse("dataset-image-file", args=[image.pk])


class RejectedFileSerializer(serializers.Serializer[Any]):
    """A file of an upload that was left out."""

    name = serializers.CharField()
    code = serializers.CharField(
        help_text="empty_file, file_too_large, image_rejected, duplicate, invalid_name, invalid_caption or no_picture."
    )
    reason = serializers.CharField()


class UploadSerializer(serializers.Serializer[Any]):
    """What became of every file of an upload."""

    images = DatasetImageSerializer(many=True)
    rejected = RejectedFileSerializer(many=True)


class SizeCapHandler(FileUploadHandler):
    """Keeps only one piece beyond the cap of each file, so that an endless file cannot fill the disk.

    The file that is kept is larger than the cap, which is what the upload's rules reject it for.
    """

    def new_file(self, *args: Any, **kwargs: Any) -> None:
        """Start counting."""
        super().new_file(*args, **kwargs)
        self.received_bytes = 0

    def receive_data_chunk(self, raw_data: bytes, start: int) -> bytes | None:
        """Hand the piece to the next handler, or drop it."""
        if self.received_bytes > settings.LORASITE["UPLOAD_MAX_BYTES"]:
            return None
        self.received_bytes += len(raw_data)
        return raw_data

    def file_complete(self, file_size: int) -> None:
        """The next handler keeps the file."""


class DatasetImageListView(StudioView):
    """Pictures of a dataset."""

    queryset = DatasetImage.objects.none()
    pagination_class = OldestFirstPagination
    filter_backends = []
    parser_classes = [MultiPartParser]

    @extend_schema_serializer(component_name="PictureUpload")
    class InputSerializer(serializers.Serializer[Any]):
        """One or many parts named `files`."""

        files = serializers.ListField(
            child=serializers.FileField(),
            help_text="PNG, JPEG or WebP pictures, and UTF-8 .txt files that caption the picture of the same stem.",
        )

    def initialize_request(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Request:
        """The size cap must be in place before anybody, the CSRF check included, reads the body."""
        if request.method == "POST":
            request.upload_handlers = [SizeCapHandler(request), *request.upload_handlers]
        return super().initialize_request(request, *args, **kwargs)

    @extend_schema(operation_id="dataset_images_list", responses=DatasetImageSerializer(many=True))
    def get(self, request: Request, dataset_id: UUID) -> Response:
        """Pictures of a dataset in the order of their upload."""
        dataset = queries.one(queries.datasets_of(self.person()), dataset_id)
        return self.page(queries.dataset_images_of(self.person()).filter(dataset=dataset), DatasetImageSerializer)

    @extend_schema(
        operation_id="dataset_images_upload",
        request={"multipart/form-data": InputSerializer},
        responses={201: UploadSerializer},
    )
    def post(self, request: Request, dataset_id: UUID) -> Response:
        """Upload pictures and caption files, at most 200 files. 400 when not one picture was accepted."""
        dataset = queries.one(queries.datasets_of(self.person()), dataset_id)
        result = uploads.dataset_images_upload(dataset=dataset, owner=self.person(), files=read_files(request))
        if not result.images:
            raise ValidationError({FILES_FIELD: [f"{file.name}: {file.reason}" for file in result.rejected]})
        return Response(UploadSerializer(result).data, status=201)


def read_files(request: Request) -> list[UploadedFile]:
    """The parts named `files`; any other part is refused by name."""
    limit = settings.LORASITE["UPLOAD_MAX_BYTES"] * MAX_REQUEST_FILE_SIZES
    if int(request.META.get("CONTENT_LENGTH") or 0) > limit:
        raise RequestDataTooBig(f"more than {limit} bytes in one request: upload fewer files at once")
    unknown = sorted(set(request.data) - {FILES_FIELD})
    if unknown:
        raise ValidationError({name: [f"unknown field; known are: {FILES_FIELD}"] for name in unknown})
    files = request.FILES.getlist(FILES_FIELD)
    if not files:
        raise ValidationError({FILES_FIELD: ["send at least one file as a part of this name"]})
    return cast(list[UploadedFile], files)


class DatasetImageView(StudioView):
    """One picture."""

    @extend_schema_serializer(component_name="PictureCaption")
    class InputSerializer(StrictSerializer):
        """Only the caption can change."""

        caption = serializers.CharField(allow_blank=True, max_length=uploads.MAX_CAPTION_CHARACTERS)

    @extend_schema(responses=DatasetImageSerializer)
    def get(self, request: Request, image_id: UUID) -> Response:
        """One uploaded picture."""
        return Response(DatasetImageSerializer(queries.one(queries.dataset_images_of(self.person()), image_id)).data)

    @extend_schema(request=InputSerializer, responses=DatasetImageSerializer)
    def patch(self, request: Request, image_id: UUID) -> Response:
        """Change the caption; versions that are frozen keep theirs."""
        image = queries.one(queries.dataset_images_of(self.person()), image_id)
        image = library.dataset_image_caption(image=image, **read_input(request, self.InputSerializer))
        return Response(DatasetImageSerializer(image).data)

    @extend_schema(responses={204: None})
    def delete(self, request: Request, image_id: UUID) -> Response:
        """Remove a picture from its dataset; versions that are frozen keep theirs."""
        library.dataset_image_delete(image=queries.one(queries.dataset_images_of(self.person()), image_id))
        return Response(status=204)


class DatasetImageFileView(StudioView):
    """The stored picture."""

    @extend_schema(responses=file_responses(PNG, "The stored PNG: upright, without metadata."))
    def get(self, request: Request, image_id: UUID) -> HttpResponseBase:
        """The stored PNG."""
        image = queries.one(queries.dataset_images_of(self.person()), image_id)
        return artifact_response(request, image.sha256, content_type=PNG, filename=f"{uploads.stem_of(image.name)}.png")
