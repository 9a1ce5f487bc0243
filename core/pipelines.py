"""Loads a prepared base model's parts. Called by the command lines and the GPU worker; keeps nothing in globals."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from core.base_facts import BaseFacts
from core.base_source import read_json
from core.errors import BaseModelError
from core.prepared_base import open_prepared
from core.quiet_libraries import quiet_libraries

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """A base model in memory, in eval mode, no parameter asking for a gradient.

    Attributes:
        facts: What its manifest says of it.
        fingerprint: Of all inputs of its preparation.
        tokenizer, text_encoder: CLIP's, of transformers.
        unet: A `diffusers.UNet2DConditionModel`.
        vae: A `diffusers.AutoencoderKL`, fp32 whatever `dtype` is.
        scheduler_config: Of the base's own scheduler; the class name under "_class_name".
        device: Where all parts lie.
        dtype: Of UNet and text encoders.
        tokenizer_2, text_encoder_2: SDXL's second pair, whose pooled output the UNet takes too; None for SD 1.x.
    """

    facts: BaseFacts
    fingerprint: str
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    # Any: to a type checker the classes of diffusers lack what they inherit from torch.nn.Module.
    unet: Any
    vae: Any
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    tokenizer_2: CLIPTokenizer | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None


def pick_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU. Initialises CUDA: never call it before a fork."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LoadedBase:
    """Load a folder written by `core.prepared_base`.

    Args:
        folder: A prepared base.
        device: Where to put it.
        dtype: Of UNet and text encoder; None is fp16 on CUDA and fp32 on the CPU.

    Raises:
        BaseModelError: The folder is not prepared, stale, or incomplete.
    """
    started = time.monotonic()
    quiet_libraries()
    prepared = open_prepared(folder)
    device = torch.device(device)
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        text_encoder = CLIPTextModel.from_pretrained(
            folder / "text_encoder", dtype=dtype, local_files_only=True, use_safetensors=True
        )
        unet = UNet2DConditionModel.from_pretrained(
            folder / "unet", dtype=dtype, local_files_only=True, use_safetensors=True
        )
        tokenizer_2 = text_encoder_2 = None
        if prepared.facts.family == "sdxl":
            tokenizer_2 = CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True)
            text_encoder_2 = CLIPTextModelWithProjection.from_pretrained(
                folder / "text_encoder_2", dtype=dtype, local_files_only=True, use_safetensors=True
            )
        vae = AutoencoderKL.from_pretrained(
            folder / "vae", dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseModelError(f"base model {folder} does not load ({error}): prepare it again") from error
    for part in (text_encoder, text_encoder_2, unet, vae):
        if part is not None:
            part.requires_grad_(False).eval().to(device)
    base = LoadedBase(
        facts=prepared.facts,
        fingerprint=prepared.fingerprint,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        vae=vae,
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        device=device,
        dtype=dtype,
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2,
    )
    assert_vae_fp32(base)
    logger.info(
        "base loaded folder=%s device=%s dtype=%s vae=own,float32 prediction=%s seconds=%.2f",
        folder.name, device, dtype, base.facts.prediction_type, time.monotonic() - started,
    )  # fmt: skip
    return base


def assert_vae_fp32(base: LoadedBase) -> None:
    """Check that no device move, LoRA load or snapshot has left the VAE in half precision.

    Raises:
        BaseModelError: Some of its weights are not fp32: pictures would come out with wrong colours.
    """
    wrong = {parameter.dtype for parameter in base.vae.parameters()} - {torch.float32}
    if wrong:
        raise BaseModelError(
            f"the VAE holds weights in {', '.join(sorted(map(str, wrong)))}, which shifts colours: "
            "move the model to its device first, then call vae.to(torch.float32)"
        )
