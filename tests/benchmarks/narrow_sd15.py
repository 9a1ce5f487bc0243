"""Models for benchmarks: Stable Diffusion 1.5's graph at a hundredth of its weights, and at full width, both random.

Python's costs (modules, key maps, dispatch) are the same at both widths; matrix products are not.
"""

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from core.quiet_libraries import quiet_libraries
from tests.tiny_models import make_tiny_tokenizer

TEXT_DIM = 64
TOKENS = 77
NARROW: dict[str, Any] = {
    "block_out_channels": (32, 64, 128, 128),
    "cross_attention_dim": TEXT_DIM,
    "norm_num_groups": 8,
    "sample_size": 64,
}
# runwayml/stable-diffusion-v1-5, unet/config.json: the class's defaults but for these.
FULL_WIDTH: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}


def narrow_unet(seed: int = 0) -> Any:
    """Stable Diffusion 1.5's 709 modules (128 attention targets) with 8.6 M random fp32 weights; eval, no gradients."""
    quiet_libraries()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet: Any = UNet2DConditionModel(**NARROW)
    return unet.eval().requires_grad_(False)


def full_width_unet(seed: int = 0) -> Any:
    """Stable Diffusion 1.5's UNet of 860 M random fp32 weights (3.4 GB); eval, no gradients.

    Made on the meta device and filled from one block of random numbers: seconds instead of half a minute.
    """
    quiet_libraries()
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**FULL_WIDTH)
    unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
    own = torch.Generator().manual_seed(seed)
    block = torch.empty(1 << 22).uniform_(-1, 1, generator=own)  # 16 MB
    for module in unet.modules():
        for name, weight in module.named_parameters(recurse=False):
            _fill(module, name, weight.data, block)
    return unet


def narrow_text_encoder(vocabulary: int = 1000, start: int = 1, end: int = 2, seed: int = 1) -> Any:
    """CLIP's text model of 12 layers, 64 wide, random fp32 weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=TEXT_DIM,
                intermediate_size=4 * TEXT_DIM,
                num_hidden_layers=12,
                num_attention_heads=4,
                max_position_embeddings=TOKENS,
                projection_dim=TEXT_DIM,
                bos_token_id=start,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
    return model.eval().requires_grad_(False)


def narrow_vae(seed: int = 2) -> Any:
    """Stable Diffusion 1.5's VAE layout (factor 8, four levels) at a sixteenth of its width."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae: Any = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16, 32, 32),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=512,
            scaling_factor=0.18215,
        )
    return vae.eval().requires_grad_(False)


def narrow_pipeline_folder(folder: Path, *, unet: Any = None) -> Path:
    """Write an ordinary diffusers pipeline folder around the narrow UNet (or another one): 77 tokens, factor 8, PNDM.

    Args:
        folder: Where to write; must not exist.
        unet: Instead of `narrow_unet()`; needs `cross_attention_dim` 64 to be run with this text encoder.

    Returns:
        `folder`.
    """
    quiet_libraries()
    folder.mkdir(parents=True)
    make_tiny_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=TOKENS)
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler: Any = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    text_encoder = narrow_text_encoder(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    (unet or narrow_unet()).save_pretrained(folder / "unet")
    narrow_vae().save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def unet_inputs(unet: Any, rows: int = 1, side: int = 16, seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (rows, 4, side, side), timesteps (rows,), text (rows, 77, dim), all random and fp32."""
    own = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 4, side, side, generator=own)
    text = torch.randn(rows, TOKENS, unet.config.cross_attention_dim, generator=own)
    return latents, torch.linspace(900, 100, rows).long(), text


def _fill(module: nn.Module, name: str, weight: Tensor, block: Tensor) -> None:
    if isinstance(module, nn.GroupNorm | nn.LayerNorm) or name == "bias":
        weight.fill_(1.0 if name == "weight" and isinstance(module, nn.GroupNorm | nn.LayerNorm) else 0.0)
        return
    bound = 1 / math.sqrt(max(1, math.prod(weight.shape[1:])))
    flat = weight.view(-1)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        # Another stretch of the block for each tensor, so that no two layers are alike.
        shift = (weight.numel() * 7 + start) % 4093
        length = min(part.numel(), block.numel() - shift)
        torch.mul(block[shift : shift + length], bound, out=part[:length])
        if length < part.numel():
            torch.mul(block[: part.numel() - length], bound, out=part[length:])
