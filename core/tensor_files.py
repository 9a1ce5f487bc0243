"""Safetensors files as bytes: reproducible headers, writes that are whole or absent, bounded reads.

Called by the LoRA readers and writers and by checkpoints; knows nothing of what the tensors mean.
"""

import json
import os
import uuid
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from core.durable_folder import sync_folder
from core.errors import LoraFileError
from core.failpoints import side_effect
from core.lora_header import LoraHeader, read_header


def serialize(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file of contiguous CPU tensors.

    The library writes metadata in the order of a randomly seeded hash map; sorted keys make equal input equal bytes.
    """
    data = safetensors.torch.save(tensors)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if metadata:
        header = {"__metadata__": dict(sorted(metadata.items()))} | header
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensor bytes start at a multiple of 8, as the format asks
    return len(text).to_bytes(8, "little") + text + data[end:]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is never seen half: temporary name, fsync, rename, fsync of the folder."""
    with side_effect("file.make_folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with partial.open("wb") as file:
            with side_effect("file.write"):
                file.write(data)
                file.flush()
            with side_effect("file.fsync"):
                os.fsync(file.fileno())
        with side_effect("file.rename"):
            partial.replace(path)
    finally:
        with side_effect("file.drop_partial"):
            partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def load_tensors(path: Path) -> tuple[LoraHeader, dict[str, Tensor]]:
    """Header and tensors (on the CPU) of a safetensors file, the header judged first.

    Raises:
        LoraFileError: The file breaks a rule of `core.lora_header` or does not load.
    """
    header = read_header(path)
    try:
        return header, safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise LoraFileError(f"{path.name} does not load ({error}): export or upload it again") from error
