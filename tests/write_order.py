"""What a power cut needs, and no kill can show: the order in which this thread calls the operating system."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter
from types import FrameType
from typing import Any

NAMES = {"fsync": "fsync", "link": "link", "rename": "rename", "replace": "rename"}


@contextmanager
def write_order() -> Iterator[list[str]]:
    """Collects write, fsync, link and rename, as they come, while the block runs; repeats of a write count once."""
    order: list[str] = []

    def listen(frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call":
            return
        if called.__name__ == "write" and isinstance(called.__self__, BufferedWriter):
            if order[-1:] != ["write"]:
                order.append("write")
        elif called.__module__ == "posix" and called.__name__ in NAMES:
            order.append(NAMES[called.__name__])

    sys.setprofile(listen)
    try:
        yield order
    finally:
        sys.setprofile(None)
