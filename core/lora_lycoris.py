"""Updates that are more than a product of two matrices: LyCORIS' LoHa, LoKr, full difference, LoRA with a core.

Called by `core.lora_file`. Formulas: https://github.com/KohakuBlueleaf/LyCORIS `modules/`; shapes are judged by
`core.lora_parts` before.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import LoraFileError
from core.lora_header import TensorInfo
from core.lora_parts import LoraModule, read_module
from core.lora_state import LoraLayer, ModuleUpdate, check_layer, dora_delta

SAFE_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, kw_only=True, eq=False)
class LycorisUpdate(ModuleUpdate):
    """An update given by the named tensors of a file.

    Attributes:
        parts: By the names of `core.lora_keys`, without alpha and magnitude.
        scale: What `product` is multiplied by.
        rank: What alpha is divided by; None where it means nothing (a difference, a LoKr of two whole factors).
        size: Shape of the update.
        magnitude: DoRA's, as in `core.lora_state.LoraLayer`.
    """

    parts: Mapping[str, Tensor]
    scale: float
    size: tuple[int, ...]
    rank: int | None = None
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the update; a convolution's kernel may be flattened into the inputs."""
        return self.size

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """The full update in fp32."""
        parts = {name: tensor.float() for name, tensor in self.parts.items()}
        product = (self.scale * self.product(parts)).reshape(self.size)
        if self.magnitude is None:
            return product
        # DoRA's lengths are those of the true weight, whose kernel this update may have flattened.
        return dora_delta(product if weight is None else product.reshape(weight.shape), self.magnitude, weight)

    @abstractmethod
    def product(self, parts: dict[str, Tensor]) -> Tensor:
        """The update before scaling, of fp32 parts, in any layout of as many numbers as `size` has."""


class CoreLora(LycorisUpdate):
    """up (out, rank) x mid (rank, rank, k, k) x down (rank, in): `lora_mid`, a CP decomposition of a convolution."""

    def product(self, parts: dict[str, Tensor]) -> Tensor:
        return torch.einsum("nm...,on,mi->oi...", parts["mid"], parts["up"].flatten(1), parts["down"].flatten(1))


class LoHa(LycorisUpdate):
    """(w1_a @ w1_b) * (w2_a @ w2_b), each with a core (rank, rank, k, k) between them or none."""

    def product(self, parts: dict[str, Tensor]) -> Tensor:
        first, second = (_low_rank(parts, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
        return first * second


class LoKr(LycorisUpdate):
    """Kronecker product of w1 and w2, each whole or a product of two, w2 also with a core."""

    def product(self, parts: dict[str, Tensor]) -> Tensor:
        w1, w2 = (
            parts[f"lokr_w{n}"]
            if f"lokr_w{n}" in parts
            else _low_rank(parts, f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}")
            for n in (1, 2)
        )
        return torch.kron(w1.reshape(*w1.shape[:2], *[1] * (w2.dim() - 2)), w2.contiguous())


class FullDifference(LycorisUpdate):
    """The whole difference of two weights."""

    def product(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["diff"]


def build_update(label: str, parts: Mapping[str, Tensor], alpha: float | None) -> ModuleUpdate:
    """The update that one module's tensors describe.

    Args:
        label: File and module, for people.
        parts: By the names of `core.lora_keys`; an alpha among them is taken where `alpha` is None.
        alpha: Scale times rank, where something beside the file tells; None without an alpha in the file: scale 1.

    Raises:
        LoraFileError: The parts do not belong together, or are not finite.
    """
    for name, tensor in parts.items():
        if not torch.isfinite(tensor).all():
            raise LoraFileError(f"{label}: {name} holds NaN or infinite values: the training diverged")
    module = read_module(label, {name: _info(tensor) for name, tensor in parts.items()})
    if alpha is None and "alpha" in parts:
        alpha = float(parts["alpha"].item())
    weights = {name: tensor for name, tensor in parts.items() if name not in ("alpha", "magnitude")}
    magnitude = parts.get("magnitude")
    if weights.keys() == {"down", "up"}:
        down, up = _same_dimensions(weights["down"], weights["up"])
        alpha = float(down.shape[0]) if alpha is None else alpha
        layer = LoraLayer(down=down, up=up, alpha=alpha, magnitude=magnitude)
        check_layer(label, layer)
        return layer
    kind = _kind(weights)
    # A LoKr of two whole factors and a difference have no rank: their alpha means nothing, as LyCORIS has it. LyCORIS
    # also takes an alpha of 0 as none.
    has_rank = kind is not FullDifference and not (kind is LoKr and {"lokr_w1", "lokr_w2"} <= weights.keys())
    rank = module.rank if has_rank else None
    scale = alpha / rank if alpha and rank else 1.0
    return kind(parts=weights, scale=scale, size=_size(module, weights), rank=rank, magnitude=magnitude)


def _kind(weights: Mapping[str, Tensor]) -> type[LycorisUpdate]:
    if "mid" in weights:
        return CoreLora
    if "hada_w1_a" in weights:
        return LoHa
    return FullDifference if "diff" in weights else LoKr


def _size(module: LoraModule, weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    if "diff" in weights:
        return tuple(weights["diff"].shape)
    inputs = module.inputs
    for side in module.kernel:
        inputs //= side
    return (module.outputs, inputs, *module.kernel)


def _low_rank(parts: Mapping[str, Tensor], a: str, b: str, core: str) -> Tensor:
    """a (out, rank) @ b (rank, in[, k, k]); with a core, a is (rank, out) and the result (out, in, k, k)."""
    if core in parts:
        return torch.einsum("nm...,no,mi->oi...", parts[core], parts[a], parts[b])
    return (parts[a] @ parts[b].flatten(1)).reshape(parts[a].shape[0], *parts[b].shape[1:])


def _same_dimensions(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Both as matrices or both as kernels: some files write one as a 1x1 convolution and the other as a matrix."""
    if down.dim() == up.dim():
        return down, up
    return (down, up[..., None, None]) if down.dim() == 4 else (down, up.flatten(1))


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(SAFE_DTYPES.get(tensor.dtype, "I64"), tuple(tensor.shape))
