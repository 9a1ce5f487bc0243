"""LoRA files that people brought from elsewhere."""

from django.db import models

from jobs.models.base_model import BaseModel
from jobs.models.lora import LoraVersion
from jobs.models.record import OwnedRecord, Sha256Field
from jobs.status import Visibility


class LoraImport(OwnedRecord):
    """One uploaded LoRA file: for which base, into which LoRA, and the version that came of it."""

    job = models.OneToOneField("jobs.Job", on_delete=models.PROTECT, related_name="lora_import")
    base_model = models.ForeignKey(BaseModel, on_delete=models.PROTECT, related_name="lora_imports")
    lora_name = models.CharField(max_length=100, help_text="The LoRA that this import adds a version to.")
    trigger_word = models.CharField(max_length=100, blank=True, default="")
    visibility = models.CharField(max_length=10, choices=Visibility.choices, default=Visibility.PRIVATE)
    file_name = models.CharField(max_length=255, help_text="As uploaded.")
    sha256 = Sha256Field(help_text="Of the uploaded file.")
    size_bytes = models.PositiveBigIntegerField()
    lora_version = models.OneToOneField(
        LoraVersion, null=True, editable=False, on_delete=models.SET_NULL, related_name="lora_import"
    )

    class Meta:
        ordering = ["-created_at"]
        verbose_name = "LoRA import"

    def __str__(self) -> str:
        return f"import of {self.lora_name}"
