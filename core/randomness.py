"""All random numbers of `core`: pure functions of a seed and of words that say what they are for.

No global generator is read or moved, so a stopped training needs no generator state to go on bit for bit.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, *words: int | str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments.

    Args:
        seed: Of the job.
        words: What the numbers are for, e.g. ("noise", step, sample). Text and numbers stay apart: 1 is not "1".
    """
    text = "\x1f".join(f"{type(word).__name__}:{word}" for word in (seed, *words))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def normal(shape: Sequence[int], seed: int, *words: int | str) -> Tensor:
    """Standard normal numbers of `shape`, fp32 on the CPU, the same on every device and in every batch."""
    return torch.randn(*shape, generator=generator(seed, *words))


def uniform(seed: int, *words: int | str) -> float:
    """One number in [0, 1)."""
    return float(torch.rand(1, generator=generator(seed, *words)))
