"""Append-only journals of a chaos run: one file per process, one JSON object per line, one write(2) per line.

Shared by the fakes, the workload, the monkey and the auditor; imports nothing of the product.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "CHAOS_JOURNALS"
NODE_VARIABLE = "CHAOS_NODE"


class Journal:
    """One process's journal. A line is there whole or not at all, whenever the process is killed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o600)

    def write(self, event: str, **values: Any) -> None:
        """Append one line: the event, wall and monotonic time in seconds, this pid, and the values."""
        line = {"event": event, "wall": time.time(), "mono": time.monotonic(), "pid": os.getpid(), **values}
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")


_mine: tuple[int, Journal] | None = None


def mine() -> Journal:
    """This process's journal in the folder that the environment names; a forked child gets its own."""
    global _mine
    if _mine is None or _mine[0] != os.getpid():
        name = f"worker-{os.environ[NODE_VARIABLE]}-{os.getpid()}-{time.monotonic_ns()}.jsonl"
        _mine = (os.getpid(), Journal(Path(os.environ[FOLDER_VARIABLE]) / name))
    return _mine[1]


def read(folder: Path, prefix: str) -> Iterator[dict[str, Any]]:
    """All lines of the journals whose names begin with `prefix`, in order of wall time."""
    lines = []
    for path in sorted(folder.glob(f"{prefix}*.jsonl")):
        for text in path.read_bytes().split(b"\n"):
            if text:
                lines.append({**json.loads(text), "file": path.name})
    yield from sorted(lines, key=lambda line: line["wall"])
