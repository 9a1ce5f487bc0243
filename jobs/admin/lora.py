"""LoRAs and their versions in the admin."""

from django.contrib import admin
from django.db.models import Count, QuerySet
from django.http import HttpRequest
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.decorators import display

from jobs.admin.readonly import ReadOnlyAdmin, ReadOnlyInline, megabytes, pretty_json, record_link
from jobs.models import Lora, LoraVersion


class LoraVersionInline(ReadOnlyInline):
    """The versions of a LoRA."""

    model = LoraVersion
    fields = ["number", "kohya_sha256", "file_size", "training_run", "created_at"]
    readonly_fields = fields
    show_change_link = True

    def get_queryset(self, request: HttpRequest) -> QuerySet[LoraVersion]:
        """With the names that the table shows."""
        return super().get_queryset(request).select_related("lora", "training_run")

    @display(description="File size")
    def file_size(self, version: LoraVersion) -> str:
        """Of the kohya file."""
        return megabytes(version.kohya_size_bytes)


@admin.register(Lora)
class LoraAdmin(ModelAdmin):
    """Named LoRAs. Trigger word and visibility may be corrected."""

    list_display = ["name", "owner", "base_model", "version_count", "trigger_word", "visibility", "created_at"]
    list_filter = ["visibility", "base_model", "created_at"]
    search_fields = ["name", "owner__username", "trigger_word"]
    readonly_fields = ["name", "owner", "base_model", "created_at"]
    fields = ["name", "owner", "base_model", "trigger_word", "visibility", "created_at"]
    list_select_related = ["owner", "base_model"]
    inlines = [LoraVersionInline]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Lora]:
        """With the number of versions."""
        return super().get_queryset(request).annotate(version_total=Count("versions"))

    def has_add_permission(self, request: HttpRequest) -> bool:
        """LoRAs come out of trainings."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Lora | None = None) -> bool:
        """Only the owner deletes a LoRA, through the API."""
        return False

    @display(description="Versions", ordering="version_total")
    def version_count(self, lora: Lora) -> int:
        """How many trainings it has."""
        return lora.version_total  # type: ignore[attr-defined]


@admin.register(LoraVersion)
class LoraVersionAdmin(ReadOnlyAdmin):
    """Files of finished trainings; the bytes behind a hash never change."""

    list_display = ["__str__", "owner", "rank", "file_size", "short_hash", "created_at"]
    list_filter = ["created_at"]
    search_fields = ["lora__name", "owner__username", "kohya_sha256", "model_hash"]
    readonly_fields = ["training", "file_size", "shown_facts", "shown_peft_files"]
    fields = [
        "lora",
        "number",
        "owner",
        "training",
        "file_size",
        "kohya_sha256",
        "diffusers_sha256",
        "model_hash",
        "shown_facts",
        "shown_peft_files",
        "created_at",
    ]
    list_select_related = ["lora", "owner"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[LoraVersion]:
        """Without the file table."""
        return super().get_queryset(request).defer("peft_files")

    @display(description="Rank")
    def rank(self, version: LoraVersion) -> str:
        """From the training's facts."""
        return str(version.facts.get("rank", "-"))

    @display(description="File size", ordering="kohya_size_bytes")
    def file_size(self, version: LoraVersion) -> str:
        """Of the kohya file."""
        return megabytes(version.kohya_size_bytes)

    @display(description="File hash")
    def short_hash(self, version: LoraVersion) -> str:
        """The first characters that other tools show."""
        return version.kohya_sha256[:12]

    @display(description="Training")
    def training(self, version: LoraVersion) -> str | SafeString:
        """The run that made it."""
        return record_link(version.training_run)

    @display(description="Facts")
    def shown_facts(self, version: LoraVersion) -> SafeString:
        """Rank, modules, final loss and the like."""
        return pretty_json(version.facts)

    @display(description="PEFT folder")
    def shown_peft_files(self, version: LoraVersion) -> SafeString:
        """File names and their hashes."""
        return pretty_json(version.peft_files)
