"""Small datasets and UNets for the training tests; nothing is downloaded or trained here."""

import copy
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import nn

from core.config import PreprocessConfig
from core.lora_modules import inject_lora
from core.lora_state import LoraState
from core.lora_targets import target_modules
from core.manifest import DatasetManifest, PreparedDataset, PreparedImage
from core.train_config import TrainConfig

SQUARE = (32, 32)
WIDE = (48, 24)


def make_dataset(
    folder: Path, sizes: list[tuple[int, int]] | None = None, caption: str = "a red cat"
) -> PreparedDataset:
    """Pictures of random colour blocks, one per size, with different captions."""
    folder.mkdir(parents=True, exist_ok=True)
    images, files = [], {}
    for number, (width, height) in enumerate(sizes or [SQUARE] * 4 + [WIDE] * 2):
        blocks = np.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=np.uint8)
        picture = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
        data = io.BytesIO()
        picture.save(data, format="PNG")
        sha256 = hashlib.sha256(data.getvalue()).hexdigest()
        files[sha256] = folder / f"{sha256}.png"
        files[sha256].write_bytes(data.getvalue())
        images.append(
            PreparedImage(
                sha256=sha256,
                source_sha256=sha256,
                name=f"{number}.png",
                width=width,
                height=height,
                caption=f"{caption}, style {number % 3}",
            )
        )
    manifest = DatasetManifest(config=PreprocessConfig(resolution=32, bucket_step_px=8), images=tuple(images))
    return PreparedDataset(manifest=manifest, files=files)


def quick_config(**changes: object) -> TrainConfig:
    """A training of a few seconds."""
    values: dict[str, object] = {
        "rank": 4,
        "alpha": 2.0,
        "targets": "attention",
        "steps": 8,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "checkpoint_every_steps": 3,
        "caption_dropout": 0.3,
        "seed": 7,
    }
    return TrainConfig.parse(values | changes)


def sd15_shaped_unet() -> nn.Module:
    """SD 1.5's module tree, 1/10 as wide."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet: Any = UNet2DConditionModel(
            block_out_channels=(32, 64, 128, 128), cross_attention_dim=64, norm_num_groups=8, sample_size=8
        )
    unet.eval().requires_grad_(False)
    narrow: nn.Module = unet
    return narrow


def trained_state(unet: nn.Module, targets: str, *, rank: int = 4, alpha: float = 2.0) -> LoraState:
    """A LoRA for a UNet as after some training (both matrices filled), and that UNet's copy stays untouched."""
    weights = inject_lora(copy.deepcopy(unet), rank, alpha, target_modules(unet, targets), seed=1)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    for up in weights.up.values():
        up.data.normal_(std=0.05, generator=generator)
    return weights.state()


@torch.no_grad()
def unet_output(unet: nn.Module, dim: int) -> torch.Tensor:
    """One fixed forward pass of two samples: (2, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 7, dim, generator=generator)
    output: torch.Tensor = unet(latents, torch.tensor([3, 500]), encoder_hidden_states=text).sample
    return output
