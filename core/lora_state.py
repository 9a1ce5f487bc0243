"""A LoRA in memory, whatever file it came from. Used by every reader and writer of LoRA files; does no I/O."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.errors import LoraFileError


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraLayer:
    """The update of one module: delta W = (alpha / rank) * up @ down.

    Attributes:
        down: (rank, in) for a linear layer, (rank, in, kh, kw) for a convolution. PEFT calls it lora_A.
        up: (out, rank), or (out, rank, 1, 1). PEFT calls it lora_B.
        alpha: Scale times rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The full update in fp32: (out, in) or (out, in, kh, kw)."""
        down = self.down.float().flatten(1)  # (rank, in * kh * kw)
        up = self.up.float().flatten(1)  # (out, rank)
        return (self.scale * (up @ down)).reshape(up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraState:
    """All layers of one LoRA.

    Attributes:
        unet: By module name. Dotted ("mid_block.attentions.0.proj_in") where the source says so, with underscores where
            it does not (kohya files); `flat_name` makes both equal.
        text_encoder: The same for the text encoder; empty for most of ours.
        metadata: Header strings of the file it came from.
    """

    unet: dict[str, LoraLayer]
    text_encoder: dict[str, LoraLayer] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def flat_name(module: str) -> str:
    """A module's name as kohya writes it: dots become underscores."""
    return module.replace(".", "_")


def check_layer(label: str, layer: LoraLayer) -> None:
    """Refuse a layer that no reader could use.

    Raises:
        LoraFileError: Shapes do not belong together, or a value is NaN or infinite.
    """
    dimensions = layer.down.dim()
    if dimensions not in (2, 4) or layer.up.dim() != dimensions or layer.up.shape[1] != layer.rank:
        raise LoraFileError(
            f"{label}: down {tuple(layer.down.shape)} and up {tuple(layer.up.shape)} do not belong together; "
            "expected (rank, in[, k, k]) and (out, rank[, 1, 1])"
        )
    if dimensions == 4 and layer.up.shape[2:] != (1, 1):
        raise LoraFileError(f"{label}: up {tuple(layer.up.shape)} must be a 1x1 convolution")
    finite = torch.isfinite(layer.down).all() and torch.isfinite(layer.up).all()
    if not finite or not 0 < abs(layer.alpha) < float("inf"):
        raise LoraFileError(f"{label} holds NaN or infinite values, or alpha {layer.alpha}: the training diverged")
