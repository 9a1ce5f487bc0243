"""Starts and stops the studio that the demo runs on. Called by `demo/run.py` only."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from core.die_with_parent import die_with_parent

REPOSITORY = Path(__file__).resolve().parent.parent
READY_SECONDS = 150
STOP_SECONDS = 30


class StudioError(Exception):
    """The studio did not come up, or a management command failed; the text says why."""


class StudioProcess:
    """`manage.py studio` in the background, its output in a log file.

    Args:
        data: The studio's data folder; made where missing, used again where not.
        port: Where it serves; None takes a free one.
    """

    def __init__(self, data: Path, port: int | None) -> None:
        self.data = data.resolve()
        self.data.mkdir(parents=True, exist_ok=True)
        self.port = port or _free_port()
        self.site = f"http://127.0.0.1:{self.port}"
        self.log = self.data / "studio.log"
        self._environment = os.environ | {"LORASITE_DATA": str(self.data), "PYTHONUNBUFFERED": "1"}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until `/readyz` says that requests are served and jobs will run.

        Raises:
            StudioError: It ended, or was not ready in time.
        """
        command = [sys.executable, "manage.py", "studio", "--port", str(self.port)]
        with self.log.open("wb") as output:
            # A session of its own: Ctrl-C reaches this program first, which then stops the studio in order.
            self._process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        end = time.monotonic() + READY_SECONDS
        problem = "it did not answer"
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise StudioError(f"the studio ended with code {self._process.returncode}: {self._last_words()}")
            ready, problem = self._ready(problem)
            if ready:
                return
            time.sleep(0.5)
        raise StudioError(f"the studio was not ready after {READY_SECONDS} s: {problem}")

    def manage(self, *arguments: str) -> str:
        """Run a management command on the same data folder; returns what it wrote to stdout.

        Raises:
            StudioError: It failed; holds its last line.
        """
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=REPOSITORY,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no output"]
            raise StudioError(f"manage.py {' '.join(arguments)} failed: {lines[-1]}")
        return done.stdout

    def stop(self) -> None:
        """SIGTERM, time to put down its work, then SIGKILL to its whole process group. Harmless when stopped."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _ready(self, last_problem: str) -> tuple[bool, str]:
        try:
            with urllib.request.urlopen(f"{self.site}/readyz", timeout=5) as answer:  # noqa: S310 our own address
                return answer.status == 200, last_problem
        except urllib.error.HTTPError as error:
            try:
                return False, "; ".join(json.loads(error.read())["problems"])
            except (ValueError, KeyError, TypeError):
                return False, f"/readyz answers {error.code}"
        except OSError:
            return False, last_problem

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "no output"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
