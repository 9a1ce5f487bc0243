"""A real site of servers and processes with the light worker, for the benchmarks of dispatch and recovery."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.services import postgres, running, valkey, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]


class Line(NamedTuple):
    """One body that began, by CLOCK_MONOTONIC."""

    taken_ns: int
    claimed_ns: int
    token: int
    pid: int


class LightSite:
    """This process's Django uses the same database, as the web tier does."""

    def __init__(self, folder: Path, environment: dict[str, str], exits: ExitStack) -> None:
        self.folder, self.environment, self._exits = folder, environment, exits
        self.journal = folder / "journal"
        self.journal.touch()

    def start_dispatcher(self) -> None:
        """`manage.py dispatch`."""
        self._run("dispatch", [sys.executable, "manage.py", "dispatch", "--skip-checks"])

    def start_worker(self, name: str, children: int) -> None:
        """A prefork worker; returns when all its children are ready."""
        from jobs.models import WorkerProcess
        from jobs.status import WorkerState

        ready = WorkerProcess.objects.filter(state=WorkerState.READY).count() + children
        command = [sys.executable, "-m", "celery", "-A", "tests.benchmarks._light_worker", "worker", "-Q", "gpu"]
        flags = ["-c", str(children), "--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "WARNING"]
        self._run(name, [*command, "-n", f"{name}@%h", *flags])
        wait_until(
            lambda: WorkerProcess.objects.filter(state=WorkerState.READY).count() >= ready,
            f"{children} children of {name} are ready",
            log=self.folder / f"{name}.log",
        )

    def lines(self, what: str, key: object) -> list[Line]:
        """What the journal says about this job or message, in order."""
        found = []
        for line in self.journal.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:2] == [what, str(key)]:
                token = int(words[4]) if what == "job" else 0
                found.append(Line(int(words[2]), int(words[3]), token, int(words[-1])))
        return found

    def wait_for(self, what: str, key: object, *, tries: int = 1, seconds: float = 90.0) -> list[Line]:
        """Wait until that many bodies began."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if len(found := self.lines(what, key)) >= tries:
                return found
            time.sleep(0.005)
        logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in self.folder.glob("*.log"))
        raise AssertionError(f"{what} {key} did not begin {tries} times in {seconds:g} s\n{logs}")

    def wait_until_idle(self) -> None:
        """Wait until every drain that began has ended."""

        def is_idle() -> bool:
            words = [line.split()[0] for line in self.journal.read_text(encoding="utf-8").splitlines()]
            return words.count("begin") == words.count("end")

        wait_until(is_idle, "the worker is idle")

    def _run(self, name: str, command: list[str]) -> Any:
        log = self.folder / f"{name}.log"
        return self._exits.enter_context(running(command, log, env=self.environment))


@contextmanager
def light_site(folder: Path, *, database: str) -> Iterator[LightSite]:
    """Servers, tables and settings as in production; `database` is "postgres" or "sqlite".

    Sets up Django in this process, so that there can be one a process.
    """
    with ExitStack() as exits:
        folder.mkdir(parents=True, exist_ok=True)
        broker = exits.enter_context(valkey(folder / "valkey"))
        values = {
            "DJANGO_SETTINGS_MODULE": "lorasite.settings.base",
            "LORASITE_DATA": str(folder / "data"),
            "LORASITE_SECRET_KEY": secrets.token_urlsafe(48),
            "LORASITE_BROKER_URL": broker,
            "LORASITE_LOG_LEVEL": "WARNING",
            "LORASITE_MAX_QUEUED_JOBS_PER_PERSON": "100000",
            "LORASITE_MAX_QUEUED_SECONDS_PER_PERSON": "100000000",
            "LORASITE_MAX_RUNNING_TRAININGS_PER_PERSON": "100",
            "LORASITE_MAX_RUNNING_GENERATIONS_PER_PERSON": "100",
            "LORASITE_BENCHMARK_JOURNAL": str(folder / "journal"),
            "OMP_NUM_THREADS": "1",
        }
        if database == "postgres":
            values["LORASITE_DATABASE_URL"] = exits.enter_context(postgres(folder / "postgres"))
        for name in [name for name in os.environ if name.startswith("LORASITE_")]:
            del os.environ[name]
        os.environ |= values
        command = [sys.executable, "manage.py", "migrate", "--verbosity", "0"]
        subprocess.run(command, cwd=REPOSITORY, check=True, env=dict(os.environ))
        import django

        django.setup()
        yield LightSite(folder, dict(os.environ), exits)
