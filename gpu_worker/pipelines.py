"""PipelinePool: base models kept loaded between requests."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

from core.errors import BaseModelError
from core.pipelines import LoadedBase, assert_vae_fp32, load_base
from gpu_worker.settings import BaseRef

logger = logging.getLogger(__name__)


class PipelinePool:
    """At most `size` loaded bases; the least recently used one that is not warm goes first.

    Args:
        folder_of: Returns the prepared folder of a base on this machine.
    """

    def __init__(self, *, size: int, device: str, folder_of: Callable[[BaseRef], Path]) -> None:
        self._size, self._device, self._folder_of = max(1, size), device, folder_of
        self._loaded: OrderedDict[str, LoadedBase] = OrderedDict()
        self._warm: set[str] = set()

    def keep_warm(self, ref: BaseRef) -> LoadedBase:
        """Load now and never evict for another base."""
        self._warm.add(ref.fingerprint)
        return self.get(ref)

    def get(self, ref: BaseRef) -> LoadedBase:
        """The loaded base, reused where possible."""
        base = self._checked(ref)
        if base is not None:
            self._loaded.move_to_end(ref.fingerprint)
            logger.info("pipeline reused base=%s vae=own fp32 device=%s", ref.name, self._device)
            return base
        self._evict(self._size - 1)
        began = time.monotonic()
        base = load_base(self._folder_of(ref), device=self._device)
        self._loaded[ref.fingerprint] = base
        logger.info(
            "pipeline loaded base=%s ms=%.0f vae=own fp32 device=%s attention=sdpa",
            ref.name,
            1000 * (time.monotonic() - began),
            self._device,
        )
        return base

    def _checked(self, ref: BaseRef) -> LoadedBase | None:
        """The held base if its VAE is still fp32; one that some step left in half precision is loaded anew."""
        base = self._loaded.get(ref.fingerprint)
        if base is None:
            return None
        try:
            assert_vae_fp32(base)
        except BaseModelError as error:
            logger.warning("pipeline dropped base=%s reason=%s", ref.name, error)
            del self._loaded[ref.fingerprint]
            return None
        return base

    def make_room(self) -> None:
        """Drop every base that is not warm, and on a GPU the warm ones too: a training needs the memory."""
        self._evict(0, also_warm=self._device != "cpu")
        if self._device != "cpu":
            torch.cuda.empty_cache()

    def fingerprints(self) -> list[str]:
        """Of everything loaded now."""
        return list(self._loaded)

    def _evict(self, keep: int, *, also_warm: bool = False) -> None:
        for fingerprint in [f for f in self._loaded if also_warm or f not in self._warm]:
            if len(self._loaded) <= keep:
                return
            del self._loaded[fingerprint]
            logger.info("pipeline dropped fingerprint=%s", fingerprint[:12])
