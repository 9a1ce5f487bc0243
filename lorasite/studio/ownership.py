"""One studio per data folder: a lock that the kernel drops when its holder dies, and a pid file that tells who."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorasite.studio.errors import StudioError


@contextmanager
def own_data_folder(folder: Path) -> Iterator[str]:
    """Hold `folder` (the studio's own subfolder) inside the block. Yields a sentence about an earlier studio, or "".

    The lock decides, never the pid file: after a kill -9 the file is stale, and its number may be another program's.

    Raises:
        StudioError: Another studio runs on the same data folder.
    """
    pid_file = folder / "studio.pid"
    with (folder / "studio.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudioError(
                f"another studio (process {_pid_in(pid_file) or 'unknown'}) runs on the data folder {folder.parent}: "
                "stop it with Ctrl-C or SIGTERM, or choose another folder with --data"
            ) from None
        earlier = _pid_in(pid_file)
        note = f"the studio before this one (process {earlier}) was killed; its data is used again" if earlier else ""
        pid_file.write_text(f"{os.getpid()}\n", encoding="utf-8")
        try:
            yield note
        finally:
            pid_file.unlink(missing_ok=True)


def _pid_in(pid_file: Path) -> int | None:
    try:
        return int(pid_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
