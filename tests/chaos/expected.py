"""The arithmetic of the fake trainer and pipeline: which bytes each job must end with. Pure functions.

The fakes compute with them, the auditor checks against them; nothing here comes from the product.
"""

import hashlib
import struct
import zlib

SIDE_PX = 32


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


def sha256(content: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(content).hexdigest()


def _part(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
