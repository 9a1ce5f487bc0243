"""What people bring to a generation besides words: pictures to begin from, and named prompt templates."""

from django.db import models

from jobs.models.record import OwnedRecord, Sha256Field


class InputImage(OwnedRecord):
    """An uploaded picture to begin from, or a mask: upright, without metadata, kept under its hash."""

    name = models.CharField(max_length=255, help_text="The uploaded file's name: a label, never a path.")
    sha256 = Sha256Field(help_text="Of the stored PNG.")
    size_bytes = models.PositiveBigIntegerField()
    width = models.PositiveIntegerField(help_text="Pixels.")
    height = models.PositiveIntegerField(help_text="Pixels.")

    class Meta:
        ordering = ["-created_at"]
        constraints = [
            models.UniqueConstraint(fields=["owner", "sha256"], name="input_image_once_per_owner"),
            models.CheckConstraint(condition=models.Q(width__gt=0, height__gt=0), name="input_image_has_size"),
        ]

    def __str__(self) -> str:
        return self.name


class Style(OwnedRecord):
    """A named piece of prompt of one person, as WebUI's styles."""

    name = models.CharField(max_length=100)
    prompt = models.TextField(
        blank=True,
        db_default="",
        max_length=4000,
        help_text="Where it holds {prompt}, the person's words go there; otherwise it is put behind them.",
    )
    negative_prompt = models.TextField(
        blank=True, db_default="", max_length=4000, help_text="In the same way for the negative prompt."
    )

    class Meta:
        ordering = ["name"]
        constraints = [models.UniqueConstraint(fields=["owner", "name"], name="style_name_unique_per_owner")]

    def __str__(self) -> str:
        return self.name
