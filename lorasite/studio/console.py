"""What the person at the terminal sees: one line per line of a child, with its name in front; and the log files."""

import os
import sys
from pathlib import Path
from typing import IO

ROTATE_BYTES = 5 * 2**20
COLOURS = ("36", "32", "35", "33", "34", "96")  # ANSI foreground codes, one per name in order of appearance


class Console:
    """Prefixed lines on a stream; each child's raw lines also in `<logs>/<name>.log`."""

    def __init__(self, logs: Path, stream: IO[str] = sys.stdout) -> None:
        self._logs, self._stream = logs, stream
        self._coloured = stream.isatty() and "NO_COLOR" not in os.environ
        self._files: dict[str, IO[str]] = {}
        self._names: list[str] = []

    def say(self, text: str) -> None:
        """A line of the studio itself; not written to a file, since it may hold the login."""
        self._write("studio", text)

    def line(self, name: str, text: str) -> None:
        """A line of a child."""
        self._write(name, text)
        file = self._files.get(name) or self._open(name)
        file.write(text + "\n")
        file.flush()

    def close(self) -> None:
        """Close the log files."""
        for file in self._files.values():
            file.close()

    def _open(self, name: str) -> IO[str]:
        path = self._logs / f"{name}.log"
        if path.exists() and path.stat().st_size > ROTATE_BYTES:
            path.replace(path.with_suffix(".log.1"))
        self._files[name] = path.open("a", encoding="utf-8")
        return self._files[name]

    def _write(self, name: str, text: str) -> None:
        if name not in self._names:
            self._names.append(name)
        label = f"{name:8} |"
        if self._coloured:
            label = f"\x1b[{COLOURS[self._names.index(name) % len(COLOURS)]}m{label}\x1b[0m"
        try:
            self._stream.write(f"{label} {text}\n")
            self._stream.flush()
        except OSError:
            # The terminal is gone. SIGHUP ends the studio in good order; a lost line must not end it in bad order.
            self._coloured = False
