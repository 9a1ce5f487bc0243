"""Looks at every number of a safetensors file in blocks, without an ML library. Called by the gate.

Needs one block of memory whatever the size of the file; the same pass computes the hash of the tensor bytes.
"""

import hashlib
import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from core.errors import LoraFileError
from core.lora_header import ITEM_BYTES, LoraHeader, TensorInfo
from core.progress import Progress, Report, silent

BLOCK_BYTES = 8 << 20
# A floating-point number is NaN or infinite where all bits of its exponent are set.
EXPONENT_BITS = {"F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}


def check_values(path: Path, header: LoraHeader, report: Report = silent) -> str:
    """Refuse a file that holds NaN or infinite numbers.

    Args:
        path: The file that `header` was read from.
        header: Its tensors lie end to end, as `core.lora_header` makes sure.
        report: Called about once a block; may raise to stop.

    Returns:
        SHA-256 (hex) of the tensor bytes: kohya's `sshs_model_hash`.

    Raises:
        LoraFileError: Names the first tensor with a NaN or infinite number, or the file changed meanwhile.
    """
    digest = hashlib.sha256()
    total_bytes = path.stat().st_size - header.data_offset_bytes
    total, done_bytes = max(1, -(-total_bytes // BLOCK_BYTES)), 0
    with path.open("rb") as file:
        file.seek(header.data_offset_bytes)
        for name, tensor in tensors_in_order(header):
            for block in _blocks(file, tensor_bytes(tensor), path.name):
                digest.update(block)
                if not _all_finite(block, tensor.dtype):
                    raise LoraFileError(
                        f"{path.name}: tensor {name} holds NaN or infinite values: its training diverged, "
                        "or it was converted to a type that is too small"
                    )
                before, done_bytes = done_bytes, done_bytes + len(block)
                if before // BLOCK_BYTES != done_bytes // BLOCK_BYTES:
                    report(Progress(stage="checking values", step=done_bytes // BLOCK_BYTES, total=total))
    return digest.hexdigest()


def read_scalars(path: Path, header: LoraHeader, names: Iterable[str]) -> dict[str, float]:
    """The numbers in tensors of one element, of any type that the header allows, by name."""
    found: dict[str, float] = {}
    with path.open("rb") as file:
        for name in sorted(names, key=header.begins.__getitem__):
            tensor = header.tensors[name]
            file.seek(header.data_offset_bytes + header.begins[name])
            found[name] = decode_scalar(file.read(tensor_bytes(tensor)), tensor.dtype)
    return found


def decode_scalar(data: bytes, dtype: str) -> float:
    """The one number of these bytes (little-endian)."""
    if dtype == "BF16":  # the upper half of a float32
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    code = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}[dtype]
    return float(struct.unpack(code, data)[0])


def tensors_in_order(header: LoraHeader) -> list[tuple[str, TensorInfo]]:
    """As their bytes lie in the file, which need not be the order of the header."""
    return sorted(header.tensors.items(), key=lambda item: header.begins[item[0]])


def tensor_bytes(tensor: TensorInfo) -> int:
    """Bytes that a tensor fills."""
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def _blocks(file: BinaryIO, length: int, label: str) -> Iterator[bytes]:
    while length:
        block = file.read(min(length, BLOCK_BYTES))
        if not block:
            raise LoraFileError(f"{label} ends before its tensors do: it changed while it was read")
        length -= len(block)
        yield block


def _all_finite(block: bytes, dtype: str) -> bool:
    if dtype not in EXPONENT_BITS:
        return True
    # Not at the top: web machines judge headers with this module's neighbours and have no numpy.
    import numpy as np

    # BLOCK_BYTES is a multiple of every item's size, and so is a tensor's length.
    bits = np.frombuffer(block, dtype=f"<u{ITEM_BYTES[dtype]}")
    exponent = bits.dtype.type(EXPONENT_BITS[dtype])
    return not bool(((bits & exponent) == exponent).any())
