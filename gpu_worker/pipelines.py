"""PipelinePool: base models kept loaded between requests, within a budget of bytes."""

import dataclasses
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from core.errors import BaseModelError
from core.mapped_weights import map_model
from core.pipelines import LoadedBase, assert_vae_fp32, load_base
from gpu_worker import zygote
from gpu_worker.attention import choose_attention
from gpu_worker.settings import BaseRef

logger = logging.getLogger(__name__)

VAES_KEPT = 4
"""External VAEs are 0.3 GB each."""


class PipelinePool:
    """Loaded bases; the least recently used one that is not warm goes first. Its methods may be called by any thread.

    What is dropped here lives on while a job still works with it: only the pool's own reference goes.

    Args:
        size: At most so many bases, >= 1.
        folder_of: Returns the prepared folder of a base on this machine.
        vae_of: A context that gives the folder of a base's VAE, fetching nothing else; None: the whole base's.
        budget_bytes: At most so many bytes of weights, as measured after loading; 0 for no limit. The base that is
            asked for stays whatever its size.
        attention: Of `gpu_worker.attention.choose_attention`.
        channels_last: Lay the UNet's convolutions out for tensor cores (CUDA only).
        compiled: Compile the UNet's blocks when they are first used (CUDA only; minutes, then faster).
    """

    def __init__(
        self,
        *,
        size: int,
        device: str,
        folder_of: Callable[[BaseRef], Path],
        budget_bytes: int = 0,
        attention: str = "sdpa",
        channels_last: bool = False,
        compiled: bool = False,
        vae_of: Callable[[BaseRef], AbstractContextManager[Path]] | None = None,
    ) -> None:
        self._size, self._device, self._folder_of = max(1, size), device, folder_of
        self._vae_of = vae_of or (lambda ref: nullcontext(folder_of(ref) / "vae"))
        self._budget_bytes, self._attention = budget_bytes, attention
        self._channels_last, self._compiled = channels_last, compiled
        self._loaded: OrderedDict[str, LoadedBase] = OrderedDict()
        self._vaes: OrderedDict[str, Any] = OrderedDict()
        self._kernels: dict[str, str] = {}
        self._used_at: dict[str, float] = {}
        self._warm: set[str] = set()
        self._lock = threading.RLock()

    def keep_warm(self, ref: BaseRef) -> LoadedBase:
        """Load now and never evict for another base."""
        with self._lock:
            self._warm.add(ref.fingerprint)
            return self.get(ref)

    def get(self, ref: BaseRef, vae: BaseRef | None = None) -> LoadedBase:
        """The loaded base, reused where possible.

        Args:
            vae: A prepared base whose VAE takes the place of the base's own, in fp32 as every VAE.

        Raises:
            BaseModelError: It does not load, or the VAE has latents of another kind than the base.
        """
        with self._lock:
            began = time.monotonic()
            base, how = self._checked(ref), "reused"
            if base is None:
                base, how = self._load(ref)
            self._loaded.move_to_end(ref.fingerprint)
            self._used_at[ref.fingerprint] = time.monotonic()
            if vae is not None:
                base = dataclasses.replace(base, vae=self._vae(vae, base))
            logger.info(
                "pipeline %s base=%s ms=%.0f vae=%s fp32 device=%s attention=%s",
                how,
                ref.name,
                1000 * (time.monotonic() - began),
                vae.name if vae else "own",
                self._device,
                self._kernels[ref.fingerprint],
            )
            return base

    def _load(self, ref: BaseRef) -> tuple[LoadedBase, str]:
        self._evict(self._size - 1)
        base, how = zygote.take(ref.fingerprint), "inherited"
        if base is None:
            base, how = load_base(self._folder_of(ref), device=self._device), "loaded"
        elif self._device != "cpu":
            for part in _parts(base):
                part.to(self._device)
            base = dataclasses.replace(base, device=torch.device(self._device))
        self._loaded[ref.fingerprint] = base
        self._kernels[ref.fingerprint] = choose_attention(base.unet, self._attention, self._device, base.dtype)
        if self._device != "cpu":
            if self._channels_last:
                base.unet.to(memory_format=torch.channels_last)
            if self._compiled:
                base.unet.compile_repeated_blocks()
        for other in [f for f in self._loaded if f != ref.fingerprint and f not in self._warm]:
            if not self._budget_bytes or self.held_bytes() <= self._budget_bytes:
                break
            self._drop(other)
        return base, how

    def _vae(self, ref: BaseRef, base: LoadedBase) -> Any:
        vae = self._vaes.get(ref.fingerprint)
        if vae is None or any(parameter.dtype != torch.float32 for parameter in vae.parameters()):
            with self._vae_of(ref) as folder:
                vae = map_model(AutoencoderKL, folder, dtype=torch.float32, device=torch.device(self._device))
            self._vaes[ref.fingerprint] = vae
            while len(self._vaes) > VAES_KEPT:
                self._vaes.popitem(last=False)
        self._vaes.move_to_end(ref.fingerprint)
        for name in ("latent_channels", "scaling_factor", "block_out_channels"):
            own, other = getattr(base.vae.config, name), getattr(vae.config, name)
            fits = len(own) == len(other) if name == "block_out_channels" else own == other
            if not fits:
                raise BaseModelError(f"the VAE of {ref.name!r} has {name} {other}, this base was trained with {own}")
        return vae

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
        with self._lock:
            self._evict(0, also_warm=self._device != "cpu")
            self._vaes.clear()
        if self._device != "cpu":
            torch.cuda.empty_cache()

    def release_idle(self, idle_seconds: float) -> int:
        """Drop what is not warm and was not asked for in so many seconds; returns how many bases went."""
        with self._lock:
            oldest = time.monotonic() - idle_seconds
            idle = [f for f in self._loaded if f not in self._warm and self._used_at[f] <= oldest]
            for fingerprint in idle:
                del self._loaded[fingerprint]
                logger.info("pipeline released fingerprint=%s idle_seconds=%.0f", fingerprint[:12], idle_seconds)
            if idle:
                self._vaes.clear()
        if idle and self._device != "cpu":
            torch.cuda.empty_cache()
        return len(idle)

    def fingerprints(self) -> list[str]:
        """Of everything loaded now."""
        return list(self._loaded)

    def attention_of(self, ref: BaseRef) -> str:
        """The kernel that a loaded base uses."""
        return self._kernels[ref.fingerprint]

    def held_bytes(self) -> int:
        """Of all weights of all loaded bases; on a CPU most of them are pages of files that processes share."""
        return sum(p.nbytes for base in self._loaded.values() for part in _parts(base) for p in part.parameters())

    def _evict(self, keep: int, *, also_warm: bool = False) -> None:
        for fingerprint in [f for f in self._loaded if also_warm or f not in self._warm]:
            if len(self._loaded) <= keep:
                return
            self._drop(fingerprint)

    def _drop(self, fingerprint: str) -> None:
        del self._loaded[fingerprint]
        logger.info("pipeline dropped fingerprint=%s", fingerprint[:12])


def _parts(base: LoadedBase) -> list[Any]:
    return [part for part in (base.text_encoder, base.text_encoder_2, base.unet, base.vae) if part is not None]
