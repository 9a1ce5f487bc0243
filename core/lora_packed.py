"""LoRAs as one block of numbers in the order of a slot layout, in memory and as a file that one read brings in.

Called by `core.lora_slots`, and when a LoRA is prefetched; the files are cache entries of one machine, never published.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import LoraFileError
from core.lora_state import LoraLayer, ModuleUpdate, flat_name

RANK_CLASSES = (8, 16, 32, 64, 128)
ALIGNMENT = 16  # numbers; a matrix starts where a tensor of its own would, so kernels do the same work on it
TEXT_WORDS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_MAGIC = b"lspack02"
_CODES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_HEAD = struct.Struct("<8s32sII")  # magic, layout fingerprint, dtype code, modules


@dataclass(frozen=True, kw_only=True)
class SlotLayout:
    """Which modules slots serve, and where each matrix of a slot lies.

    Attributes:
        names: Dotted module names in slot order.
        shapes: (out, in) of each.
        rank: The largest that a slot has room for.
        starts: Per module the first number of `down` and of `up`.
        numel: Numbers per slot.
        fingerprint: Of all of it.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    rank: int
    starts: tuple[tuple[int, int], ...]
    numel: int
    fingerprint: str

    @staticmethod
    def of(model: nn.Module, module_names: Sequence[str], rank: int) -> "SlotLayout":
        """The layout of some linear modules of a model.

        Raises:
            LoraFileError: A module is no linear layer.
        """
        shapes: list[tuple[int, int]] = []
        starts: list[tuple[int, int]] = []
        end = 0
        for name in module_names:
            module = model.get_submodule(name)
            if not isinstance(module, nn.Linear):
                raise LoraFileError(
                    f"module {name} ({type(module).__name__}) is no linear layer: slots cannot serve it"
                )
            shapes.append((module.out_features, module.in_features))
            middle = end + _aligned(rank * module.in_features)
            starts.append((end, middle))
            end = middle + _aligned(rank * module.out_features)
        facts = json.dumps([list(module_names), shapes, rank])
        return SlotLayout(
            names=tuple(module_names),
            shapes=tuple(shapes),
            rank=rank,
            starts=tuple(starts),
            numel=end,
            fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
        )


def text_encoder_modules(text_encoder: nn.Module) -> list[str]:
    """The linear layers of a CLIP text encoder that LoRAs change: attention, then MLP, which many leave alone."""
    names = [
        name
        for name, module in text_encoder.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TEXT_WORDS
    ]
    return sorted(names, key=lambda name: name.rpartition(".")[2] in ("fc1", "fc2"))


def rank_class(layers: Mapping[str, ModuleUpdate]) -> int | None:
    """The smallest of `RANK_CLASSES` with room for all layers; None where there is none."""
    ranks = [layer.rank for layer in layers.values() if isinstance(layer, LoraLayer)]
    return next((size for size in RANK_CLASSES if size >= max(ranks, default=1)), None)


def layout_misfit(layers: Mapping[str, ModuleUpdate], layout: SlotLayout) -> str | None:
    """Why slots of this layout cannot serve a LoRA, as a sentence; None where they can."""
    positions = _positions(layout)
    for key, layer in layers.items():
        position = positions.get(_key(key))
        if not isinstance(layer, LoraLayer):
            return f"{key} is a {type(layer).__name__}, not a product of two matrices"
        if layer.magnitude is not None:
            return f"{key} is a DoRA layer, which rescales the base model's weight"
        if position is None:
            return f"{key} is none of the {len(layout.names)} modules of this layout"
        if layer.rank > layout.rank:
            return f"{key} has rank {layer.rank}, the slots have room for {layout.rank}"
        size = (layer.up.shape[0], math.prod(layer.down.shape[1:]))
        if size != layout.shapes[position] or layer.down.shape[2:].numel() != 1:
            return f"{key} is made for a weight of shape {size}, the module's is {layout.shapes[position]}"
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLora:
    """One LoRA in a layout's order.

    Attributes:
        layout: The order.
        flat: (layout.numel,) on the CPU; matrices in their true ranks at the layout's starts, zeros elsewhere.
        ranks, alphas: Per module; rank 0 where the LoRA leaves the module alone.
    """

    layout: SlotLayout
    flat: Tensor
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]

    @property
    def used(self) -> int:
        """Numbers up to the end of the last module that the LoRA changes; the rest is neither copied nor saved."""
        return used_numbers(self.layout, self.ranks)

    def save(self, path: Path) -> None:
        """Write the file that `open` and `LoraSlots.load` read; goes to its name as a whole."""
        count = len(self.ranks)
        dtype = _CODES[self.flat.dtype]
        head = _HEAD.pack(_MAGIC, bytes.fromhex(self.layout.fingerprint), dtype, count)
        head += struct.pack(f"<{count}i{count}d", *self.ranks, *self.alphas)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        with temporary.open("wb") as file:
            file.write(head.ljust(header_size(self.layout), b"\0"))
            file.write(_bytes(self.flat[: self.used].contiguous()))
        temporary.replace(path)

    @staticmethod
    def open(path: Path, layout: SlotLayout, dtype: torch.dtype) -> "PackedLora":
        """Read a file whole.

        Raises:
            LoraFileError: It is of another layout or dtype, or has not the bytes it should have.
        """
        flat = torch.zeros(layout.numel, dtype=dtype)
        ranks, alphas = read_packed(path, layout, flat)
        return PackedLora(layout=layout, flat=flat, ranks=ranks, alphas=alphas)


