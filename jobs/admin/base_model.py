"""Base models in the admin: registering one submits its preparation."""

from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.decorators import action, display

from jobs.admin.readonly import pretty_json, record_link, state_label
from jobs.errors import JobsError
from jobs.models import BaseModel, User
from jobs.submission import base_preparation_submit


@admin.register(BaseModel)
class BaseModelAdmin(ModelAdmin):
    """Bases that people may train on and generate with."""

    list_display = ["name", "usable", "preparation", "family", "native_size", "keep_warm", "source"]
    list_filter = ["keep_warm"]
    search_fields = ["name", "source", "fingerprint"]
    readonly_fields = ["preparation", "fingerprint", "shown_facts", "file_count", "created_at"]
    list_select_related = ["job"]
    actions = ["prepare_again"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[BaseModel]:
        """Without the file table in lists."""
        return super().get_queryset(request).defer("files")

    def get_fields(self, request: HttpRequest, obj: BaseModel | None = None) -> list[str]:
        """A new base needs a name and a source; facts appear once it is prepared."""
        chosen = ["name", "source", "vae_source", "keep_warm"]
        return chosen if obj is None else chosen + list(self.readonly_fields)

    def get_readonly_fields(self, request: HttpRequest, obj: BaseModel | None = None) -> list[str]:
        """Name and sources identify what LoRAs were trained on, so they stay."""
        return list(self.readonly_fields) if obj is None else ["name", "source", "vae_source", *self.readonly_fields]

    @display(description="Usable", boolean=True)
    def usable(self, base: BaseModel) -> bool:
        """Prepared at least once."""
        return bool(base.fingerprint)

    @display(description="Preparation")
    def preparation(self, base: BaseModel) -> str | SafeString:
        """State of the newest preparation, linked to its job."""
        return record_link(base.job, state_label(base.job.state)) if base.job else "not started"

    @display(description="Family")
    def family(self, base: BaseModel) -> str:
        """Model family once known."""
        return str(base.facts.get("family", "-"))

    @display(description="Native size")
    def native_size(self, base: BaseModel) -> str:
        """Side in pixels once known."""
        size = base.facts.get("native_size_px")
        return f"{size} px" if size else "-"

    @display(description="Facts")
    def shown_facts(self, base: BaseModel) -> str | SafeString:
        """What the prepared manifest says."""
        return pretty_json(base.facts) if base.facts else "known once prepared"

    @display(description="Prepared files")
    def file_count(self, base: BaseModel) -> int:
        """How many files a worker fetches."""
        return len(base.files)

    def save_model(self, request: HttpRequest, obj: BaseModel, form: Any, change: bool) -> None:
        """Adding registers the base and submits its preparation."""
        super().save_model(request, obj, form, change)
        if not change:
            self._prepare(request, obj)

    @action(description="Prepare again", permissions=["change"])
    def prepare_again(self, request: HttpRequest, queryset: QuerySet[BaseModel]) -> None:
        """After the source changed, or after a failed preparation."""
        for base in queryset.select_related("job"):
            self._prepare(request, base)

    def _prepare(self, request: HttpRequest, base: BaseModel) -> None:
        assert isinstance(request.user, User)  # admin views need a login
        try:
            job = base_preparation_submit(owner=request.user, base_model=base)
        except JobsError as error:
            messages.error(request, f"{base.name}: {error}")
        else:
            messages.success(request, f"{base.name}: preparation submitted as job {job.pk}.")
