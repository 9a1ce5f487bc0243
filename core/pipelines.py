"""Loads a prepared base model's parts. Called by the command lines and the GPU worker; keeps nothing in globals."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from core.base_conversion import PARTS
from core.base_facts import BaseFacts
from core.base_source import read_json
from core.errors import BaseModelError
from core.mapped_weights import map_model
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
    """Load a folder written by `core.prepared_base`; on the CPU weights stay pages of its files.

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
    names = [name for name in PARTS if (folder / name).is_dir()]
    tokenizers: dict[str, CLIPTokenizer | None] = {"tokenizer": None, "tokenizer_2": None}
    try:
        for name in tokenizers:
            if (folder / name).is_dir():
                tokenizers[name] = CLIPTokenizer.from_pretrained(folder / name, local_files_only=True)
        models = {
            name: map_model(PARTS[name], folder / name, dtype=torch.float32 if name == "vae" else dtype, device=device)
            for name in names
        }
    except (BaseModelError, OSError, ValueError, RuntimeError) as error:
        raise BaseModelError(f"base model {folder} does not load ({error}): prepare it again") from error
    tokenizer = tokenizers["tokenizer"]
    if tokenizer is None or not {"text_encoder", "unet", "vae"} <= models.keys():
        raise BaseModelError(f"base model {folder} is incomplete, it holds only {names}: prepare it again")
    base = LoadedBase(
        facts=prepared.facts,
        fingerprint=prepared.fingerprint,
        tokenizer=tokenizer,
        text_encoder=models["text_encoder"],
        unet=models["unet"],
        vae=models["vae"],
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        device=device,
        dtype=dtype,
        tokenizer_2=tokenizers["tokenizer_2"],
        text_encoder_2=models.get("text_encoder_2"),
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
