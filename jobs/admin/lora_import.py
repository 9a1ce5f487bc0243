"""LoRA files from elsewhere in the admin: a form to import one, and what became of the others."""

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import reverse
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.decorators import display
from unfold.widgets import UnfoldAdminFileFieldWidget, UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from core.errors import CoreError
from jobs.admin.readonly import ReadOnlyAdmin, megabytes, record_link, state_label
from jobs.errors import JobsError
from jobs.lora_imports import lora_import_submit
from jobs.models import BaseModel, LoraImport
from jobs.status import Visibility


class LoraImportForm(forms.ModelForm):  # type: ignore[type-arg]
    """A file and what to call it; submits the job once everything is right."""

    file = forms.FileField(widget=UnfoldAdminFileFieldWidget, help_text="A safetensors file: kohya/WebUI or diffusers.")
    base_model = forms.ModelChoiceField(BaseModel.objects.ready(), widget=UnfoldAdminSelectWidget)
    lora_name = forms.CharField(max_length=100, widget=UnfoldAdminTextInputWidget)
    trigger_word = forms.CharField(max_length=100, required=False, widget=UnfoldAdminTextInputWidget)
    visibility = forms.ChoiceField(choices=Visibility.choices, widget=UnfoldAdminSelectWidget)
    request: HttpRequest

    class Meta:
        model = LoraImport
        fields = ["base_model", "lora_name", "trigger_word", "visibility"]

    def clean(self) -> dict[str, Any]:
        """Submit here, where a refusal can still be shown beside the form."""
        values = dict(super().clean() or {})
        if not self.errors:
            try:
                self.job = lora_import_submit(owner=self.request.user, **values)  # type: ignore[arg-type]
            except (CoreError, JobsError) as error:
                raise ValidationError(str(error)) from error
        return values

    def save(self, commit: bool = True) -> LoraImport:
        """The row that the submission made."""
        row: LoraImport = self.job.lora_import
        return row

    def save_m2m(self) -> None:
        """Nothing more to save."""


@admin.register(LoraImport)
class LoraImportAdmin(ReadOnlyAdmin):
    """LoRA files that people brought from elsewhere."""

    list_display = ["lora_name", "owner", "base_model", "job_state", "file_size", "created_at"]
    list_filter = ["created_at", "job__state"]
    search_fields = ["lora_name", "file_name", "owner__username", "sha256"]
    readonly_fields = ["job_state", "version", "file_size"]
    fields = [
        "lora_name",
        "owner",
        "base_model",
        "trigger_word",
        "visibility",
        "job_state",
        "version",
        "file_name",
        "file_size",
        "sha256",
        "created_at",
    ]
    list_select_related = ["owner", "base_model", "job", "lora_version__lora"]

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Staff with the right to add one: through the form, which judges the file."""
        return ModelAdmin.has_add_permission(self, request)

    def get_fields(self, request: HttpRequest, obj: LoraImport | None = None) -> list[Any]:
        """The form's, or the row's."""
        return list(self.fields or []) if obj else ["file", "base_model", "lora_name", "trigger_word", "visibility"]

    def get_readonly_fields(self, request: HttpRequest, obj: LoraImport | None = None) -> Any:
        """Nothing of a new import, everything of an old one."""
        return super().get_readonly_fields(request, obj) if obj else []

    def get_form(self, request: HttpRequest, obj: LoraImport | None = None, change: bool = False, **kwargs: Any) -> Any:
        """A form that knows who asks."""
        if obj:
            return super().get_form(request, obj, change, **kwargs)
        return type("PersonsLoraImportForm", (LoraImportForm,), {"request": request})

    def save_model(self, request: HttpRequest, obj: LoraImport, form: Any, change: bool) -> None:
        """The submission saved it."""

    def response_add(self, request: HttpRequest, obj: LoraImport, post_url_continue: str | None = None) -> HttpResponse:
        """On to the job, whose progress is what one wants to see."""
        messages.success(request, f"{obj.file_name} is being judged")
        return HttpResponseRedirect(reverse("admin:jobs_job_change", args=[obj.job_id]))

    @display(description="Import", ordering="job__state")
    def job_state(self, lora_import: LoraImport) -> str | SafeString:
        """State of its job, linked."""
        return record_link(lora_import.job, state_label(lora_import.job.state))

    @display(description="LoRA version")
    def version(self, lora_import: LoraImport) -> str | SafeString:
        """What came of it."""
        return record_link(lora_import.lora_version)

    @display(description="File size", ordering="size_bytes")
    def file_size(self, lora_import: LoraImport) -> str:
        """Stored bytes."""
        return megabytes(lora_import.size_bytes)
