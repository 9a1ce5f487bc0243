"""The state of one GPU process: its pool of pipelines. Started once per process, then used by every job in it."""

import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from core.errors import CoreError
from gpu_worker.base_folders import base_folder, lent_vae
from gpu_worker.errors import RuntimeNotReady
from gpu_worker.pipelines import PipelinePool
from gpu_worker.settings import BaseRef, WorkerSettings
from gpu_worker.zygote import warm_bases_tell

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """What jobs in this process share."""

    settings: WorkerSettings
    pool: PipelinePool

    def folder_of(self, ref: BaseRef) -> Path:
        """The prepared folder of a base on this machine."""
        return base_folder(ref, self.settings.cache_folder, self.settings.fetch)


_runtime: Runtime | None = None


def start(settings: WorkerSettings, warm: Sequence[BaseRef]) -> Runtime:
    """Take the device and load the keep-warm bases. Call in the child, after the fork: CUDA does not survive one.

    A base that cannot be loaded is logged and left out; its jobs fail with the reason, all others run.
    """
    global _runtime
    began = time.monotonic()
    torch.set_num_threads(settings.torch_threads)
    pool = PipelinePool(
        size=max(settings.pool_size, len(warm) + 1),
        device=settings.device,
        folder_of=lambda ref: base_folder(ref, settings.cache_folder, settings.fetch),
        vae_of=lambda ref: lent_vae(ref, settings.cache_folder, settings.fetch),
        budget_bytes=settings.pool_bytes,
        attention=settings.attention,
        channels_last=settings.channels_last,
        compiled=settings.compiled,
    )
    for ref in warm:
        try:
            pool.keep_warm(ref)
        except (CoreError, OSError) as error:
            logger.warning("keep-warm base could not be loaded base=%s reason=%s", ref.name, error)
    warm_bases_tell(settings.cache_folder, [ref for ref in warm if ref.fingerprint in pool.fingerprints()])
    _runtime = Runtime(settings, pool)
    logger.info(
        "gpu process ready device=%s warm=%d ms=%.0f",
        settings.device,
        len(pool.fingerprints()),
        1000 * (time.monotonic() - began),
    )
    return _runtime


def current() -> Runtime:
    """This process's runtime.

    Raises:
        RuntimeNotReady: `start` was not called here.
    """
    if _runtime is None:
        raise RuntimeNotReady("this process serves no gpu queue: start it with `celery -A lorasite worker -Q gpu`")
    return _runtime


def free_memory() -> None:
    """Give back what caches hold, after running out of memory. What failed must not be referred to any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
