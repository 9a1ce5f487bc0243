"""Hardened settings for a site that others reach: no default secret, HTTPS, secure cookies, JSON logs."""

from django.core.exceptions import ImproperlyConfigured

from lorasite.settings.base import *  # noqa: F403
from lorasite.settings.base import ENVIRONMENT

_secret = ENVIRONMENT.secret_key.get_secret_value()
if len(_secret) < 50:
    raise ImproperlyConfigured(
        f"LORASITE_SECRET_KEY has {len(_secret)} characters, at least 50 are needed. Make one with: "
        "python -c 'import secrets; print(secrets.token_urlsafe(64))'"
    )
if ENVIRONMENT.debug:
    raise ImproperlyConfigured("LORASITE_DEBUG is on: production settings refuse it, unset it")

SECURE_SSL_REDIRECT = True
# Health checks come from inside, without TLS.
SECURE_REDIRECT_EXEMPT = [r"^healthz$", r"^readyz$"]
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
SECURE_HSTS_SECONDS = 365 * 24 * 3600
SECURE_HSTS_INCLUDE_SUBDOMAINS = True
SECURE_HSTS_PRELOAD = True
SESSION_COOKIE_SECURE = True
CSRF_COOKIE_SECURE = True
