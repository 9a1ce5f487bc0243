"""Generated pictures and the requests that they came from, in the admin."""

from django.contrib import admin
from django.db.models import Count, QuerySet
from django.http import HttpRequest
from django.utils.html import format_html_join
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.decorators import display

from jobs.admin.readonly import ReadOnlyAdmin, ReadOnlyInline, megabytes, pretty_json, record_link, state_label
from jobs.admin.thumbnails import PictureAdminMixin, record_thumbnail
from jobs.models import GeneratedImage, GenerationLora, GenerationRequest


class GenerationLoraInline(ReadOnlyInline):
    """The LoRAs of a request."""

    model = GenerationLora
    fields = ["lora_version", "weight"]
    readonly_fields = fields

    def get_queryset(self, request: HttpRequest) -> QuerySet[GenerationLora]:
        """With the names that the table shows."""
        return super().get_queryset(request).select_related("lora_version__lora").order_by("id")


@admin.register(GenerationRequest)
class GenerationRequestAdmin(ReadOnlyAdmin):
    """Requests for pictures."""

    list_display = ["__str__", "owner", "prompt", "base_model", "job_state", "image_count", "created_at"]
    list_filter = ["job__state", "base_model", "created_at"]
    search_fields = ["id", "owner__username"]
    readonly_fields = ["job_state", "settings", "pictures"]
    fields = ["owner", "base_model", "job_state", "pictures", "settings", "created_at"]
    list_select_related = ["owner", "base_model", "job"]
    inlines = [GenerationLoraInline]

    def get_queryset(self, request: HttpRequest) -> QuerySet[GenerationRequest]:
        """With the number of pictures."""
        return super().get_queryset(request).annotate(picture_total=Count("images"))

    @display(description="Prompt")
    def prompt(self, request: GenerationRequest) -> str:
        """The beginning of the prompt."""
        prompt = str(request.job.spec.get("prompt", ""))
        return prompt if len(prompt) <= 80 else prompt[:79] + "…"

    @display(description="Settings")
    def settings(self, request: GenerationRequest) -> SafeString:
        """Prompt, seed, size and all the rest."""
        return pretty_json(request.job.spec)

    @display(description="Job", ordering="job__state")
    def job_state(self, request: GenerationRequest) -> str | SafeString:
        """State of its job, linked."""
        return record_link(request.job, state_label(request.job.state))

    @display(description="Pictures", ordering="picture_total")
    def image_count(self, request: GenerationRequest) -> int:
        """How many pictures are there."""
        return request.picture_total  # type: ignore[attr-defined]

    @display(description="Pictures")
    def pictures(self, request: GenerationRequest) -> str | SafeString:
        """All pictures of the request."""
        images = request.images.order_by("number").select_related("request")
        return format_html_join(" ", "{}", ((record_thumbnail(image),) for image in images)) or "none yet"


@admin.register(GenerationLora)
class GenerationLoraAdmin(ReadOnlyAdmin):
    """Which LoRA versions are used, by whom and how strongly."""

    list_display = ["lora_version", "weight", "request", "owner"]
    list_filter = ["request__created_at"]
    search_fields = ["lora_version__lora__name", "request__owner__username"]
    list_select_related = ["lora_version__lora", "request__owner"]

    @display(description="Owner")
    def owner(self, use: GenerationLora) -> str:
        """Who asked."""
        return str(use.request.owner)


@admin.register(GeneratedImage)
class GeneratedImageAdmin(PictureAdminMixin, ModelAdmin):
    """Pictures that came out of requests."""

    list_display = ["thumbnail", "name", "owner", "prompt", "seed", "pixels", "file_size", "created_at"]
    list_display_links = ["name"]
    list_filter = ["created_at"]
    search_fields = ["owner__username", "sha256", "seed"]
    readonly_fields = [
        "thumbnail",
        "name",
        "request",
        "owner",
        "prompt",
        "seed",
        "pixels",
        "file_size",
        "sha256",
        "created_at",
    ]
    fields = ["thumbnail", "name", "request", "owner", "prompt", "seed", "pixels", "file_size", "sha256", "created_at"]
    list_select_related = ["owner", "request__job"]
    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Pictures come from workers."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: GeneratedImage | None = None) -> bool:
        """Nothing about a picture is edited; it may be deleted."""
        return False

    @display(description="Name")
    def name(self, image: GeneratedImage) -> str:
        """Request and position."""
        return f"{str(image.request_id)[:8]} / {image.number}"

    @display(description="Prompt")
    def prompt(self, image: GeneratedImage) -> str:
        """The beginning of the prompt."""
        prompt = str(image.request.job.spec.get("prompt", ""))
        return prompt if len(prompt) <= 80 else prompt[:79] + "…"

    @display(description="Pixels")
    def pixels(self, image: GeneratedImage) -> str:
        """Width x height."""
        return f"{image.width} x {image.height}"

    @display(description="File size", ordering="size_bytes")
    def file_size(self, image: GeneratedImage) -> str:
        """Stored bytes."""
        return megabytes(image.size_bytes)
