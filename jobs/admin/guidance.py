"""What people bring to generations, and looks at running ones, in the admin."""

from uuid import UUID

from django.contrib import admin
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.decorators import display

from jobs.admin.readonly import ReadOnlyAdmin, megabytes
from jobs.admin.thumbnails import PictureAdminMixin
from jobs.models import InputImage, Job, JobPreview, Style
from jobs.status import LEASED


@admin.register(InputImage)
class InputImageAdmin(PictureAdminMixin, ModelAdmin):
    """Pictures to begin from, and masks. They may be deleted, not changed."""

    list_display = ["thumbnail", "name", "owner", "pixels", "file_size", "created_at"]
    list_display_links = ["name"]
    list_filter = ["created_at"]
    search_fields = ["name", "owner__username", "sha256"]
    readonly_fields = ["thumbnail", "name", "owner", "pixels", "file_size", "sha256", "created_at"]
    fields = readonly_fields
    list_select_related = ["owner"]
    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Uploads come through the API, which judges them."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: InputImage | None = None) -> bool:
        """The bytes never change."""
        return False

    @display(description="Pixels")
    def pixels(self, image: InputImage) -> str:
        """Width x height."""
        return f"{image.width} x {image.height}"

    @display(description="File size", ordering="size_bytes")
    def file_size(self, image: InputImage) -> str:
        """Stored bytes."""
        return megabytes(image.size_bytes)


@admin.register(Style)
class StyleAdmin(ModelAdmin):
    """Named prompt templates."""

    list_display = ["name", "owner", "prompt", "negative_prompt", "created_at"]
    list_filter = ["created_at"]
    search_fields = ["name", "prompt", "negative_prompt", "owner__username"]
    fields = ["owner", "name", "prompt", "negative_prompt"]
    autocomplete_fields = ["owner"]
    list_select_related = ["owner"]


@admin.register(JobPreview)
class JobPreviewAdmin(ReadOnlyAdmin):
    """The newest look at each running job."""

    list_display = ["job", "step", "at"]
    list_filter = ["at"]
    search_fields = ["job__id", "job__owner__username"]
    fields = ["job", "step", "at", "look"]
    readonly_fields = fields
    list_select_related = ["job"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[JobPreview]:
        """Without the pictures."""
        return super().get_queryset(request).defer("jpeg")

    def get_urls(self) -> list[URLPattern]:
        """Adds `<job id>/picture/`."""
        view = self.admin_site.admin_view(self.picture_view)
        return [path("<uuid:job_id>/picture/", view, name="jobs_jobpreview_picture"), *super().get_urls()]

    def picture_view(self, request: HttpRequest, job_id: UUID) -> HttpResponse:
        """The JPEG, for staff who may see it."""
        preview = JobPreview.objects.filter(job_id=job_id).first()
        if preview is None or not self.has_view_permission(request, preview):
            raise Http404(f"job {job_id} shows no preview")
        headers = {
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'; sandbox",
        }
        return HttpResponse(bytes(preview.jpeg), content_type="image/jpeg", headers=headers)

    @display(description="Preview")
    def look(self, preview: JobPreview) -> str | SafeString:
        """The picture."""
        return preview_picture(preview.job)


def preview_picture(job: Job) -> str | SafeString:
    """The newest look at a job that is being worked on."""
    if job.state not in LEASED or not JobPreview.objects.filter(job=job).exists():
        return "-"
    url = reverse("admin:jobs_jobpreview_picture", args=[job.pk])
    return format_html('<img class="lrs-thumbnail" src="{}" alt="Preview of {}">', url, job)
