"""Text embeddings of all captions of a training, computed once, so that the loop needs no text encoder.

Only shuffled captions, of which there are too many to keep, are encoded when they are asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.pipelines import LoadedBase
from core.progress import Progress, Report, silent
from core.text_encoding import encode_prompts


@dataclass(frozen=True, kw_only=True, eq=False)
class TextCache:
    """Embeddings by caption.

    Attributes:
        rows: Row of each caption in `embeddings`; "" is always there, for caption dropout.
        embeddings: (captions, tokens, dim) on the training device.
        encode: Gives (1, tokens, dim) for any other caption.
    """

    rows: dict[str, int]
    embeddings: Tensor
    encode: Callable[[str], Tensor]

    def lookup(self, captions: Sequence[str]) -> Tensor:
        """Embeddings (n, tokens, dim) of n captions."""
        if all(caption in self.rows for caption in captions):
            return self.embeddings[[self.rows[caption] for caption in captions]]
        return torch.cat([
            self.embeddings[self.rows[caption], None] if caption in self.rows else self.encode(caption)
            for caption in captions
        ])  # fmt: skip

    @property
    def byte_count(self) -> int:
        """Memory held."""
        return self.embeddings.numel() * self.embeddings.element_size()


def cache_texts(
    base: LoadedBase, captions: Sequence[str], clip_skip: int | None, dtype: torch.dtype, report: Report = silent
) -> TextCache:
    """Encode each different caption once, and the empty one.

    One at a time: a batch of another size may round differently, and a resumed run has to see the same bits.

    Args:
        base: Its text encoder is used here and not again.
        captions: Of all pictures.
        clip_skip: WebUI convention; None for the base's default.
        dtype: That the UNet takes.
        report: Called after each caption.
    """

    def encode(caption: str) -> Tensor:
        return encode_prompts(base, [caption], clip_skip, literal=True).embeddings.to(dtype)  # (1, tokens, dim)

    unique = sorted({"", *captions})
    rows = []
    for done, caption in enumerate(unique, start=1):
        rows.append(encode(caption))
        report(Progress(stage="encoding captions", step=done, total=len(unique)))
    return TextCache(
        rows={caption: row for row, caption in enumerate(unique)}, embeddings=torch.cat(rows), encode=encode
    )
