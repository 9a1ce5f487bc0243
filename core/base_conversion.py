"""Writes the parts of a prepared base: weights through their libraries, in final dtypes, without what is not used.

Called by `core.prepared_base`; checks nothing that `core.base_source` has checked.
"""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from core.base_source import OVERRIDES_NAME, WEIGHT_STEMS, components_of, family_of, read_json
from core.errors import BaseModelError
from core.progress import Progress, Report

PARTS: dict[str, Any] = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
}


def write_parts(paths: dict[str, Path], folder: Path, report: Report) -> None:
    """Write everything but the manifest.

    Args:
        paths: Of `core.base_source.input_files`.
        folder: Empty.
        report: Called after each part.

    Raises:
        BaseModelError: A weight file does not load or does not fit its configuration.
    """
    family = family_of(paths["model_index.json"].parent)
    index = read_json(paths["model_index.json"])
    # Safety checkers and the like are not used: null, so that diffusers does not look for them either.
    kept = (*components_of(family), "scheduler")
    parts = {name: entry for name, entry in index.items() if name in kept}
    absent: dict[str, Any] = {name: [None, None] for name in ("feature_extractor", "image_encoder")}
    if index["_class_name"] == "StableDiffusionPipeline":
        absent |= {"safety_checker": [None, None], "requires_safety_checker": False}
    elif "force_zeros_for_empty_prompt" in index:
        absent["force_zeros_for_empty_prompt"] = bool(index["force_zeros_for_empty_prompt"])
    header = {"_class_name": index["_class_name"], "_diffusers_version": version("diffusers")}
    write_json(folder / "model_index.json", header | absent | parts)
    for name, path in paths.items():
        if name.startswith(("tokenizer/", "tokenizer_2/", "scheduler/")) or name == OVERRIDES_NAME:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
    models = {name: model_class for name, model_class in PARTS.items() if name in kept}
    for step, (name, model_class) in enumerate(models.items(), start=1):
        names = (f"{name}/{WEIGHT_STEMS[name]}{ending}" for ending in (".safetensors", ".fp16.safetensors"))
        weights = next(paths[path] for path in names if path in paths)
        dtype = torch.float32 if name == "vae" else _stored_dtype(weights)
        _convert(model_class, weights, folder / name, dtype)
        report(Progress(stage=f"preparing {name}", step=step, total=len(models)))


def _convert(model_class: Any, weights: Path, destination: Path, dtype: torch.dtype) -> None:
    """Load one part through its library, which renames weights of older files, and save it in `dtype`."""
    try:
        model, info = model_class.from_pretrained(
            weights.parent,
            dtype=dtype,
            variant="fp16" if weights.name.endswith(".fp16.safetensors") else None,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(f"{weights} does not load ({error}): download the model again") from error
    lacking = sorted(info["missing_keys"])
    if lacking or info["mismatched_keys"]:
        first = lacking[0] if lacking else sorted(info["mismatched_keys"])[0]
        raise BaseModelError(f"{weights} does not fit its config.json (first: {first}): download the model again")
    model.save_pretrained(destination, safe_serialization=True, max_shard_size="100GB")


def _stored_dtype(weights: Path) -> torch.dtype:
    """The dtype of the first floating-point weight of a file."""
    try:
        with safe_open(weights, framework="pt") as file:
            names = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise BaseModelError(f"{weights} is not a safetensors file ({error}): download the model again") from error
    for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)):
        if name in names:
            return dtype
    raise BaseModelError(f"{weights} holds no weights in F32, BF16 or F16, only {sorted(names)}")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """As people like to read it."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
