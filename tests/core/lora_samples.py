"""LoRA files of every naming for the tiny base model, and files that lie."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
"""A linear layer of the tiny base's UNet, 32 x 32."""
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
"""32 x 32, kernel 3x3."""
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
"""Of the tiny base's text encoder, 32 x 32."""


def noise(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Any:
    """Small random numbers."""
    return (np.random.default_rng((seed, *shape)).standard_normal(shape) * 0.1).astype(dtype)


def kohya(module: str = ATTENTION, *, rank: int = 4, alpha: float | None = 2.0, prefix: str = "lora_unet_") -> Any:
    """The tensors of one linear module under kohya's names."""
    name = prefix + module.replace(".", "_")
    tensors = {f"{name}.lora_down.weight": noise(rank, 32), f"{name}.lora_up.weight": noise(32, rank, seed=1)}
    if alpha is not None:
        tensors[f"{name}.alpha"] = np.array(alpha, dtype=np.float32)
    return tensors


def write(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> Path:
    """An honest file."""
    path.write_bytes(save(dict(tensors), metadata=metadata))
    return path


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with any header; bytes are taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
