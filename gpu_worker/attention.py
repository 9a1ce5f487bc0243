"""Which attention kernel a pipeline uses: torch's SDPA, or xFormers where a real call proves that it works."""

import logging
from functools import lru_cache
from typing import Any

import torch

logger = logging.getLogger(__name__)


@lru_cache(maxsize=8)
def xformers_works(device: str, dtype: torch.dtype) -> bool:
    """Whether xFormers computes attention here: installed is not enough, builds for another torch or GPU fail late."""
    try:
        import xformers.ops

        query = torch.ones(1, 8, 2, 40, device=device, dtype=dtype)  # (batch, tokens, heads, dim)
        result: Any = xformers.ops.memory_efficient_attention(query, query, query)
        return bool(torch.isfinite(result).all())
    except (ImportError, NotImplementedError, RuntimeError, ValueError, OSError, AttributeError) as error:
        logger.info("xformers is not used device=%s reason=%s", device, str(error).split("\n", 1)[0])
        return False


def choose_attention(unet: Any, wanted: str, device: str, dtype: torch.dtype) -> str:
    """Set up a UNet's attention; returns the kernel's name for the log.

    Args:
        wanted: "sdpa", "xformers" (SDPA where it does not work) or "sliced" (slowest, for where SDPA is not frugal).
    """
    if wanted == "sliced":
        unet.set_attention_slice("max")
        return "sliced"
    if wanted == "xformers" and xformers_works(device, dtype):
        unet.enable_xformers_memory_efficient_attention()
        return "xformers"
    return "sdpa"
