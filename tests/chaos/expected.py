"""The arithmetic of the fake trainer and pipeline, and of uploads: which bytes each job must end with. Pure functions.

The fakes and the workload compute with them, the auditor checks against them; nothing here comes from the product.
"""

import hashlib
import json
import struct
import zlib

SIDE_PX = 32
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
LAYER_WIDTH = 32
RANK = 2


def chain_start(seed: int, steps: int, lora_name: str) -> str:
    """State before the first step, hex."""
    return hashlib.sha256(f"{seed}/{steps}/{lora_name}".encode()).hexdigest()


def chain_next(state: str, step: int) -> str:
    """State after step number `step` (0-based), hex: a wrong, doubled or left-out step changes everything after it."""
    return hashlib.sha256(f"{state}/{step}".encode()).hexdigest()


def chain(seed: int, steps: int, lora_name: str, after: int) -> str:
    """State after `after` steps, hex."""
    state = chain_start(seed, steps, lora_name)
    for step in range(after):
        state = chain_next(state, step)
    return state


def kohya_bytes(state: str) -> bytes:
    """The LoRA file that a final state ends as."""
    return b"fake kohya file\n" + state.encode() * 8


def adapter_bytes(state: str) -> bytes:
    """The adapter file of the PEFT folder."""
    return b"fake adapter\n" + state.encode() * 4


def picture_bytes(prompt: str, seed: int) -> bytes:
    """A real PNG (RGB, 32x32) whose pixels follow from prompt and seed."""
    rows = []
    for y in range(SIDE_PX):
        digest = hashlib.sha256(f"{prompt}/{seed}/{y}".encode()).digest()
        rows.append(b"\0" + (digest * 3)[: SIDE_PX * 3])
    header = struct.pack(">IIBBBBB", SIDE_PX, SIDE_PX, 8, 2, 0, 0, 0)
    data = zlib.compress(b"".join(rows), 1)
    return b"\x89PNG\r\n\x1a\n" + _part(b"IHDR", header) + _part(b"IDAT", data) + _part(b"IEND", b"")


def uploaded_bytes(seed: int) -> bytes:
    """A real kohya LoRA file of one layer, float32, whose numbers follow from the seed."""
    count = RANK * LAYER_WIDTH
    digests = b"".join(hashlib.sha256(f"upload/{seed}/{part}".encode()).digest() for part in range(2 * count // 32))
    layer = f"lora_unet_{LAYER.replace('.', '_')}"
    shapes = {f"{layer}.lora_down.weight": [RANK, LAYER_WIDTH], f"{layer}.lora_up.weight": [LAYER_WIDTH, RANK]}
    return _safetensors(shapes, struct.pack(f"<{2 * count}f", *(byte / 255 - 0.5 for byte in digests)))


def base_weights() -> bytes:
    """The weights file of a base that has this one layer, all zero."""
    return _safetensors({f"{LAYER}.weight": [LAYER_WIDTH, LAYER_WIDTH]}, bytes(4 * LAYER_WIDTH * LAYER_WIDTH))


def sha256(content: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(content).hexdigest()


def _safetensors(shapes: dict[str, list[int]], numbers: bytes) -> bytes:
    """Float32 tensors one after the other: length of the header, header, numbers."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + numbers


def _part(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
