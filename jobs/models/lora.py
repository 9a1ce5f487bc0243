"""Trained LoRAs and their versions."""

from typing import Any, Self

from django.db import models

from jobs.models.base_model import BaseModel
from jobs.models.record import OwnedQuerySet, OwnedRecord, Sha256Field
from jobs.status import Visibility


class LoraQuerySet(OwnedQuerySet):
    def visible_to(self, user: Any) -> Self:
        """Own LoRAs and public ones."""
        return self.filter(models.Q(owner=user) | models.Q(visibility=Visibility.PUBLIC))


class Lora(OwnedRecord):
    """A named LoRA of one person for one base model; every training adds a version."""

    name = models.CharField(max_length=100)
    base_model = models.ForeignKey(BaseModel, on_delete=models.PROTECT, related_name="loras")
    trigger_word = models.CharField(max_length=100, blank=True, default="")
    visibility = models.CharField(max_length=10, choices=Visibility.choices, default=Visibility.PRIVATE)

    objects = LoraQuerySet.as_manager()  # type: ignore[misc]

    class Meta:
        ordering = ["-created_at"]
        verbose_name = "LoRA"
        constraints = [models.UniqueConstraint(fields=["owner", "name"], name="lora_name_unique_per_owner")]

    def __str__(self) -> str:
        return self.name


class LoraVersion(OwnedRecord):
    """The files of one finished training. Content-addressed: the bytes behind a hash never change."""

    lora = models.ForeignKey(Lora, on_delete=models.CASCADE, related_name="versions")
    number = models.PositiveIntegerField(help_text="1, 2, 3 ... within the LoRA.")
    training_run = models.OneToOneField(
        "jobs.TrainingRun", null=True, on_delete=models.SET_NULL, related_name="lora_version"
    )
    kohya_sha256 = Sha256Field(help_text="The kohya/WebUI file.")
    kohya_size_bytes = models.PositiveBigIntegerField()
    model_hash = Sha256Field(help_text="sshs_model_hash: SHA-256 of the tensor bytes alone.")
    peft_files = models.JSONField(default=dict, help_text="{file name: sha256} of the PEFT folder.")
    diffusers_sha256 = Sha256Field(null=True, blank=True, help_text="pytorch_lora_weights.safetensors of diffusers.")
    facts = models.JSONField(default=dict, help_text="Rank, alpha, modules, final loss and the like.")

    class Meta:
        ordering = ["-created_at"]
        verbose_name = "LoRA version"
        constraints = [models.UniqueConstraint(fields=["lora", "number"], name="lora_version_number_unique")]

    def __str__(self) -> str:
        return f"{self.lora.name} v{self.number}"
