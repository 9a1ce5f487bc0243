"""One line per stage: live on a terminal, a few plain lines where output goes to a file."""

import sys
import time
from typing import Any

SPARSE_SECONDS = 15.0


class ProgressLine:
    """Shows what a stage is doing. `start`, any number of `update`, then `done`."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._name, self._began, self._shown = "", 0.0, 0.0
        self.seconds: dict[str, float] = {}

    def start(self, name: str) -> None:
        """Begin a stage."""
        self._name, self._began, self._shown = name, time.monotonic(), time.monotonic()
        if self._live:
            self._write("...")

    def update(self, text: str) -> None:
        """What the stage is doing now; in a file at most every 15 s."""
        now = time.monotonic()
        if self._live:
            self._write(text)
        elif now - self._shown >= SPARSE_SECONDS:
            self._shown = now
            self._write(text)

    def update_from_job(self, job: dict[str, Any]) -> None:
        """Percent, loss and time left of a job as the API describes it."""
        progress = job["progress"]
        parts = [job["stage"] or job["state"], f"{progress['percent']} %"]
        if progress["total"]:
            parts.append(f"step {progress['step']}/{progress['total']}")
        if "loss" in job["figures"]:
            parts.append(f"loss {float(job['figures']['loss']):.3f}")
        if 0 < progress["step"] < progress["total"]:
            spent = time.monotonic() - self._began
            parts.append(f"{spent * (progress['total'] / progress['step'] - 1):.0f} s left")
        self.update("  ".join(parts))

    def done(self, text: str) -> None:
        """End the stage; its seconds stay in `seconds`."""
        self.seconds[self._name] = time.monotonic() - self._began
        self._write(f"{text}  ({self.seconds[self._name]:.1f} s)", end=True)

    def leave(self) -> None:
        """End the live line where a stage is cut short, so that the next text starts on a line of its own."""
        if self._live and self._name not in self.seconds:
            sys.stdout.write("\n")

    @property
    def stage(self) -> str:
        """Name of the stage that runs."""
        return self._name

    def _write(self, text: str, *, end: bool = False) -> None:
        line = f"{self._name:<10} {text}"
        if self._live:
            sys.stdout.write(f"\r\033[K{line[:110]}" + ("\n" if end else ""))
        else:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()
