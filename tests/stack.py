"""A whole site of real processes for end-to-end tests: web, dispatcher, Celery workers, Valkey."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.services import free_ports, running, valkey, wait_until

REPOSITORY = Path(__file__).resolve().parent.parent
FURNISH = """
import django
django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
call_command("createsuperuser", interactive=False, username="owner", email="owner@example.com")
call_command("api_key", "owner", name="test")
"""


class ApiError(AssertionError):
    """The API answered with an error; holds status and body."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"{status}: {body}")
        self.status, self.body = status, body


class Stack:
    """Handles of one running site. Made by `stack()`."""

    def __init__(self, folder: Path, environment: dict[str, str], broker_url: str) -> None:
        self.folder, self.environment, self.broker_url = folder, environment, broker_url
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._exits = ExitStack()
        (self._port,) = free_ports(1)
        self.api_key = ""

    # --- processes -------------------------------------------------------------------------------------------------

    def manage(self, *arguments: str) -> str:
        """Run a management command to its end; returns its output."""
        return self._run("manage.py", *arguments)

    def furnish(self) -> str:
        """Migrate, make the person and the key, in one process instead of three; returns the output."""
        return self._run("-c", FURNISH)

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{arguments} failed:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, name: str, command: list[str], *, with_broker: bool) -> None:
        """Start a named process of the site."""
        environment = dict(self.environment)
        if with_broker:
            environment["LORASITE_BROKER_URL"] = self.broker_url
        context = running(command, self.log(name), env=environment)
        self.processes[name] = self._exits.enter_context(context)

    def start_web(self) -> None:
        """The web process, without any broker address."""
        command = [sys.executable, "-m", "uvicorn", "lorasite.asgi:application", "--port", str(self._port)]
        self.start("web", [*command, "--log-level", "warning"], with_broker=False)
        wait_until(lambda: self._get_status("/healthz") == 200, "the web process answers", log=self.log("web"))

    def start_dispatcher(self, name: str = "dispatch") -> None:
        """A dispatcher."""
        self.start(name, [sys.executable, "manage.py", "dispatch"], with_broker=True)

    def start_worker(self, name: str = "worker", queues: str = "gpu,cpu") -> None:
        """A Celery worker with one child."""
        command = [sys.executable, "-m", "celery", "-A", "lorasite", "worker", "-Q", queues, "-n", f"{name}@%h"]
        flags = ["--concurrency", "1", "--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "INFO"]
        self.start(name, [*command, *flags], with_broker=True)

    def kill_child_of(self, name: str) -> int:
        """kill -9 the pool child of a worker; returns its pid."""
        children = psutil.Process(self.processes[name].pid).children()
        assert children, f"{name} has no child"
        children[0].send_signal(signal.SIGKILL)
        return children[0].pid

    def kill(self, name: str) -> None:
        """kill -9 a process; its children die with it."""
        self.processes[name].kill()
        self.processes[name].wait()

    def log(self, name: str) -> Path:
        """Log file of a process."""
        return self.folder / f"{name}.log"

    def close(self) -> None:
        """Stop everything, newest first."""
        self._exits.close()

    # --- the API as a client sees it -------------------------------------------------------------------------------

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """JSON in, JSON out. Raises ApiError for 4xx and 5xx."""
        data = None if body is None else json.dumps(body).encode()
        return json.loads(
            self.raw(method, path, data, {"Content-Type": "application/json", **(headers or {})}) or b"null"
        )

    def raw(self, method: str, path: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        """Bytes in, bytes out."""
        url = path if path.startswith("http") else f"http://127.0.0.1:{self._port}{path}"
        request = urllib.request.Request(url, data=data, method=method)
        request.add_header("Authorization", f"Bearer {self.api_key}")
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                raise ApiError(error.code, json.loads(text)) from None
            except ValueError:
                raise ApiError(error.code, text) from None

    def upload(self, dataset_id: str, files: dict[str, bytes]) -> Any:
        """Multipart upload of pictures and sidecars."""
        boundary = uuid.uuid4().hex
        parts = []
        for name, content in files.items():
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
            parts.append(head.encode() + content + b"\r\n")
        body = b"".join(parts) + f"--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        return json.loads(self.raw("POST", f"/api/v1/datasets/{dataset_id}/images/", body, headers))

    def wait_for_job(self, job: dict[str, Any], *, seconds: float = 120, state: str = "succeeded") -> dict[str, Any]:
        """Poll a job until it is in `state`; any other final state fails at once with the job's own words."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            job = self.call("GET", f"/api/v1/jobs/{job['id']}/")
            if job["state"] == state:
                return job
            assert job["state"] in ("queued", "running", "uploading"), (
                f"the job ended as {job['state']}: {job['error']}"
            )
            time.sleep(0.2)
        logs = "\n".join(f"== {n}\n{self.log(n).read_text(errors='replace')[-2500:]}" for n in self.processes)
        raise AssertionError(f"waited {seconds:g} s for {state}: {job}\n{logs}")

    def _get_status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


@contextmanager
def stack(folder: Path, **environment: str) -> Iterator[Stack]:
    """A migrated site with a user `owner`, an API key, Valkey and a web process; the rest is the test's to start."""
    folder.mkdir(parents=True, exist_ok=True)
    with valkey(folder / "valkey") as broker_url:
        values = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LORASITE_")},
            "DJANGO_SETTINGS_MODULE": "lorasite.settings.base",
            "LORASITE_DATA": str(folder / "data"),
            "LORASITE_SECRET_KEY": secrets.token_urlsafe(48),
            "LORASITE_LEASE_SECONDS": "4",
            "LORASITE_HEARTBEAT_SECONDS": "0.5",
            "DJANGO_SUPERUSER_PASSWORD": secrets.token_urlsafe(12),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            **environment,
        }
        site = Stack(folder, values, broker_url)
        try:
            site.api_key = site.furnish().strip().splitlines()[-1].split()[-1]
            site.start_web()
            yield site
        finally:
            site.close()
