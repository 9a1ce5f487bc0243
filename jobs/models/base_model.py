"""Diffusion base models that the service offers."""

import uuid

from django.db import models

from core.base_facts import BaseFacts


class BaseModelQuerySet(models.QuerySet["BaseModel"]):
    def ready(self) -> "BaseModelQuerySet":
        """Bases whose preparation succeeded, so that jobs may use them."""
        return self.exclude(fingerprint="")


class BaseModel(models.Model):
    """A diffusion base (SD 1.x or SDXL): where it came from and the facts of its prepared form.

    Registered by operators only. `files` maps each prepared file's relative path to its SHA-256 in the store, so that
    any node can rebuild the prepared folder. Empty `fingerprint`: not prepared yet.
    """

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    name = models.CharField(max_length=100, unique=True, help_text="Short name used in requests and file metadata.")
    source = models.CharField(
        max_length=500, help_text="Folder on the worker nodes, or a hub id (owner/model or owner/model@revision)."
    )
    vae_source = models.CharField(
        "VAE source",
        max_length=500,
        blank=True,
        default="",
        db_default="",
        help_text="Folder or hub id whose VAE takes the place of the base's own. Empty: its own.",
    )
    keep_warm = models.BooleanField(default=False, help_text="Workers load it at start and keep it.")
    created_at = models.DateTimeField(auto_now_add=True)
    fingerprint = models.CharField(max_length=64, blank=True, default="", editable=False)
    facts = models.JSONField(default=dict, editable=False)
    files = models.JSONField(default=dict, editable=False)
    job = models.OneToOneField(
        "jobs.Job",
        null=True,
        blank=True,
        on_delete=models.SET_NULL,
        related_name="prepared_base",
        editable=False,
        help_text="The newest preparation.",
    )

    objects = BaseModelQuerySet.as_manager()

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    def base_facts(self) -> BaseFacts:
        """The prepared manifest's facts.

        Raises:
            core.errors.ConfigError: The base is not prepared, or its facts are damaged.
        """
        return BaseFacts.parse(self.facts)
