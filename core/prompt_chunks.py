"""Prompts as token chunks of equal length, each token with its weight: what a CLIP text encoder can take.

Called by `core.text_encoding`; the rules are those of WebUI's `sd_hijack_clip` (75 tokens of text per chunk, a chunk
breaks behind a comma where one is near its end).
"""

import logging
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError
from core.prompt_syntax import parse_prompt

logger = logging.getLogger(__name__)

COMMA_REACH = 20
"""A chunk that is full breaks behind its last comma where that is no farther back than so many tokens."""

MAX_CHUNKS = 16


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What the encoder sees at once.

    Attributes:
        ids: max_tokens of them: start, text, end, padding.
        weights: Of each; 1 for start, end and padding.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def prompt_chunks(tokenizer: Any, prompt: str, max_tokens: int) -> list[Chunk]:
    """A prompt in the grammar of `core.prompt_syntax`, in as many chunks as it needs, at least one.

    Raises:
        ConfigError: The prompt is wrong or far too long, or still names LoRAs.
    """
    parsed = parse_prompt(prompt)
    if parsed.loras:
        names = ", ".join(repr(name) for name, _ in parsed.loras)
        raise ConfigError(f"the prompt names LoRAs ({names}) where no library is: give their files instead")
    room = max_tokens - 2
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    full: list[list[tuple[int, float]]] = []
    current: list[tuple[int, float]] = []
    last_comma = -1

    def close() -> None:
        nonlocal current, last_comma
        full.append(current)
        current, last_comma = [], -1

    for piece in parsed.pieces:
        if piece.begins_chunk:
            close()
        for token in tokenizer(piece.text, add_special_tokens=False, truncation=False, verbose=False).input_ids:
            if token != comma and len(current) == room and last_comma >= 0 and room - last_comma - 1 <= COMMA_REACH:
                current, moved = current[: last_comma + 1], current[last_comma + 1 :]
                close()
                current = moved
            elif len(current) == room:
                close()
            current.append((token, piece.weight))
            if token == comma:
                last_comma = len(current) - 1
    if current or not full:
        full.append(current)
    if len(full) > MAX_CHUNKS:
        raise ConfigError(
            f"the prompt needs {len(full)} chunks of {room} tokens, {MAX_CHUNKS} are the most: shorten it"
        )
    return [_padded(tokenizer, tokens, max_tokens) for tokens in full]


def literal_chunk(tokenizer: Any, prompt: str, max_tokens: int) -> Chunk:
    """A text without any grammar in one chunk, as captions are trained; what does not fit is cut off and logged."""
    ids = tokenizer(prompt, padding="max_length", max_length=max_tokens, truncation=True).input_ids
    # Only a text of more characters than tokens can be too long: spares most prompts the second pass.
    if len(prompt.encode()) > max_tokens - 2:
        all_ids = tokenizer(prompt, padding=False, truncation=False, verbose=False).input_ids
        if len(all_ids) > max_tokens:
            cut_off = str(tokenizer.decode(all_ids[max_tokens - 1 : -1])).strip()
            logger.warning("prompt truncated tokens=%d limit=%d cut_off=%r", len(all_ids), max_tokens, cut_off)
    return Chunk(ids=tuple(ids), weights=(1.0,) * max_tokens)


def empty_chunk(tokenizer: Any, max_tokens: int) -> Chunk:
    """What shorter prompts are padded with."""
    return _padded(tokenizer, [], max_tokens)


def _padded(tokenizer: Any, tokens: list[tuple[int, float]], max_tokens: int) -> Chunk:
    padding = max_tokens - 2 - len(tokens)
    ids = (
        tokenizer.bos_token_id,
        *(token for token, _ in tokens),
        tokenizer.eos_token_id,
        *(tokenizer.pad_token_id,) * padding,
    )
    return Chunk(ids=ids, weights=(1.0, *(weight for _, weight in tokens), 1.0, *(1.0,) * padding))
