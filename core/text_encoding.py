"""Prompts to embeddings, with clip skip in the WebUI convention. The same function serves training and generation."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import ConfigError
from core.pipelines import LoadedBase

logger = logging.getLogger(__name__)


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
def encode_prompts(base: LoadedBase, prompts: Sequence[str], clip_skip: int | None) -> TextCondition:
    """Encode prompts, each padded to `base.facts.max_tokens`; what does not fit is cut off and logged.

    Clip skip N takes the output of the N-th last layer and applies the final layer norm (AUTOMATIC1111 WebUI and
    kohya sd-scripts; diffusers counts one less). N = 1 is the encoder's ordinary output.

    Args:
        base: Its tokenizer and text encoder are used.
        prompts: n texts, "" for the unconditional one.
        clip_skip: WebUI convention; None for the base's default.

    Returns:
        Embeddings (n, max_tokens, dim); `pooled` is None for SD 1.x.

    Raises:
        ConfigError: clip_skip is beyond the text encoder's layers, or there is no prompt.
    """
    if not prompts:
        raise ConfigError("no prompt to encode: pass at least one text (an empty one is allowed)")
    layers_back = resolve_clip_skip(base, clip_skip)
    input_ids = tokenize(base, prompts).to(base.device)  # (n, tokens)
    # No attention mask: Stable Diffusion 1 was trained to attend to its padding.
    output = base.text_encoder(input_ids, output_hidden_states=True)
    hidden = output.hidden_states[-layers_back]  # (n, tokens, dim), before the final layer norm
    return TextCondition(embeddings=base.text_encoder.final_layer_norm(hidden), pooled=None)


def tokenize(base: LoadedBase, prompts: Sequence[str]) -> Tensor:
    """Token ids (n, max_tokens) int64 on the CPU: start, text, end, padding."""
    max_tokens = base.facts.max_tokens
    rows = []
    for prompt in prompts:
        ids = base.tokenizer(prompt, padding="max_length", max_length=max_tokens, truncation=True).input_ids
        rows.append(ids)
        # Only a text of more characters than tokens can be too long: spares most prompts the second pass.
        if len(prompt.encode()) > max_tokens - 2:
            all_ids = base.tokenizer(prompt, padding=False, truncation=False, verbose=False).input_ids
            if len(all_ids) > max_tokens:
                cut_off = str(base.tokenizer.decode(all_ids[max_tokens - 1 : -1]))
                logger.warning(
                    "prompt truncated tokens=%d limit=%d cut_off=%r", len(all_ids), max_tokens, cut_off.strip()
                )
    return torch.tensor(rows, dtype=torch.int64)  # (n, tokens)
