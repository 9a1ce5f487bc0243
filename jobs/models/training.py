"""Requests to train a LoRA, and what came out."""

from django.db import models

from jobs.models.base_model import BaseModel
from jobs.models.dataset import DatasetVersion
from jobs.models.record import OwnedRecord


class TrainingRun(OwnedRecord):
    """One training: which dataset version, which base, into which LoRA. The configuration is the job's spec."""

    job = models.OneToOneField("jobs.Job", on_delete=models.PROTECT, related_name="training_run")
    dataset_version = models.ForeignKey(DatasetVersion, on_delete=models.PROTECT, related_name="training_runs")
    base_model = models.ForeignKey(BaseModel, on_delete=models.PROTECT, related_name="training_runs")
    lora_name = models.CharField(max_length=100, help_text="The LoRA that this run adds a version to.")
    losses = models.JSONField(default=list, editable=False, help_text="Loss of every step, in order.")
    samples = models.JSONField(
        default=list, editable=False, help_text="[{step, prompt, sha256}] sample pictures; step 0 is before training."
    )

    class Meta:
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return f"training of {self.lora_name}"
