"""Generated pictures: list, detail, download, delete."""

from uuid import UUID

from django.http.response import HttpResponseBase
from django.urls import reverse
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from core.image_files import CONTENT_TYPES, ENDINGS
from jobs import library, queries
from jobs.api.files import PNG, artifact_response, file_responses
from jobs.api.studio_view import StudioView
from jobs.models import GeneratedImage


class ImageSerializer(serializers.ModelSerializer[GeneratedImage]):
    """OutputSerializer of a generated picture."""

    generation = serializers.UUIDField(source="request_id")
    file_url = serializers.SerializerMethodField()

    class Meta:
        model = GeneratedImage
        fields = [
            "id",
            "generation",
            "number",
            "seed",
            "sha256",
            "image_format",
            "size_bytes",
            "width",
            "height",
            "created_at",
            "file_url",
        ]

    def get_file_url(self, image: GeneratedImage) -> str:
        """The picture."""
        return reverse("image-file", args=[image.pk])


class ImageListView(StudioView):
    """Your pictures."""

    queryset = GeneratedImage.objects.none()
    filter_backends = []

    @extend_schema(operation_id="images_list", responses=ImageSerializer(many=True))
    def get(self, request: Request) -> Response:
        """Your generated pictures, newest first."""
        return self.page(queries.generated_images_of(self.person()), ImageSerializer)


class ImageView(StudioView):
    """One picture."""

    @extend_schema(responses=ImageSerializer)
    def get(self, request: Request, image_id: UUID) -> Response:
        """One generated picture."""
        return Response(ImageSerializer(queries.one(queries.generated_images_of(self.person()), image_id)).data)

    @extend_schema(responses={204: None})
    def delete(self, request: Request, image_id: UUID) -> Response:
        """Remove a generated picture."""
        library.generated_image_delete(image=queries.one(queries.generated_images_of(self.person()), image_id))
        return Response(status=204)


class ImageFileView(StudioView):
    """The picture itself."""

    @extend_schema(
        responses=file_responses(PNG, "The picture with its settings: in PNG text, or in EXIF of image/jpeg or webp.")
    )
    def get(self, request: Request, image_id: UUID) -> HttpResponseBase:
        """The picture, as it was asked for: PNG, JPEG or WebP."""
        image = queries.one(queries.generated_images_of(self.person()), image_id)
        return artifact_response(
            request,
            image.sha256,
            content_type=CONTENT_TYPES[image.image_format],
            filename=f"{image.seed}-{image.number}{ENDINGS[image.image_format]}",
        )
