"""Embeddings of prompts that were encoded before, in memory up to a number of bytes; the least recently used go first.

Called by generation; what the text encoder and its LoRAs do to a prompt is all in the key.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from core.text_encoding import TextCondition


@dataclass(frozen=True, kw_only=True)
class PromptKey:
    """All that a prompt's embedding depends on.

    Attributes:
        base: Fingerprint of the base model.
        prompts: Encoded together, in their order.
        clip_skip: Resolved, WebUI convention.
        loras: (hash of the text-encoder LoRA, weight) in the order they were applied.
    """

    base: str
    prompts: tuple[str, ...]
    clip_skip: int
    loras: tuple[tuple[str, float], ...] = ()


class PromptCache:
    """For one thread.

    Args:
        limit_bytes: All embeddings together; a larger one is not kept.
    """

    def __init__(self, limit_bytes: int = 64 << 20) -> None:
        self._limit_bytes, self.used_bytes = limit_bytes, 0
        self._kept: OrderedDict[PromptKey, TextCondition] = OrderedDict()

    def get(self, key: PromptKey, encode: Callable[[], TextCondition]) -> TextCondition:
        """What is kept for a key, or what `encode` returns, which is kept then. Do not change its tensors."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        condition = encode()
        self._kept[key] = condition
        self.used_bytes += _bytes(condition)
        while self.used_bytes > self._limit_bytes:
            self.used_bytes -= _bytes(self._kept.popitem(last=False)[1])
        return condition


def _bytes(condition: TextCondition) -> int:
    return condition.embeddings.nbytes + (0 if condition.pooled is None else condition.pooled.nbytes)
