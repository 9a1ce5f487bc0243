"""What `celery -A tests.chaos.celery_app worker` starts: the real app and the real tasks on top of the fakes.

The fakes stand in for `gpu_worker`'s modules, so a worker of queue gpu loads no torch and its children start at once.
"""

import os
from typing import Any

from tests.chaos import fakes, journal

fakes.install()

from celery import signals  # noqa: E402 - the fakes come first

from lorasite.celery import app as app  # noqa: E402


@signals.worker_process_init.connect
def _say_which_node_this_child_belongs_to(**_: Any) -> None:
    journal.mine().write("child", node=os.environ[journal.NODE_VARIABLE], parent=os.getppid())
