"""Requests for pictures, and the pictures."""

from django.db import models

from jobs.models.base_model import BaseModel
from jobs.models.lora import LoraVersion
from jobs.models.record import OwnedRecord, Sha256Field


class GenerationRequest(OwnedRecord):
    """One request of n pictures. The configuration is the job's spec."""

    job = models.OneToOneField("jobs.Job", on_delete=models.PROTECT, related_name="generation_request")
    base_model = models.ForeignKey(BaseModel, on_delete=models.PROTECT, related_name="generation_requests")
    loras = models.ManyToManyField(LoraVersion, through="jobs.GenerationLora", related_name="generation_requests")

    class Meta:
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return f"generation {str(self.id)[:8]}"


class GenerationLora(models.Model):
    """Which LoRA version a request used, and how strongly."""

    id = models.BigAutoField(primary_key=True)
    request = models.ForeignKey(GenerationRequest, on_delete=models.CASCADE, related_name="lora_uses")
    lora_version = models.ForeignKey(LoraVersion, on_delete=models.PROTECT, related_name="uses")
    weight = models.FloatField(default=1.0)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["request", "lora_version"], name="generation_lora_once_per_request")
        ]

    def __str__(self) -> str:
        return f"{self.lora_version} at {self.weight:g}"


class GeneratedImage(OwnedRecord):
    """One picture that came out of a request."""

    request = models.ForeignKey(GenerationRequest, on_delete=models.CASCADE, related_name="images")
    number = models.PositiveIntegerField(help_text="Position in the request, from 0.")
    seed = models.PositiveBigIntegerField()
    sha256 = Sha256Field(help_text="Of the stored file.")
    image_format = models.CharField(
        max_length=8,
        choices=[(name, name) for name in ("png", "jpeg", "webp")],
        db_default="png",
        help_text="Of the stored file.",
    )
    size_bytes = models.PositiveBigIntegerField()
    width = models.PositiveIntegerField()
    height = models.PositiveIntegerField()

    class Meta:
        ordering = ["-created_at", "number"]
        constraints = [
            models.UniqueConstraint(fields=["request", "number"], name="generated_image_number_unique_per_request")
        ]

    def __str__(self) -> str:
        return f"image {self.number} of {self.request}"
