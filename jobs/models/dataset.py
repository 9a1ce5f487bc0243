"""Uploaded pictures and their frozen, prepared versions."""

from django.db import models

from jobs.models.record import OwnedRecord, Sha256Field


class Dataset(OwnedRecord):
    """A named set of uploaded pictures of one person."""

    name = models.CharField(max_length=100)

    class Meta:
        ordering = ["-created_at"]
        constraints = [models.UniqueConstraint(fields=["owner", "name"], name="dataset_name_unique_per_owner")]

    def __str__(self) -> str:
        return self.name


class DatasetImage(OwnedRecord):
    """One uploaded picture: the original bytes are kept under their hash and never change."""

    dataset = models.ForeignKey(Dataset, on_delete=models.CASCADE, related_name="images")
    name = models.CharField(max_length=255, help_text="The uploaded file's name: a label, never a path.")
    caption = models.TextField(blank=True, default="", max_length=4000, help_text="From a sidecar file or typed.")
    sha256 = Sha256Field(help_text="Of the stored original.")
    size_bytes = models.PositiveBigIntegerField()
    width = models.PositiveIntegerField(help_text="Pixels, orientation applied.")
    height = models.PositiveIntegerField(help_text="Pixels, orientation applied.")

    class Meta:
        ordering = ["created_at", "id"]
        constraints = [
            models.UniqueConstraint(fields=["dataset", "sha256"], name="dataset_image_unique_per_dataset"),
            models.CheckConstraint(condition=models.Q(width__gt=0, height__gt=0), name="dataset_image_has_size"),
        ]

    def __str__(self) -> str:
        return self.name


class DatasetVersion(OwnedRecord):
    """One preparation of a dataset. Once its job succeeded, `manifest` is frozen and `manifest_hash` names it."""

    dataset = models.ForeignKey(Dataset, on_delete=models.CASCADE, related_name="versions")
    number = models.PositiveIntegerField(help_text="1, 2, 3 ... within the dataset.")
    job = models.OneToOneField("jobs.Job", on_delete=models.PROTECT, related_name="dataset_version")
    manifest = models.JSONField(null=True, editable=False)
    manifest_hash = models.CharField(max_length=64, blank=True, default="", editable=False)
    image_count = models.PositiveIntegerField(default=0, editable=False)
    rejected = models.JSONField(default=list, editable=False, help_text="[{name, reason}] of pictures left out.")

    class Meta:
        ordering = ["-created_at"]
        constraints = [
            models.UniqueConstraint(fields=["dataset", "number"], name="dataset_version_number_unique"),
            models.CheckConstraint(
                condition=models.Q(manifest_hash="", manifest__isnull=True, image_count=0)
                | (~models.Q(manifest_hash="") & models.Q(manifest__isnull=False, image_count__gt=0)),
                name="dataset_version_whole_or_nothing",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.dataset.name} v{self.number}"

    @property
    def is_ready(self) -> bool:
        """Whether training may use it."""
        return bool(self.manifest_hash)
