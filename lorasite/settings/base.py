"""Settings of every installation; each value that differs comes from `lorasite.environment`."""

from typing import Any

import dj_database_url

from lorasite.environment import Environment
from lorasite.logging import logging_settings
from lorasite.settings.admin_site import UNFOLD as UNFOLD

ENVIRONMENT = Environment()
DATA = ENVIRONMENT.data.resolve()
DATA.mkdir(parents=True, exist_ok=True)

DEBUG = ENVIRONMENT.debug
# A known key is acceptable only where nobody else can reach the site; production refuses it (settings/production.py).
SECRET_KEY = ENVIRONMENT.secret_key.get_secret_value() or "development-only-" + "x" * 40
ALLOWED_HOSTS = ENVIRONMENT.allowed_hosts
CSRF_TRUSTED_ORIGINS = ENVIRONMENT.csrf_trusted_origins

INSTALLED_APPS = [
    "unfold",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "django_filters",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "jobs",
    "lorasite",  # for `manage.py studio`
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "lorasite.urls"
ASGI_APPLICATION = "lorasite.asgi.application"
TEMPLATES: list[dict[str, Any]] = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

if ENVIRONMENT.database_url:
    DATABASES: dict[str, Any] = {"default": dict(dj_database_url.parse(ENVIRONMENT.database_url))}
else:
    DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": DATA / "lorasite.sqlite3"}}
if "sqlite" in DATABASES["default"]["ENGINE"]:
    # IMMEDIATE takes the write lock at BEGIN: two writers wait for each other instead of failing as "locked".
    DATABASES["default"]["OPTIONS"] = {
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
    }
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

AUTH_USER_MODEL = "jobs.User"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("UserAttributeSimilarityValidator", "MinimumLengthValidator", "CommonPasswordValidator")
]
# Sessions and throttles live in the database and in memory: the web tier has no broker to lose.
SESSION_ENGINE = "django.contrib.sessions.backends.db"

LANGUAGE_CODE = "en"
FORMAT_MODULE_PATH = "lorasite.formats"
TIME_ZONE = "UTC"
USE_TZ = True

STATIC_URL = "static/"
STATIC_ROOT = DATA / "static"
STATIC_ROOT.mkdir(exist_ok=True)
DATA_UPLOAD_MAX_MEMORY_SIZE = 2 * 2**20  # bytes of a request body without files
DATA_UPLOAD_MAX_NUMBER_FILES = 200
FILE_UPLOAD_MAX_MEMORY_SIZE = 2 * 2**20  # bytes; larger uploads go to a temporary file

if ENVIRONMENT.storage == "s3":
    _artifacts: dict[str, Any] = {
        "BACKEND": "jobs.s3_storage.S3ArtifactStorage",
        "OPTIONS": {
            "bucket_name": ENVIRONMENT.s3_bucket,
            "endpoint_url": ENVIRONMENT.s3_endpoint_url or None,
            "region_name": ENVIRONMENT.s3_region,
            "access_key": ENVIRONMENT.s3_access_key.get_secret_value() or None,
            "secret_key": ENVIRONMENT.s3_secret_key.get_secret_value() or None,
            "signature_version": "s3v4",
            "addressing_style": "path",
            "default_acl": None,
            "file_overwrite": True,
        },
    }
else:
    _artifacts = {
        "BACKEND": "jobs.local_storage.LocalArtifactStorage",
        "OPTIONS": {"location": DATA / "storage", "file_permissions_mode": 0o600, "directory_permissions_mode": 0o700},
    }
STORAGES = {
    "default": _artifacts,
    "staticfiles": {"BACKEND": "whitenoise.storage.CompressedManifestStaticFilesStorage"},
}

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "jobs.api.authentication.ApiKeyAuthentication",
        "rest_framework.authentication.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    "DEFAULT_FILTER_BACKENDS": ["django_filters.rest_framework.DjangoFilterBackend"],
    "DEFAULT_PAGINATION_CLASS": "jobs.api.pagination.CreatedAtCursorPagination",
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "jobs.api.exception_handler.one_shape",
    "PAGE_SIZE": 50,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "lorasite",
    "DESCRIPTION": "Prepare pictures, train LoRAs, generate images.",
    "VERSION": "0.1.0",
    # The request bodies are pydantic's JSON Schema, which 3.0 cannot say in full (null, exclusive limits).
    "OAS_VERSION": "3.1.0",
    "ENUM_NAME_OVERRIDES": {"JobState": "jobs.status.JobState"},
    "SCHEMA_PATH_PREFIX": "/api/v1/",  # operations are grouped by what follows
    "SERVE_INCLUDE_SCHEMA": False,
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
    "COMPONENT_SPLIT_REQUEST": True,
}

# Read by jobs/; all durations in seconds.
LORASITE: dict[str, Any] = {
    "DATA": DATA,
    "LEASE_SECONDS": ENVIRONMENT.lease_seconds,
    "GENERATE_LEASE_SECONDS": ENVIRONMENT.generate_lease_seconds,
    "HEARTBEAT_SECONDS": ENVIRONMENT.heartbeat_seconds,
    "DISPATCH_SECONDS": ENVIRONMENT.dispatch_seconds,
    "DRAIN_SECONDS": ENVIRONMENT.drain_seconds,
    "STEP_SECONDS": ENVIRONMENT.step_seconds,
    "GENERATE_TIME_LIMIT_SECONDS": ENVIRONMENT.generate_time_limit_seconds,
    "TRAIN_TIME_LIMIT_SECONDS": ENVIRONMENT.train_time_limit_seconds,
    "QUEUE_SECONDS": ENVIRONMENT.queue_seconds,
    "MAX_QUEUED_JOBS": ENVIRONMENT.max_queued_jobs,
    "MAX_QUEUED_JOBS_PER_PERSON": ENVIRONMENT.max_queued_jobs_per_person,
    "MAX_QUEUED_SECONDS_PER_PERSON": ENVIRONMENT.max_queued_seconds_per_person,
    "MAX_RUNNING_GENERATIONS_PER_PERSON": ENVIRONMENT.max_running_generations_per_person,
    "MAX_RUNNING_TRAININGS_PER_PERSON": ENVIRONMENT.max_running_trainings_per_person,
    "WORKER_MEMORY_BYTES": ENVIRONMENT.worker_memory_bytes,
    "GARBAGE_AFTER_SECONDS": ENVIRONMENT.garbage_after_seconds,
    "CACHE_BYTES": ENVIRONMENT.cache_bytes,
    "UPLOAD_MAX_BYTES": ENVIRONMENT.upload_max_bytes,
    "LORA_MAX_BYTES": ENVIRONMENT.lora_max_bytes,
    "WORKER_THREADS": ENVIRONMENT.worker_threads,
    "POOL_SIZE": ENVIRONMENT.pool_size,
    "POOL_BYTES": ENVIRONMENT.pool_bytes,
    "IDLE_SECONDS": ENVIRONMENT.idle_seconds,
    "ATTENTION": ENVIRONMENT.attention,
    "VAE_SLICING": ENVIRONMENT.vae_slicing,
    "VAE_TILING": ENVIRONMENT.vae_tiling,
    "CHANNELS_LAST": ENVIRONMENT.channels_last,
    "TORCH_COMPILE": ENVIRONMENT.torch_compile,
}

LOGGING_CONFIG = None
logging_settings(ENVIRONMENT.log_format, ENVIRONMENT.log_level)
