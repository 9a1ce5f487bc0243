"""The Celery app and the life of a worker: what its parent does before the fork, and its children after it.

Celery carries doorbells only; jobs, retries, results and priorities live in the database, so their Celery features
are off.
"""

import gc
import importlib
import logging
import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, signals
from kombu import Exchange, Queue

from lorasite.environment import Environment

logger = logging.getLogger(__name__)

START_AGAIN_SECONDS = 1.0
EXIT_NOT_STARTED = 71

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lorasite.settings.base")
_ENVIRONMENT = Environment()

app = Celery("lorasite")
# Kept between doorbells: a new connection for each nearly doubles the time of a claim. The claim replaces a broken one.
app.conf["CELERY_DB_REUSE_MAX"] = 1000
app.conf.update(
    # The web tier and manage.py have no address; an unreachable one makes a publish by mistake fail loudly.
    broker_url=_ENVIRONMENT.broker_url.get_secret_value() or "redis://broker-is-not-configured.invalid:6379/0",
    broker_transport_options={
        "visibility_timeout": 3600,  # seconds; a late doorbell is harmless
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "socket_timeout": 5,
        "socket_connect_timeout": 2,
        "socket_keepalive": True,
        "retry_on_timeout": False,  # True makes a frozen broker block four times as long
        "health_check_interval": 10,
        "global_keyprefix": "lorasite:",
    },
    broker_connection_timeout=1,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_pool_acquire_timeout=2,
    task_publish_retry=False,  # the dispatcher rings again
    task_acks_late=False,  # Celery never replays work; the lease does
    task_reject_on_worker_lost=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,  # a broker blip must not kill a training
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    worker_proc_alive_timeout=300.0,  # seconds; the default 4 would kill a child that loads models, for ever
    result_backend=None,
    task_ignore_result=True,
    task_store_errors_even_if_ignored=False,
    accept_content=["json"],
    task_serializer="json",
    event_serializer="json",
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    worker_hijack_root_logger=False,
    task_queues=[Queue(name, Exchange(name, type="direct"), routing_key=name) for name in ("gpu", "cpu")],
    task_default_queue="cpu",
    task_create_missing_queues=False,
    imports=["jobs.tasks"],
    timezone="UTC",
)

_selected_queues: list[str] = ["cpu", "gpu"]
_shutdown: Any = None
_children_count = 1


@signals.setup_logging.connect
def _keep_our_logging(**_: Any) -> None:
    """Settings have configured logging already; connecting this signal keeps Celery from doing it again."""


@signals.celeryd_init.connect
def _before_the_pool(conf: Any, options: dict[str, Any], **_: Any) -> None:
    """Parent: choose the number of children, import the heavy libraries once. No CUDA, no threads, no connection."""
    global _children_count, _selected_queues, _shutdown
    from jobs.worker_context import ShutdownFlag

    _shutdown = ShutdownFlag()
    chosen = options.get("queues")
    if chosen:
        _selected_queues = [name.strip() for name in (chosen.split(",") if isinstance(chosen, str) else chosen)]
    if "gpu" in _selected_queues:
        if not options.get("concurrency"):
            conf.worker_concurrency = max(1, len(_gpu_devices()))
        # A parent that has started an OpenMP pool can hang its children.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # For the fork: a child, or its successor, starts in milliseconds instead of the seconds that the imports take.
        for module in ("gpu_worker.runtime", "gpu_worker.training", "gpu_worker.generation"):
            importlib.import_module(module)
        import torch
        from django.conf import settings

        from gpu_worker.zygote import prepare_forks

        cache_folder = Path(settings.LORASITE["DATA"]) / "cache"
        prepare_forks(cache_folder, torch.float16 if _gpu_devices() else torch.float32)
    _children_count = max(1, int(options.get("concurrency") or conf.worker_concurrency or os.cpu_count() or 1))


@signals.worker_shutting_down.connect
def _going_down(**_: Any) -> None:
    """Parent: children see the flag at their next step, save a checkpoint and give their jobs back."""
    if _shutdown is not None:
        _shutdown.raise_flag()


