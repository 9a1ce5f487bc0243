"""Settings of the tests: a throw-away data folder, a fast password hasher, plain static files. The parts are real."""

import tempfile
from pathlib import Path

from lorasite.settings.base import *  # noqa: F403
from lorasite.settings.base import DATABASES, ENVIRONMENT, LORASITE, STORAGES

DATA = ENVIRONMENT.data if "data" in ENVIRONMENT.model_fields_set else Path(tempfile.mkdtemp(prefix="lorasite-tests-"))
LORASITE["DATA"] = DATA
STATIC_ROOT = DATA / "static"
STATIC_ROOT.mkdir(parents=True, exist_ok=True)
if ENVIRONMENT.storage == "local":
    STORAGES["default"]["OPTIONS"]["location"] = DATA / "storage"
STORAGES["staticfiles"] = {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}
if "sqlite" in DATABASES["default"]["ENGINE"]:
    DATABASES["default"]["NAME"] = DATA / "lorasite.sqlite3"
    # A file, not memory: threads and worker processes of a test must see the same database.
    DATABASES["default"]["TEST"] = {"NAME": DATA / "test.sqlite3"}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
