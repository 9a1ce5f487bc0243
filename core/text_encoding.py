"""Prompts to embeddings, with clip skip in the WebUI convention. The same function serves training and generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from core.errors import ConfigError
from core.pipelines import LoadedBase
from core.prompt_chunks import Chunk, empty_chunk, literal_chunk, prompt_chunks


@dataclass(frozen=True, kw_only=True)
class TextCondition:
    """What the UNet is told about n prompts.

    Attributes:
        embeddings: (n, tokens, dim) in the text encoder's dtype, on its device.
        pooled: (n, dim) where a family needs it; None for SD 1.x.
    """

    embeddings: Tensor
    pooled: Tensor | None


def resolve_clip_skip(base: LoadedBase, clip_skip: int | None) -> int:
    """The clip skip to use: the base's default for None.

    Raises:
        ConfigError: The text encoder has fewer layers than that.
    """
    resolved = base.facts.default_clip_skip if clip_skip is None else clip_skip
    if not 1 <= resolved <= base.facts.text_layers:
        raise ConfigError(
            f"clip_skip {resolved} does not fit this base model: its text encoder has {base.facts.text_layers} layers; "
            f"choose 1 to {base.facts.text_layers}, or leave it out for the model's default "
            f"({base.facts.default_clip_skip})"
        )
    return resolved


@torch.no_grad()
def encode_prompts(
    base: LoadedBase,
    prompts: Sequence[str],
    clip_skip: int | None,
    *,
    literal: bool = False,
    negatives: int = 0,
) -> TextCondition:
    """Encode prompts in the grammar of `core.prompt_syntax`; long ones take several chunks of `base.facts.max_tokens`.

    Clip skip N takes the output of the N-th last layer and applies the final layer norm (AUTOMATIC1111 WebUI and
    kohya sd-scripts; diffusers counts one less). N = 1 is the encoder's ordinary output. SDXL takes no layer norm and
    puts the outputs of both encoders beside each other.

    A weighted token's output is scaled by its weight, then the whole chunk so that its mean is what it was (WebUI's
    "Original" emphasis), per prompt, so that no prompt touches another.

    Args:
        base: Its tokenizers and text encoders are used, with whatever LoRAs they hold now.
        prompts: n texts, "" for the unconditional one.
        clip_skip: WebUI convention; None for the base's default.
        literal: No grammar and one chunk: captions are trained as they are written, and what does not fit is cut off.
        negatives: So many of the first prompts are negative ones: SDXL's embedding of an empty one is zero.

    Returns:
        Embeddings (n, chunks * max_tokens, dim), all as long as the longest needs; `pooled` (n, dim of the second
        encoder) of the first chunk for SDXL, None for SD 1.x.

    Raises:
        ConfigError: clip_skip is beyond the text encoder's layers, there is no prompt, or one is wrong.
    """
    if not prompts:
        raise ConfigError("no prompt to encode: pass at least one text (an empty one is allowed)")
    layers_back = resolve_clip_skip(base, clip_skip)
    if base.facts.family == "sd1":
        rows = _chunk_rows(base.tokenizer, prompts, base.facts.max_tokens, literal)
        chunks = [_encode(base, base.text_encoder, row, layers_back)[0] for row in rows]
        return TextCondition(embeddings=torch.cat(chunks, dim=1), pooled=None)
    pairs = []
    for tokenizer, encoder in ((base.tokenizer, base.text_encoder), (base.tokenizer_2, base.text_encoder_2)):
        rows = _chunk_rows(tokenizer, prompts, base.facts.max_tokens, literal)
        pairs.append([_encode(base, encoder, row, layers_back) for row in rows])
    # Both tokenizers split texts alike, and so do their chunks.
    embeddings = torch.cat([torch.cat([one, two], dim=2) for (one, _), (two, _) in zip(*pairs, strict=True)], dim=1)
    pooled: Any = pairs[1][0][1]  # (n, dim)
    for row, prompt in enumerate(prompts[:negatives]):
        if not prompt.strip():
            for condition in (embeddings, pooled):
                condition[row] = 0
    return TextCondition(embeddings=embeddings, pooled=pooled)


def added_conditions(base: LoadedBase, pooled: Tensor | None, width: int, height: int) -> dict[str, Tensor]:
    """What SDXL's UNet is told besides the text, for `added_cond_kwargs`; empty for SD 1.x.

    Args:
        base: Its family decides.
        pooled: (n, dim) of `encode_prompts`.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.

    Returns:
        "text_embeds" (n, dim) and "time_ids" (n, 6): original size, crop offset, target size, each (height, width).
    """
    if base.facts.family == "sd1" or pooled is None:
        return {}
    sizes = torch.tensor([height, width, 0, 0, height, width], dtype=pooled.dtype, device=pooled.device)  # (6,)
    return {"text_embeds": pooled, "time_ids": sizes.repeat(len(pooled), 1)}


def _chunk_rows(tokenizer: Any, prompts: Sequence[str], max_tokens: int, literal: bool) -> list[list[Chunk]]:
    """For each position the chunks of all prompts there; short prompts end in empty ones."""
    if literal:
        return [[literal_chunk(tokenizer, prompt, max_tokens) for prompt in prompts]]
    chunks = [prompt_chunks(tokenizer, prompt, max_tokens) for prompt in prompts]
    return [list(row) for row in zip_longest(*chunks, fillvalue=empty_chunk(tokenizer, max_tokens))]


def _encode(base: LoadedBase, encoder: Any, chunks: Sequence[Chunk], layers_back: int) -> tuple[Tensor, Tensor | None]:
    """Hidden states (n, max_tokens, dim) and, of an encoder that projects, the pooled (n, dim)."""
    input_ids = torch.tensor([chunk.ids for chunk in chunks], dtype=torch.int64)  # (n, tokens)
    # No attention mask: Stable Diffusion was trained to attend to its padding.
    output = encoder(input_ids.to(base.device), output_hidden_states=True)
    hidden = output.hidden_states[-layers_back]  # (n, tokens, dim), before the final layer norm
    if base.facts.family == "sd1":
        hidden = encoder.final_layer_norm(hidden)
    for row, chunk in enumerate(chunks):
        if any(weight != 1 for weight in chunk.weights):
            weights = torch.tensor(chunk.weights, device=hidden.device)[:, None]  # (tokens, 1)
            plain = hidden[row].float()  # (tokens, dim)
            weighted = plain * weights
            hidden[row] = weighted * (plain.mean() / weighted.mean())
    return hidden, getattr(output, "text_embeds", None)
