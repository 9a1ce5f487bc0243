"""Random-weight Stable Diffusion 1 and SDXL pipeline folders that are made in under a second and run in milliseconds.

Called by the fixtures of every test that needs a model; nothing is downloaded.
"""

import json
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from core.quiet_libraries import quiet_libraries

WORDS = ("a", "red", "blue", "green", "apple", "cat", "house", "picture", "of", "style")
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 24
VAE_FACTOR = 4
BUCKET_STEP_PX = 8
NATIVE_SIZE_PX = 64


def _byte_symbols() -> list[str]:
    """The 256 printable characters by which byte-level BPE writes bytes (OpenAI CLIP's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def make_tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a CLIP tokenizer in which each of `WORDS` is one token and any other text is spelt by its bytes."""
    merges: Any = []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
    letters = _byte_symbols()
    joined = list(dict.fromkeys(left + right for left, right in merges))
    tokens = [*letters, *(letter + "</w>" for letter in letters), *joined, START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merge_lines = "\n".join(f"{left} {right}" for left, right in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merge_lines}\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_tiny_pipeline(
    folder: Path,
    *,
    seed: int = 0,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    addition_embed_type: Literal["text"] | None = None,
    text_layers: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an SD1 pipeline folder: 64 px pictures, VAE factor 4, bucket step 8, 24 tokens, scheduler PNDM.

    Args:
        folder: Where to write; must not exist.
        seed: Of the random weights.
        prediction_type: What the scheduler's configuration says the UNet predicts.
        addition_embed_type: "text" for a UNet that also pools `encoder_hidden_states`, as the demo base does.
        text_layers: Layers of the text encoder; 3 makes clip skip 1, 2 and 3 three different things.
        dtype: Of UNet and text encoder as saved; the VAE is saved in fp32.

    Returns:
        `folder`.
    """
    quiet_libraries()
    folder.mkdir(parents=True)
    tokenizer = make_tiny_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(_text_config(tokenizer, text_layers))
        unet = diffusers.UNet2DConditionModel(
            sample_size=NATIVE_SIZE_PX // VAE_FACTOR,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=32,
            norm_num_groups=8,
            addition_embed_type=addition_embed_type,
            addition_embed_type_num_heads=4,
        )
        vae = _tiny_vae(0.18215)
    # Stable Diffusion 1.5's own scheduler configuration.
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    parts: dict[str, Any] = {"text_encoder": text_encoder, "unet": unet, "vae": vae, "scheduler": scheduler}
    for name, part in parts.items():
        if name in ("text_encoder", "unet"):
            part.to(dtype)
        part.save_pretrained(folder / name)
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


def make_tiny_sdxl_pipeline(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write an SDXL pipeline folder: 64 px pictures, VAE factor 4, bucket step 8, 24 tokens, scheduler Euler.

    Args:
        folder: Where to write; must not exist.
        seed: Of the random weights.
        dtype: Of UNet and text encoders as saved; the VAE is saved in fp32.

    Returns:
        `folder`.
    """
    quiet_libraries()
    folder.mkdir(parents=True)
    tokenizer = make_tiny_tokenizer(folder / "tokenizer")
    make_tiny_tokenizer(folder / "tokenizer_2")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(_text_config(tokenizer, 3))
        text_encoder_2 = CLIPTextModelWithProjection(_text_config(tokenizer, 4, hidden_size=48, projection_dim=40))
        unet = diffusers.UNet2DConditionModel(
            sample_size=NATIVE_SIZE_PX // VAE_FACTOR,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(4, 8),
            cross_attention_dim=32 + 48,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=40 + 6 * 8,
            norm_num_groups=8,
        )
        vae = _tiny_vae(0.13025)
    # SDXL's own scheduler configuration.
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=False,
    )
    parts: dict[str, Any] = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "unet": unet}
    for name, part in (parts | {"vae": vae, "scheduler": scheduler}).items():
        if name in parts:
            part.to(dtype)
        part.save_pretrained(folder / name)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": True,
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def _text_config(
    tokenizer: CLIPTokenizer, layers: int, *, hidden_size: int = 32, projection_dim: int = 32
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=projection_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # The default 0.02 leaves prompts nearly alike after 3 narrow layers; tests need them to differ.
        initializer_range=0.2,
        initializer_factor=5.0,
    )


def _tiny_vae(scaling_factor: float) -> Any:
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=NATIVE_SIZE_PX,
        scaling_factor=scaling_factor,
    )
