"""A random-weight Stable Diffusion 1 pipeline folder that is made in under a second and runs in milliseconds.

Called by the fixtures of every test that needs a model; nothing is downloaded.
"""

import json
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=text_layers,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                projection_dim=32,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                # The default 0.02 leaves prompts nearly alike after 3 narrow layers; tests need them to differ.
                initializer_range=0.2,
                initializer_factor=5.0,
            )
        )
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
        vae = diffusers.AutoencoderKL(
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=NATIVE_SIZE_PX,
            scaling_factor=0.18215,
        )
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
