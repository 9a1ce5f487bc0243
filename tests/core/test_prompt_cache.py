"""Prompts are encoded once for each thing that changes them, and memory stays bounded."""

import torch

from core.prompt_cache import PromptCache, PromptKey
from core.text_encoding import TextCondition


def condition(value: float) -> TextCondition:
    return TextCondition(embeddings=torch.full((1, 4, 8), float(value)), pooled=None)  # 128 bytes


def key(prompt: str, loras: tuple[tuple[str, float], ...] = ()) -> PromptKey:
    return PromptKey(base="base", prompts=(prompt,), clip_skip=1, loras=loras)


def test_a_text_encoder_lora_and_its_weight_have_embeddings_of_their_own() -> None:
    cache = PromptCache()
    keys = [key("a cat"), key("a cat", (("lora", 1.0),)), key("a cat", (("lora", 0.5),))]
    first = [cache.get(own, lambda n=n: condition(n)) for n, own in enumerate(keys)]  # type: ignore[misc]
    again = [cache.get(own, lambda: condition(9)) for own in keys]
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert len({float(c.embeddings[0, 0, 0]) for c in again}) == 3


def test_the_least_recently_used_goes_when_the_bytes_are_full() -> None:
    cache = PromptCache(limit_bytes=256)
    one, two, three = key("one"), key("two"), key("three")
    for number, own in enumerate((one, two, one, three)):
        cache.get(own, lambda n=number: condition(n))  # type: ignore[misc]
    assert cache.used_bytes == 256
    assert float(cache.get(one, lambda: condition(9)).embeddings[0, 0, 0]) == 0
    assert float(cache.get(two, lambda: condition(9)).embeddings[0, 0, 0]) == 9
