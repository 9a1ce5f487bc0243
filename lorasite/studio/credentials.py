"""The secrets of one studio: made once, kept in its data folder, readable by the owner of that folder only."""

import json
import os
import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lorasite.studio.errors import StudioError


@dataclass(frozen=True)
class Credentials:
    """Never logged; the admin password alone is shown, at start."""

    secret_key: str
    valkey_password: str
    admin_password: str


def studio_credentials(folder: Path) -> Credentials:
    """The credentials in `folder`/secrets.json; made at the first call.

    Raises:
        StudioError: The file is damaged, or others may read it and that cannot be changed.
    """
    path = folder / "secrets.json"
    if not path.exists():
        made = Credentials(
            secret_key=secrets.token_urlsafe(64),
            valkey_password=secrets.token_hex(32),
            admin_password=secrets.token_urlsafe(12),
        )
        _write(path, made)
        return made
    path.chmod(0o600)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = Credentials(**{field.name: values[field.name] for field in fields(Credentials)})
    except (ValueError, KeyError, TypeError) as error:
        raise StudioError(
            f"{path} is damaged ({type(error).__name__}: {error}): restore it, or delete it to get new secrets "
            "(people have to log in again, and the admin password must be set with `manage.py changepassword admin`)"
        ) from error
    return found


def _write(path: Path, credentials: Credentials) -> None:
    # Complete or absent: a power cut between the two must not leave half a secret.
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        json.dump(asdict(credentials), out, indent=2)
        out.flush()
        os.fsync(out.fileno())
    part.replace(path)
