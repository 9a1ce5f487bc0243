"""Datasets in the admin: pictures with thumbnails, and their frozen versions."""

from django.contrib import admin
from django.db.models import Count, QuerySet
from django.http import HttpRequest
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.decorators import display

from jobs.admin.readonly import ReadOnlyAdmin, ReadOnlyInline, megabytes, pretty_json, record_link, state_label
from jobs.admin.thumbnails import PictureAdminMixin, record_thumbnail
from jobs.models import Dataset, DatasetImage, DatasetVersion


class DatasetImageInline(ReadOnlyInline):
    """The pictures of a dataset."""

    model = DatasetImage
    fields = ["thumbnail", "name", "caption", "size"]
    readonly_fields = ["thumbnail", "size"]
    show_change_link = True

    @display(description="Picture")
    def thumbnail(self, image: DatasetImage) -> SafeString:
        """The picture, small."""
        return record_thumbnail(image)

    @display(description="Size")
    def size(self, image: DatasetImage) -> str:
        """Width x height in pixels."""
        return f"{image.width} x {image.height}"


class DatasetVersionInline(ReadOnlyInline):
    """The versions of a dataset."""

    model = DatasetVersion
    fields = ["number", "image_count", "job", "created_at"]
    readonly_fields = ["number", "image_count", "job", "created_at"]
    show_change_link = True

    def get_queryset(self, request: HttpRequest) -> QuerySet[DatasetVersion]:
        """Without the manifests."""
        return super().get_queryset(request).defer("manifest", "rejected").select_related("job", "dataset")


@admin.register(Dataset)
class DatasetAdmin(ReadOnlyAdmin):
    """Sets of uploaded pictures."""

    list_display = ["name", "owner", "image_count", "version_count", "created_at"]
    list_filter = ["created_at"]
    search_fields = ["name", "owner__username"]
    list_select_related = ["owner"]
    inlines = [DatasetImageInline, DatasetVersionInline]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Dataset]:
        """With both counts, in the one query of the list."""
        counts = {"pictures": Count("images", distinct=True), "prepared": Count("versions", distinct=True)}
        return super().get_queryset(request).annotate(**counts)

    @display(description="Pictures", ordering="pictures")
    def image_count(self, dataset: Dataset) -> int:
        """How many pictures were uploaded."""
        return dataset.pictures  # type: ignore[attr-defined]

    @display(description="Versions", ordering="prepared")
    def version_count(self, dataset: Dataset) -> int:
        """How often it was prepared."""
        return dataset.prepared  # type: ignore[attr-defined]


@admin.register(DatasetImage)
class DatasetImageAdmin(PictureAdminMixin, ModelAdmin):
    """Uploaded pictures. Captions may be corrected; the bytes never change."""

    list_display = ["thumbnail", "name", "dataset", "owner", "short_caption", "size", "file_size", "created_at"]
    list_display_links = ["name"]
    list_filter = ["created_at"]
    search_fields = ["name", "caption", "dataset__name", "owner__username", "sha256"]
    readonly_fields = ["thumbnail", "name", "dataset", "owner", "size", "file_size", "sha256", "created_at"]
    fields = ["thumbnail", "name", "caption", "dataset", "owner", "size", "file_size", "sha256", "created_at"]
    list_select_related = ["dataset", "owner"]
    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Pictures come through the upload, which judges them."""
        return False

    @display(description="Caption")
    def short_caption(self, image: DatasetImage) -> str:
        """The beginning of the caption."""
        return image.caption if len(image.caption) <= 80 else image.caption[:79] + "…"

    @display(description="Pixels")
    def size(self, image: DatasetImage) -> str:
        """Width x height."""
        return f"{image.width} x {image.height}"

    @display(description="File size", ordering="size_bytes")
    def file_size(self, image: DatasetImage) -> str:
        """Stored bytes."""
        return megabytes(image.size_bytes)


@admin.register(DatasetVersion)
class DatasetVersionAdmin(ReadOnlyAdmin):
    """Frozen preparations of datasets."""

    list_display = ["__str__", "owner", "job_state", "image_count", "created_at"]
    list_filter = ["created_at", "job__state"]
    search_fields = ["dataset__name", "owner__username", "manifest_hash"]
    readonly_fields = ["job_state", "shown_rejected", "shown_manifest"]
    fields = [
        "dataset",
        "number",
        "owner",
        "job_state",
        "image_count",
        "manifest_hash",
        "shown_rejected",
        "shown_manifest",
    ]
    list_select_related = ["dataset", "owner", "job"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[DatasetVersion]:
        """Without the manifests; a version's page fetches its own."""
        return super().get_queryset(request).defer("manifest", "rejected")

    @display(description="Preparation", ordering="job__state")
    def job_state(self, version: DatasetVersion) -> str | SafeString:
        """State of its job, linked."""
        return record_link(version.job, state_label(version.job.state))

    @display(description="Left out")
    def shown_rejected(self, version: DatasetVersion) -> str | SafeString:
        """Pictures that were left out, with the reasons."""
        return pretty_json(version.rejected) if version.rejected else "nothing"

    @display(description="Manifest")
    def shown_manifest(self, version: DatasetVersion) -> str | SafeString:
        """What training reads."""
        return pretty_json(version.manifest) if version.manifest else "made once the preparation succeeded"
