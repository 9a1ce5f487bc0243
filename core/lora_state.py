"""A LoRA in memory, whatever file it came from. Used by every reader and writer of LoRA files; does no I/O."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.errors import LoraFileError


class ModuleUpdate(ABC):
    """What a LoRA file of any kind adds to the weight of one module."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the update: (out, in) or (out, in, kh, kw)."""

    @abstractmethod
    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The full update in fp32, of `shape`.

        Args:
            weight: The module's own weight; needed by DoRA alone.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraLayer(ModuleUpdate):
    """The update of one module: delta W = (alpha / rank) * up @ down, and with DoRA a new length of the weight's rows.

    Attributes:
        down: (rank, in) for a linear layer, (rank, in, kh, kw) for a convolution. PEFT calls it lora_A.
        up: (out, rank), or (out, rank, 1, 1). PEFT calls it lora_B.
        alpha: Scale times rank.
        magnitude: DoRA's length of each row (`out` numbers) or, in old LyCORIS files, of each column ((1, in[, 1, 1])).
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the update."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The full update in fp32: (out, in) or (out, in, kh, kw)."""
        down = self.down.float().flatten(1)  # (rank, in * kh * kw)
        up = self.up.float().flatten(1)  # (out, rank)
        product = (self.scale * (up @ down)).reshape(self.shape)
        return product if self.magnitude is None else dora_delta(product, self.magnitude, weight)

    def peft_magnitude(self, dtype: torch.dtype) -> Tensor:
        """DoRA's lengths as PEFT takes them: (out,), or (1, out, 1, 1) of a convolution.

        Raises:
            LoraFileError: They are those of columns, which PEFT cannot say.
        """
        lengths = self.written_magnitude(dtype)
        if lengths.shape[0] != self.shape[0]:
            raise LoraFileError("DoRA's lengths are those of columns, which PEFT cannot say: keep the kohya file")
        return lengths.reshape(-1) if self.down.dim() == 2 else lengths.reshape(1, -1, 1, 1)

    def written_magnitude(self, dtype: torch.dtype) -> Tensor:
        """DoRA's lengths as LyCORIS and WebUI take them: (out, 1[, 1, 1]), or (1, in[, 1, 1]) where they are columns'.

        Raises:
            LoraFileError: There are none, or they fit neither.
        """
        ones = [1] * (self.down.dim() - 2)
        lengths = None if self.magnitude is None else self.magnitude.detach().to("cpu", dtype).contiguous()
        if lengths is None or lengths.numel() not in self.shape[:2]:
            raise LoraFileError(
                f"DoRA's lengths {None if lengths is None else tuple(lengths.shape)} fit no {self.shape}"
            )
        if along_columns(lengths, self.shape):
            return lengths.reshape(1, -1, *ones)
        return lengths.reshape(-1, 1, *ones)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraState:
    """All layers of one LoRA.

    Attributes:
        unet: By module name. Dotted ("mid_block.attentions.0.proj_in") where the source says so, with underscores where
            it does not (kohya files); `flat_name` makes both equal.
        text_encoder: The same for the text encoder; empty for most of ours.
        text_encoder_2: The same for SDXL's second one.
        metadata: Header strings of the file it came from.
        notes: Sentences for people about what the file left open.
    """

    unet: Mapping[str, ModuleUpdate]
    text_encoder: Mapping[str, ModuleUpdate] = field(default_factory=dict)
    text_encoder_2: Mapping[str, ModuleUpdate] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def components(self) -> dict[str, Mapping[str, ModuleUpdate]]:
        """The layers by model, as diffusers names the models."""
        return {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}


def plain_layers(layers: Mapping[str, ModuleUpdate]) -> dict[str, LoraLayer]:
    """Layers that are a product of two matrices, for those who need exactly that.

    Raises:
        LoraFileError: Names the first one that is of another kind.
    """
    plain: dict[str, LoraLayer] = {}
    for name, layer in layers.items():
        if not isinstance(layer, LoraLayer):
            raise LoraFileError(
                f"{name} is a {type(layer).__name__}, not a product of two matrices: it cannot be used so"
            )
        plain[name] = layer
    return plain


def dora_delta(product: Tensor, magnitude: Tensor, weight: Tensor | None) -> Tensor:
    """magnitude * (W + product) / |W + product| - W, fp32. DoRA: https://arxiv.org/abs/2402.09353.

    Args:
        product: The scaled update before DoRA, shaped as the weight.
        magnitude: `out` numbers, or (1, in[, 1, 1]) where the file measures columns.
        weight: The module's own weight.

    Raises:
        LoraFileError: The weight is missing.
    """
    if weight is None:
        raise LoraFileError("a DoRA layer rescales the base model's weight: it has no update without that weight")
    base = weight.detach().float().reshape(product.shape)
    moved = base + product.to(base.device)
    lengths = magnitude.float().to(base.device)
    kept = 1 if along_columns(lengths, base.shape) else 0  # the dimension that lengths run along
    shape = [1] * base.dim()
    shape[kept] = base.shape[kept]
    others = [number for number in range(base.dim()) if number != kept]
    norm = moved.square().sum(dim=others, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return lengths.reshape(shape) * moved / norm - base


def flat_name(module: str) -> str:
    """A module's name as kohya writes it: dots become underscores."""
    return module.replace(".", "_")


def along_columns(lengths: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether DoRA's lengths are those of a weight's columns, as old LyCORIS has it, rather than its rows.

    PEFT writes a convolution's rows as (1, out, 1, 1), LyCORIS its columns as (1, in, 1, 1): the count decides, and
    rows where both are equal, but for the matrix (1, in), which nobody writes for rows.
    """
    return (lengths.dim() == 2 and lengths.shape[0] == 1 < shape[0]) or lengths.numel() != shape[0]


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