@signals.worker_process_init.connect
def _child_starts(**_: Any) -> None:
    """Child: die with the parent, then come up; one that cannot (no database, no space) leaves it to its successor."""
    from core.die_with_parent import die_with_parent

    die_with_parent()
    try:
        _come_up()
    except Exception:
        # Celery would only log it, and feed doorbells for ever to a child that can claim nothing.
        logger.exception("worker process could not start, another one tries in %g s", START_AGAIN_SECONDS)
        time.sleep(START_AGAIN_SECONDS)
        os._exit(EXIT_NOT_STARTED)


def _come_up() -> None:
    """Child: take the device, load the keep-warm bases, say READY, beat."""
    from django.conf import settings

    from jobs import worker_context
    from jobs.heartbeat import Heartbeat
    from jobs.life_locks import dead_workers_close, life_lock_take
    from jobs.models import BaseModel
    from jobs.node_cache import node_cache
    from jobs.prefetch import Prefetcher
    from jobs.scratch import scratch_sweep
    from jobs.uploader import Uploader
    from jobs.watchdog import Watchdog
    from jobs.workers import worker_ready, worker_register

    serves_gpu = "gpu" in _selected_queues
    device = _device_of_this_child() if serves_gpu else "cpu"
    scratch_sweep()
    worker = worker_register(queues=_selected_queues, device=device)
    life_lock_take(worker)
    dead_workers_close()  # The one that this process replaces, first of all.
    warm_bases: Any = list
    free_memory: Any = gc.collect
    prefetch = Prefetcher(worker, node_cache().files) if serves_gpu else None
    started: Any = None
    if serves_gpu:
        from gpu_worker import runtime
        from gpu_worker.idle_release import IdleRelease
        from gpu_worker.settings import BaseRef, WorkerSettings

        refs = [
            BaseRef(name=base.name, fingerprint=base.fingerprint, files=base.files)
            for base in BaseModel.objects.ready().filter(keep_warm=True)
        ]
        started = runtime.start(
            WorkerSettings(
                device=device,
                cache_folder=Path(settings.LORASITE["DATA"]) / "cache",
                fetch=node_cache().get,
                torch_threads=settings.LORASITE["WORKER_THREADS"],
                pool_size=settings.LORASITE["POOL_SIZE"],
                pool_bytes=settings.LORASITE["POOL_BYTES"],
                attention=settings.LORASITE["ATTENTION"],
                vae_slicing=settings.LORASITE["VAE_SLICING"],
                vae_tiling=settings.LORASITE["VAE_TILING"],
                channels_last=settings.LORASITE["CHANNELS_LAST"],
                compiled=settings.LORASITE["TORCH_COMPILE"],
            ),
            refs,
        )
        warm_bases, free_memory = started.pool.fingerprints, runtime.free_memory
    heartbeat = Heartbeat(worker, warm_bases=warm_bases, shutting_down=lambda: _shutdown.is_raised)
    uploader = Uploader(heartbeat)
    limit = settings.LORASITE["WORKER_MEMORY_BYTES"] or worker_context.machine_bytes() // 2 // _children_count
    worker_context.enter(
        worker_context.WorkerContext(
            worker,
            heartbeat,
            _shutdown,
            uploader,
            free_memory=free_memory,
            memory_limit_bytes=limit,
            prefetch=prefetch,
        )
    )
    heartbeat.start()
    uploader.start()
    Watchdog(heartbeat).start()
    if started is not None:
        idle_seconds = settings.LORASITE["IDLE_SECONDS"]
        IdleRelease(started.pool, idle_seconds=idle_seconds, busy=lambda: bool(heartbeat.holds())).start()
    if prefetch is not None:
        prefetch.start()
    worker_ready(worker=worker, warm_bases=warm_bases())


@signals.worker_process_shutdown.connect
def _child_ends(**_: Any) -> None:
    """Child: store or give back what it holds, and say that it goes, if there is still time."""
    from jobs import worker_context

    worker_context.current().go()


def _gpu_devices() -> list[str]:
    """CUDA devices of this machine, counted without touching CUDA (which must not start before the fork)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    else:
        count = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    return [f"cuda:{index}" for index in range(count)]


def _device_of_this_child() -> str:
    from billiard import current_process

    devices = _gpu_devices()
    return devices[current_process().index % len(devices)] if devices else "cpu"