def pack(layers: Mapping[str, ModuleUpdate], layout: SlotLayout, dtype: torch.dtype) -> PackedLora:
    """Bring a LoRA into a layout's order; scales stay apart.

    Args:
        layers: By dotted or flat module names.
        layout: Of the slots it is meant for.
        dtype: Of those slots.

    Raises:
        LoraFileError: It does not fit; see `layout_misfit`.
    """
    if reason := layout_misfit(layers, layout):
        raise LoraFileError(f"this LoRA does not fit the slots: {reason}")
    flat = torch.zeros(layout.numel, dtype=dtype)
    ranks, alphas = [0] * len(layout.names), [0.0] * len(layout.names)
    positions = _positions(layout)
    for key, layer in layers.items():
        assert isinstance(layer, LoraLayer)
        position = positions[_key(key)]
        ranks[position], alphas[position] = layer.rank, layer.alpha
        for start, matrix in zip(layout.starts[position], (layer.down, layer.up), strict=True):
            flat[start : start + matrix.numel()].copy_(matrix.detach().reshape(-1))
    return PackedLora(layout=layout, flat=flat, ranks=tuple(ranks), alphas=tuple(alphas))


def header_size(layout: SlotLayout) -> int:
    """Bytes before the numbers, a multiple of 64."""
    return math.ceil((_HEAD.size + 12 * len(layout.names)) / 64) * 64


def used_numbers(layout: SlotLayout, ranks: Sequence[int]) -> int:
    """Where the last module of a rank above 0 ends in a layout."""
    last = next((number for number in reversed(range(len(ranks))) if ranks[number]), None)
    if last is None:
        return 0
    return layout.starts[last + 1][0] if last + 1 < len(ranks) else layout.numel


def read_packed(path: Path, layout: SlotLayout, into: Tensor) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Read a packed file's numbers straight into memory with one system call.

    Args:
        path: The file.
        layout: What it must be of.
        into: (layout.numel,), contiguous on the CPU, of the file's dtype; its content is undefined after an error.

    Returns:
        Ranks and alphas per module.

    Raises:
        LoraFileError: It is of another layout or dtype, or has not the bytes it should have.
    """
    head = bytearray(header_size(layout))
    body = _bytes(into)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        length = os.fstat(descriptor).st_size
        read = os.preadv(descriptor, [head, body], 0) if len(head) <= length <= len(head) + len(body) else 0
        while 0 < read < length:  # only above 2 GB, or where a signal came between
            got = os.preadv(descriptor, [body[read - len(head) :]], read) if read >= len(head) else 0
            read = read + got if got else 0
    finally:
        os.close(descriptor)
    if read != length or not read:
        raise LoraFileError(f"packed LoRA {path.name} has {length} bytes, not those of this layout: pack it again")
    magic, fingerprint, code, count = _HEAD.unpack_from(head)
    expected = (_MAGIC, bytes.fromhex(layout.fingerprint), _CODES[into.dtype], len(layout.names))
    if (magic, fingerprint, code, count) != expected:
        raise LoraFileError(f"packed LoRA {path.name} is of another layout or dtype: pack it again")
    numbers = struct.unpack_from(f"<{count}i{count}d", head, _HEAD.size)
    ranks: tuple[int, ...] = numbers[:count]
    if max(ranks, default=0) > layout.rank or min(ranks, default=0) < 0:
        raise LoraFileError(f"packed LoRA {path.name} has ranks beyond {layout.rank}: pack it again")
    whole = len(head) + used_numbers(layout, ranks) * into.element_size()
    if length != whole:
        raise LoraFileError(f"packed LoRA {path.name} has {length} bytes, {whole} expected: pack it again")
    return ranks, numbers[count:]


def _bytes(flat: Tensor) -> memoryview:
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def _aligned(numel: int) -> int:
    return math.ceil(numel / ALIGNMENT) * ALIGNMENT


def _key(name: str) -> str:
    return flat_name(name).removeprefix("text_model_")


def _positions(layout: SlotLayout) -> dict[str, int]:
    return {_key(name): position for position, name in enumerate(layout.names)}
