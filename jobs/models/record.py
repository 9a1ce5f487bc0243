"""What every owned record has in common: an id that cannot be guessed, an owner, a birthday."""

import uuid
from typing import Any, Self

from django.conf import settings
from django.core.validators import RegexValidator
from django.db import models

SHA256_PATTERN = r"^[0-9a-f]{64}$"


class Sha256Field(models.CharField):  # type: ignore[type-arg]
    """64 lowercase hex digits; the name under which the bytes are stored."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("max_length", 64)
        kwargs.setdefault("validators", [RegexValidator(SHA256_PATTERN, "must be 64 lowercase hex digits")])
        super().__init__(*args, **kwargs)


class OwnedQuerySet(models.QuerySet[Any]):
    """Querysets that begin with the owner, so that forgetting it looks wrong."""

    def owned_by(self, user: Any) -> Self:
        """Rows of this user only; what belongs to others does not exist for them."""
        return self.filter(owner=user)


class OwnedRecord(models.Model):
    """Abstract base of everything that belongs to one person."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="%(class)ss")
    created_at = models.DateTimeField(auto_now_add=True)

    objects = OwnedQuerySet.as_manager()

    class Meta:
        abstract = True
