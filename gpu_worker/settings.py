"""What a GPU process must know about its machine; given by whoever starts it, no environment is read here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from core.memory_ladder import Switch

Fetch = Callable[[str], Path]
"""SHA-256 in, local verified file out; the file must not be written to."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings of one GPU process.

    Attributes:
        device: "cpu", "cuda:0" ...
        cache_folder: This machine's cache; prepared bases are rebuilt under `bases/`.
        fetch: Where files come from.
        torch_threads: Intra-op threads on a CPU; more than 1 only where the cores are idle.
        pool_size: Base models kept loaded at once, the warm ones included; >= 1.
        pool_bytes: Weights of base models kept loaded at once; 0 for no limit.
        attention: "sdpa", "xformers" or "sliced".
        vae_slicing, vae_tiling: "auto" (when memory ran out), "on" or "off"; see `core.memory_ladder`.
        channels_last, compiled: Of the UNet on CUDA.
    """

    device: str
    cache_folder: Path
    fetch: Fetch
    torch_threads: int = 1
    pool_size: int = 2
    pool_bytes: int = 0
    attention: str = "sdpa"
    vae_slicing: Switch = "auto"
    vae_tiling: Switch = "auto"
    channels_last: bool = False
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class BaseRef:
    """A prepared base model by value: {relative path: sha256} of its files, and the fingerprint they must have."""

    name: str
    fingerprint: str
    files: dict[str, str]
