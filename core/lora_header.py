"""Reads a safetensors header inside hard limits, before any library that allocates for it sees the file.

Called by `core.lora_utils` and by the web tier on upload. Imports no ML library and never reads tensor bytes.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from core.errors import LoraFileError

# An SDXL LoRA with text encoders and convolutions has about 3,500 tensors and a header of 0.5 MiB. The reference parser
# needs 1 GiB of memory for a header of 90 MB.
MAX_HEADER_BYTES = 2 * 1024 * 1024
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 4
TENSOR_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.)){0,254}", re.ASCII)
# Integer types are for `.alpha` alone: some converters write it as int64.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}

# What people upload by mistake, or to try: by first bytes. As a length field, each would announce far too much.
PICKLE = "a pickle, which runs code when it is opened: convert it to safetensors"
OTHER_FILES = {
    b"PK\x03\x04": "a ZIP (a .ckpt or .pt file, perhaps): convert it to safetensors",
    **{
        bytes([0x80, version]) + next_byte: PICKLE
        for version in (2, 3, 4, 5)
        for next_byte in (b"}", b"c", b"\x8a", b"\x95")
    },
    b"<!DOCTYP": "a web page: the download went wrong, fetch the file itself",
    b"<html": "a web page: the download went wrong, fetch the file itself",
    b"version ": "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    b"GGUF": "a GGUF file: LoRAs are read as safetensors",
    b"\x89PNG": "a picture",
}


class TensorInfo(NamedTuple):
    """One tensor: safetensors' dtype name ("F32", "F16", "BF16" ...) and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LoraHeader:
    """What a safetensors file says of itself.

    Attributes:
        tensors: By name, in the order of the header.
        begins: First byte of each tensor, counted from `data_offset_bytes`.
        metadata: The `__metadata__` strings; data to show, never to trust.
        data_offset_bytes: Where the tensor bytes begin in the file.
    """

    tensors: dict[str, TensorInfo]
    begins: dict[str, int]
    metadata: dict[str, str]
    data_offset_bytes: int


def read_header(path: Path) -> LoraHeader:
    """Read and judge the header of a safetensors file.

    Format: https://github.com/huggingface/safetensors#format. Stricter than the reference: bounded header and tensor
    count, plain names, at most 4 dimensions, no empty tensor, no repeated key, at least one tensor.

    Raises:
        LoraFileError: Says which rule the file breaks.
    """
    try:
        with path.open("rb") as file:
            return parse_header(file, path.stat().st_size, path.name)
    except OSError as error:
        raise LoraFileError(f"{path.name} cannot be read ({error.strerror}): check that the file is there") from error


def parse_header(file: BinaryIO | IO[bytes], file_bytes: int, label: str) -> LoraHeader:
    """As `read_header`, of an open file; reads nothing behind the header.

    Args:
        file: At its beginning.
        file_bytes: Size of the whole file.
        label: Its name, for people.
    """
    text, data_offset_bytes = _header_text(file, file_bytes, label)
    header = _parse_json(text, label)
    metadata = _metadata(header.pop("__metadata__", {}), label)
    if not header:
        raise LoraFileError(f"{label} holds no tensors: export the LoRA again")
    if len(header) > MAX_TENSORS:
        raise LoraFileError(f"{label} lists {len(header)} tensors, more than {MAX_TENSORS}: this is not a LoRA")
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        tensors[name], begin, end = _tensor(name, entry, label)
        spans.append((begin, end, name))
    _check_spans(spans, file_bytes - data_offset_bytes, label)
    begins = {name: begin for begin, _, name in spans}
    return LoraHeader(tensors=tensors, begins=begins, metadata=metadata, data_offset_bytes=data_offset_bytes)


def _header_text(file: BinaryIO | IO[bytes], file_bytes: int, label: str) -> tuple[bytes, int]:
    """The header's JSON and where it ends; reads no more than MAX_HEADER_BYTES."""
    length_field = file.read(8)
    if len(length_field) < 8:
        raise LoraFileError(f"{label} is {file_bytes} bytes long, too short for a safetensors file: upload it again")
    for beginning, what in OTHER_FILES.items():
        if length_field.startswith(beginning):
            raise LoraFileError(f"{label} is {what}")
    header_bytes = int.from_bytes(length_field, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise LoraFileError(
            f"{label} announces a header of {header_bytes} bytes, more than {MAX_HEADER_BYTES}: "
            "it is not a safetensors file, or not a LoRA"
        )
    if 8 + header_bytes > file_bytes:
        raise LoraFileError(f"{label} ends inside its header ({file_bytes} bytes): it was cut off, upload it again")
    return file.read(header_bytes), 8 + header_bytes


def _parse_json(text: bytes, label: str) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise LoraFileError(f"{label} has a damaged header ({error!s:.120}): export it again") from error
    if not isinstance(header, dict) or not text.startswith(b"{"):
        raise LoraFileError(f"{label} has a header that is not a JSON object: it is not a safetensors file")
    return header


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("the same key stands twice")  # readers would disagree on which one counts
    return values


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not allowed")


def _metadata(value: object, label: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise LoraFileError(f"{label} has metadata that is not text to text: export it again")
    return value


def _tensor(name: str, entry: object, label: str) -> tuple[TensorInfo, int, int]:
    """Description, first and past-the-end data byte of one tensor."""
    if not TENSOR_NAME.fullmatch(name):
        raise LoraFileError(f"{label} has a tensor with the odd name {name!r:.80}: names are letters, digits, _ - .")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise LoraFileError(f"{label}: tensor {name} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise LoraFileError(f"{label}: tensor {name} has type {dtype!r:.40}; allowed are {', '.join(ITEM_BYTES)}")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise LoraFileError(f"{label}: tensor {name} has shape {shape!r:.80}; at most {MAX_DIMENSIONS} whole numbers")
    if 0 in shape:
        raise LoraFileError(f"{label}: tensor {name} is empty (shape {shape}): export it again")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise LoraFileError(f"{label}: tensor {name} has data_offsets {offsets!r:.80}; two whole numbers are needed")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise LoraFileError(f"{label}: tensor {name} of shape {shape} {dtype} does not fill its {end - begin} bytes")
    return TensorInfo(dtype, tuple(shape)), begin, end


def _whole_numbers(value: object) -> bool:
    # bool is an int in Python; JSON's `true` is no size.
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_spans(spans: list[tuple[int, int, str]], data_bytes: int, label: str) -> None:
    """Tensors lie end to end and fill the file: no overlap, no gap, nothing hidden behind them."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise LoraFileError(f"{label}: tensor {name} starts at byte {begin}, expected {position} (gap or overlap)")
        position = end
    if position != data_bytes:
        raise LoraFileError(
            f"{label} holds {data_bytes} data bytes but its tensors need {position}: it was cut off or has extra bytes"
        )
