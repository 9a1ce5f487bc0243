"""Bearer API keys. Session authentication with CSRF is DRF's own and stands beside it in the settings."""

import hmac
from datetime import timedelta

from django.db.models import Q
from django.db.models.functions import Now
from django.utils import timezone
from rest_framework.authentication import BaseAuthentication, get_authorization_header
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.request import Request

from jobs.database_clock import after
from jobs.models import ApiKey, User
from jobs.models.accounts import KEY_PREFIX

SCHEME = "Bearer"
MAX_SECRET_BYTES = 200
LAST_USED_SECONDS = 60
"""`last_used_at` is written at most this often per key, so that reads stay reads."""


class ApiKeyAuthentication(BaseAuthentication):
    """`Authorization: Bearer lrs_...`; unknown, revoked and expired keys all look the same."""

    def authenticate(self, request: Request) -> tuple[User, ApiKey] | None:
        """(user, key), or None where the request carries no bearer key.

        Raises:
            AuthenticationFailed: The key is not usable.
        """
        parts = get_authorization_header(request).split()
        if not parts or parts[0].lower() != SCHEME.lower().encode():
            return None
        if len(parts) != 2 or len(parts[1]) > MAX_SECRET_BYTES or not parts[1].startswith(KEY_PREFIX.encode()):
            raise AuthenticationFailed(f"send your key as 'Authorization: {SCHEME} {KEY_PREFIX}...'")
        digest = ApiKey.hash_secret(parts[1].decode("latin-1"))
        key = ApiKey.objects.usable().select_related("user").filter(secret_sha256=digest).first()
        if key is None or not hmac.compare_digest(key.secret_sha256, digest):
            raise AuthenticationFailed("this API key is unknown, revoked or expired: ask for a new one")
        _note_use(key)
        return key.user, key

    def authenticate_header(self, request: Request) -> str:
        """WWW-Authenticate of a 401."""
        return f'{SCHEME} realm="lorasite"'


def _note_use(key: ApiKey) -> None:
    age = None if key.last_used_at is None else timezone.now() - key.last_used_at
    if age is not None and age < timedelta(seconds=LAST_USED_SECONDS):
        return
    stale = Q(last_used_at__isnull=True) | Q(last_used_at__lt=after(-LAST_USED_SECONDS))
    ApiKey.objects.filter(stale, pk=key.pk).update(last_used_at=Now())
