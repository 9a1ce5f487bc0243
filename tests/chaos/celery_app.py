"""What `celery -A tests.chaos.celery_app worker` starts: the real app and the real tasks on top of the fakes.

The fakes stand in for `gpu_worker`'s modules, so a worker of queue gpu loads no torch and its children start at once.
"""

import os
import threading
import time
from typing import Any

from tests.chaos import fakes, journal

fakes.install()

from celery import signals  # noqa: E402 - the fakes come first

from lorasite.celery import app as app  # noqa: E402

LOOK_SECONDS = 0.2
LAG_SECONDS = 0.8


def _watch_the_clock() -> None:
    """Journal when this process got no time to run for so long that its heartbeat may have been late."""
    while True:
        began = time.monotonic()
        time.sleep(LOOK_SECONDS)
        lag = time.monotonic() - began - LOOK_SECONDS
        if lag > LAG_SECONDS:
            journal.mine().write("lag", seconds=lag)


@signals.worker_process_init.connect
def _say_which_node_this_child_belongs_to(**_: Any) -> None:
    journal.mine().write("child", node=os.environ[journal.NODE_VARIABLE], parent=os.getppid())
    threading.Thread(target=_watch_the_clock, name="clock", daemon=True).start()
