"""A whole site in one process and one folder: records on SQLite, a store, one worker, one dispatcher.

Made for forks of a preloaded parent: `enter` points Django at another folder without loading anything again.
"""

import gc
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LEASE_SECONDS = 1.0
WAIT_SECONDS = 25.0


def load() -> None:
    """Import everything that a site needs. Once, in the parent."""
    from tests.chaos import fakes

    fakes.install()
    import django

    django.setup()
    from django.conf import settings

    settings.LORASITE |= {
        "LEASE_SECONDS": LEASE_SECONDS,
        "HEARTBEAT_SECONDS": 0.15,
        "STEP_SECONDS": 2.5,
        "DRAIN_SECONDS": 2.0,
    }
    import jobs.tasks  # noqa: F401
    from jobs import prepared_sql
    from tests.chaos import misfortunes

    misfortunes.install()
    _statements.extend(found for found in gc.get_objects() if isinstance(found, prepared_sql._Statement))


_statements: list[Any] = []
"""The same objects in the same order in the parent and in every fork."""


def compiled() -> str:
    """Which prepared statements this process has compiled, and in which shapes: for `compile_ahead`."""
    return json.dumps([(number, key[1:]) for number, one in enumerate(_statements) for key in one._compiled])


def compile_ahead(wanted: str) -> None:
    """Compile here what a child had to, so that the next ones need not: it takes a third of a child's time."""
    from django.db import connection

    for number, shape in json.loads(wanted):
        _statements[number]._ready(connection, _as_tuple(shape))
    leave()


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def make_template(folder: Path) -> None:
    """A migrated database and a store with the things that every scenario begins with."""
    folder.mkdir(parents=True)
    enter(folder)
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    from tests.chaos import misfortunes, scenarios

    scenarios.furnish()
    misfortunes.furnish()
    leave()


def enter(folder: Path) -> None:
    """Make `folder` the site of this process."""
    from django.conf import settings
    from django.core.files.storage import default_storage
    from django.db import connection

    from jobs import node_cache

    settings.LORASITE["DATA"] = folder
    connection.close()
    connection.settings_dict["NAME"] = str(folder / "site.sqlite3")
    # A killed process loses nothing that it wrote; only a power cut would, and that is not what is tried here.
    connection.settings_dict["OPTIONS"]["init_command"] = "PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;"
    default_storage._location = str(folder / "storage")  # type: ignore[attr-defined]
    for name in ("base_location", "location"):
        default_storage.__dict__.pop(name, None)
    vars(default_storage._wrapped).pop("base_location", None)  # type: ignore[attr-defined]
    vars(default_storage._wrapped).pop("location", None)  # type: ignore[attr-defined]
    default_storage._wrapped._location = str(folder / "storage")  # type: ignore[attr-defined]
    node_cache.node_cache.cache_clear()


def leave() -> None:
    """Let go of the database, as before a fork."""
    from django.db import connections

    connections.close_all()


@contextmanager
def copied(template: Path, folder: Path) -> Iterator[Path]:
    """A site of its own; gone afterwards."""
    shutil.copytree(template, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Everybody:
    """The worker and the dispatcher of a site, taking turns in this process until every job has ended."""

    def __init__(self, broker_url: str, prefix: str) -> None:
        from celery import Celery

        from jobs.dispatch import Dispatcher
        from jobs.doorbells import Doorbells

        app = Celery("small", broker=broker_url)
        app.conf.broker_transport_options = {"global_keyprefix": prefix, "socket_timeout": 2}
        self.dispatcher = Dispatcher(Doorbells(app))
        self.worker: Any = None

    def start(self) -> None:
        """As a worker child starts."""
        from jobs import worker_context
        from jobs.heartbeat import Heartbeat
        from jobs.life_locks import dead_workers_close, life_lock_take
        from jobs.scratch import scratch_sweep
        from jobs.watchdog import Watchdog
        from jobs.worker_context import ShutdownFlag
        from jobs.workers import worker_ready, worker_register

        scratch_sweep()
        self.worker = worker_register(queues=["gpu", "cpu"], device="cpu")
        life_lock_take(self.worker)
        dead_workers_close()
        shutdown = ShutdownFlag()
        heartbeat = Heartbeat(self.worker, shutting_down=lambda: shutdown.is_raised)
        context = worker_context.WorkerContext(self.worker, heartbeat, shutdown)
        worker_context.enter(context)
        heartbeat.start()
        context.uploader.start()
        Watchdog(heartbeat).start()
        worker_ready(worker=self.worker, warm_bases=[])

    def work(self, *, seconds: float = WAIT_SECONDS) -> None:
        """Until every job has ended, or the time is up."""
        from jobs import tasks
        from jobs.models import Job

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.dispatcher.tick()
            for task in (tasks.preprocess, tasks.import_lora, tasks.prepare_base, tasks.train, tasks.generate):
                task.run()
            if not Job.objects.active().exists():
                return
            time.sleep(0.05)

    def stop(self) -> None:
        """As a worker child ends in good order."""
        from jobs import worker_context

        worker_context.current().go()
        self.dispatcher.step_down()
