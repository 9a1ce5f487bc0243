"""Which blobs the artifact store holds, as far as the database knows."""

from django.db import models
from django.db.models.functions import Now

from jobs.models.record import Sha256Field


class Artifact(models.Model):
    """One stored blob. The row is written before the bytes, so that no blob is ever unknown.

    Whoever stores or references a blob renews `put_at`; only blobs that nobody renewed for a day and nothing references
    are removed, under a lock on this row (`jobs/garbage.py`).
    """

    sha256 = Sha256Field(primary_key=True)
    size_bytes = models.PositiveBigIntegerField()
    created_at = models.DateTimeField(db_default=Now())
    put_at = models.DateTimeField(db_default=Now(), help_text="Last time that somebody stored or referenced it.")

    class Meta:
        indexes = [models.Index(fields=["put_at"], name="artifact_put_at")]

    def __str__(self) -> str:
        return self.sha256[:12]
