"""`manage.py studio` as a person runs it: it starts, says where, survives kills, and leaves nothing running."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from core.die_with_parent import die_with_parent
from lorasite.environment import REPOSITORY
from tests.services import free_ports, wait_until

START_SECONDS = 150.0  # on a busy machine


class Studio:
    """One started studio and what it printed."""

    def __init__(self, data: Path, port: int, output: Path, *options: str) -> None:
        self.port, self._output = port, output
        with output.open("wb") as out:
            self.process = subprocess.Popen(
                command(data, port, *options),
                cwd=REPOSITORY,
                env=environment(),
                stdout=out,
                stderr=out,
                preexec_fn=die_with_parent,
            )

    @property
    def text(self) -> str:
        return self._output.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        wait_until(
            lambda: "stop with Ctrl-C" in self.text or self.process.poll() is not None,
            "the studio says that it is ready",
            seconds=START_SECONDS,
            log=self._output,
        )
        assert self.process.poll() is None, self.text

    def family(self) -> dict[str, psutil.Process]:
        """Every process that it started, by a name from its command line; also children of children."""
        return {
            " ".join(p.cmdline()) + f" {p.pid}": p for p in psutil.Process(self.process.pid).children(recursive=True)
        }

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def password(self) -> str:
        found = re.search(r"login  admin   password (\S+)", self.text)
        assert found, self.text
        return found[1]


def command(data: Path, port: int, *options: str) -> list[str]:
    return [sys.executable, "manage.py", "studio", "--data", str(data), "--port", str(port), *options]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORASITE_", "DJANGO_"))}
    return {**kept, "PYTHONUNBUFFERED": "1"}


def refused(data: Path, port: int) -> str:
    """What a studio says that must not start; asserts exit code 1."""
    done = subprocess.run(
        command(data, port), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def alive(processes: list[psutil.Process]) -> list[str]:
    """Those that still run; zombies whose parent is gone count as ended."""
    found = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


@pytest.fixture
def started(tmp_path: Path, port: int) -> Iterator[Studio]:
    studio = Studio(tmp_path / "data", port, tmp_path / "first.txt")
    yield studio
    if studio.process.poll() is None:
        studio.process.kill()
        studio.process.wait()


def test_a_taken_port_ends_the_start_with_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is taken" in refused(tmp_path, port)
    assert not (tmp_path / "studio" / "studio.pid").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_studio_starts_is_alone_on_its_data_and_ctrl_c_leaves_nothing(
    started: Studio, tmp_path: Path, port: int
) -> None:
    started.wait_until_ready()
    assert started.get("/readyz")[0] == 200
    status, page = started.get("/admin/login/")
    assert status == 200
    assert "lorasite" in page
    family = started.family()
    web = next(process for line, process in family.items() if "uvicorn" in line)
    assert "LORASITE_BROKER_URL" not in web.environ()
    assert any("valkey-server" in line for line in family)
    assert sum("celery" in line for line in family) >= 4  # two workers, each with a child

    assert "demo: registered, preparation is job" in started.text
    wait_until(lambda: "uploading→succeeded" in started.text, "the demo base is prepared")

    other = free_ports(1)[0]
    sentence = refused(tmp_path / "data", other)
    assert f"another studio (process {started.process.pid}) runs on the data folder" in sentence

    started.process.send_signal(signal.SIGINT)
    assert started.process.wait(timeout=90) == 0
    assert alive(list(family.values())) == []
    assert "is killed" not in started.text
    assert not (tmp_path / "data" / "studio" / "studio.pid").exists()
    password = started.password()
    assert password not in "".join(log.read_text() for log in (tmp_path / "data" / "logs").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_leaves_no_children_and_the_next_start_finds_the_old_data(
    started: Studio, tmp_path: Path, port: int
) -> None:
    started.wait_until_ready()
    family = list(started.family().values())
    assert len(family) >= 7
    started.process.kill()
    started.process.wait()
    end = time.monotonic() + 5
    while alive(family) and time.monotonic() < end:
        time.sleep(0.1)
    assert alive(family) == []

    again = Studio(tmp_path / "data", port, tmp_path / "second.txt", "--no-demo")
    try:
        again.wait_until_ready()
        assert f"(process {started.process.pid}) was killed; its data is used again" in again.text
        assert again.password() == started.password()
        web = next(process for line, process in again.family().items() if "uvicorn" in line)
        web.kill()
        wait_until(lambda: "web ended (killed by SIGKILL); starting it again" in again.text, "the loss is said")
        wait_until(lambda: _answers(again), "a new web process answers")
        again.process.send_signal(signal.SIGTERM)
        assert again.process.wait(timeout=90) == 0
    finally:
        if again.process.poll() is None:
            again.process.kill()
            again.process.wait()


def _answers(studio: Studio) -> bool:
    try:
        return studio.get("/healthz")[0] == 200
    except OSError:
        return False
