"""What a studio runs: the steps before the start, the programs that stay, and the environment of each.

The broker's address goes to the dispatcher and the workers only; the web process never holds it.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from lorasite.environment import REPOSITORY
from lorasite.studio.credentials import Credentials
from lorasite.studio.ports import LOOPBACK
from lorasite.studio.processes import Program
from lorasite.studio.valkey import valkey_program, valkey_url

DEMO_BASE = REPOSITORY / "demo" / "tiny-sd-emoji"
WORKER_STOP_SECONDS = 60.0  # time to write a checkpoint and give the job back
STOP_ORDER = (("gpu", "cpu"), ("dispatch",), ("web",), ("valkey",))


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first process starts."""

    data: Path
    web_port: int
    valkey_port: int
    valkey_binary: Path
    credentials: Credentials
    with_demo: bool

    @property
    def broker_url(self) -> str:
        """Address of the embedded Valkey, password included."""
        return valkey_url(self.valkey_port, self.credentials.valkey_password)

    @property
    def url(self) -> str:
        """Where the person opens the studio."""
        return f"http://{LOOPBACK}:{self.web_port}/"

    def valkey(self) -> Program:
        """The broker."""
        folder = self.data / "valkey"
        return valkey_program(
            self.valkey_binary, folder, self.valkey_port, self.credentials.valkey_password, dict(os.environ)
        )

    def migrate(self) -> Program:
        """Bring the database to this version."""
        return self._manage("migrate", "migrate", "--noinput", "--verbosity", "1")

    def collect_static(self) -> Program:
        """Style sheets and scripts, served by the web process itself."""
        return self._manage("static", "collectstatic", "--noinput", "--verbosity", "0")

    def operator(self) -> Program:
        """The account `admin`."""
        return self._manage(
            "account", "first_operator", "--skip-checks", DJANGO_SUPERUSER_PASSWORD=self.credentials.admin_password
        )

    def demo(self) -> Program | None:
        """Register the demo base, where the repository holds it."""
        if not self.with_demo or not (DEMO_BASE / "model_index.json").is_file():
            return None
        return self._manage("demo", "base", "--skip-checks", "add", str(DEMO_BASE), "--name", "demo", "--warm")

    def programs(self) -> list[Program]:
        """What stays, without Valkey, in the order of starting."""
        broker = {"LORASITE_BROKER_URL": self.broker_url}
        return [
            self._manage("dispatch", "dispatch", "--skip-checks", **broker),
            self._worker("gpu", broker),
            self._worker("cpu", broker, "--concurrency", "1"),
            self._python(
                "web",
                "uvicorn",
                "lorasite.asgi:application",
                *("--host", LOOPBACK, "--port", str(self.web_port)),
                *("--log-level", "warning", "--timeout-graceful-shutdown", "5"),
                # Static files come from a synchronous iterator; they are small, so that costs nothing.
                PYTHONWARNINGS="ignore:StreamingHttpResponse must consume",
            ),
        ]

    def _worker(self, queue: str, broker: dict[str, str], *more: str) -> Program:
        return self._python(
            queue,
            "celery",
            *("--quiet", "-A", "lorasite", "worker", "-Q", queue, "-n", f"{queue}@%h", "--loglevel", "INFO"),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            *more,
            stop_seconds=WORKER_STOP_SECONDS,
            OMP_NUM_THREADS="1",
            PYTHONWARNINGS="ignore:You're running the worker",  # as root: the studio itself says it once
            **broker,
        )

    def _python(self, name: str, module: str, *arguments: str, stop_seconds: float = 10.0, **variables: str) -> Program:
        command = [sys.executable, "-m", module, *arguments]
        return Program(name, command, self._environment(variables), REPOSITORY, stop_seconds)

    def _manage(self, name: str, *arguments: str, **variables: str) -> Program:
        command = [sys.executable, str(REPOSITORY / "manage.py"), *arguments]
        return Program(name, command, self._environment(variables), REPOSITORY)

    def _environment(self, variables: dict[str, str]) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name != "LORASITE_BROKER_URL"}
        return {
            "LORASITE_SECRET_KEY": self.credentials.secret_key,
            "DJANGO_SETTINGS_MODULE": "lorasite.settings.base",
            **inherited,
            "LORASITE_DATA": str(self.data),
            "PYTHONUNBUFFERED": "1",
            **variables,
        }
