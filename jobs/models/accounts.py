"""People and their API keys."""

import hashlib
import secrets
import uuid
from typing import Self

from django.conf import settings
from django.contrib.auth.models import AbstractUser
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models.functions import Now

KEY_PREFIX = "lrs_"


class User(AbstractUser):
    """A person with an account. Staff may use the admin."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    scheduling_weight = models.FloatField(
        db_default=1.0,
        validators=[MinValueValidator(0.01), MaxValueValidator(100)],
        help_text="Share of the workers beside others who wait: 2 gets twice as much as 1.",
    )


class OwnerUsage(models.Model):
    """What one person used of the workers lately; the measure of fair turns. Written when a try of a job ends.

    Claims lock this row, so that two workers cannot both take the last job that a person may run at once.
    """

    owner = models.OneToOneField(
        settings.AUTH_USER_MODEL, primary_key=True, on_delete=models.CASCADE, related_name="usage"
    )
    worker_seconds = models.FloatField(default=0.0, help_text="Halved every few hours (jobs/usage.py).")
    as_of = models.DateTimeField(help_text="When `worker_seconds` was last right.")

    def __str__(self) -> str:
        return f"usage of {self.owner_id}"


class ApiKeyQuerySet(models.QuerySet["ApiKey"]):
    def usable(self) -> Self:
        """Keys that are neither revoked nor past their date, of users that are active."""
        alive = models.Q(expires_at__isnull=True) | models.Q(expires_at__gt=Now())
        return self.filter(alive, revoked_at__isnull=True, user__is_active=True)


class ApiKey(models.Model):
    """A bearer key for the REST API: 256 random bits, only their SHA-256 is stored.

    A plain hash is enough because the secret is random, not chosen by a person.
    """

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_keys")
    name = models.CharField(max_length=100, help_text="What this key is for, e.g. 'frontend' or 'my laptop'.")
    prefix = models.CharField(max_length=12, editable=False, help_text="First characters, to recognise the key by.")
    secret_sha256 = models.CharField(max_length=64, unique=True, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True, help_text="Empty: never.")
    revoked_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True, editable=False)

    objects = ApiKeyQuerySet.as_manager()

    class Meta:
        ordering = ["-created_at"]
        verbose_name = "API key"

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix}…)"

    @staticmethod
    def hash_secret(secret: str) -> str:
        """SHA-256 hex digits of a full key string."""
        return hashlib.sha256(secret.encode()).hexdigest()

    @classmethod
    def issue(cls, *, user: User, name: str) -> tuple["ApiKey", str]:
        """Create a key. The second value is the key itself: show it once, it is not stored."""
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        key = cls.objects.create(user=user, name=name, prefix=secret[:10], secret_sha256=cls.hash_secret(secret))
        return key, secret
