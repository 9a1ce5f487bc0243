"""The PEFT adapter folder (`adapter_config.json` + `adapter_model.safetensors`): written and read here.

Called by `core.lora_utils`. The format is described in peft's docs/source/developer_guides/checkpoint.md.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import LoraFileError
from core.lora_state import LoraLayer, LoraState, check_layer, plain_layers
from core.tensor_files import load_tensors, serialize, write_whole

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
MAX_CONFIG_BYTES = 4 * 1024 * 1024


def write_peft(
    folder: Path, state: LoraState, *, base_model: str = "", save_dtype: torch.dtype = torch.float32
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained(unet, folder)` opens.

    Args:
        folder: Made if absent; the weights are written first, so a folder with a configuration is complete.
        state: UNet layers under dotted names.
        base_model: Name of the base, a label.
        save_dtype: Of the tensors.

    Raises:
        LoraFileError: A layer is not finite, or the state has text-encoder layers, which need a folder of their own.
    """
    if state.text_encoder:
        raise LoraFileError("a PEFT folder describes one model: write the text encoder's layers to another folder")
    rank, alpha = _most_common(state)
    tensors: dict[str, Tensor] = {}
    for module, layer in plain_layers(state.unet).items():
        check_layer(module, layer)
        tensors[f"{PREFIX}{module}{DOWN}"] = layer.down.detach().to("cpu", save_dtype).contiguous()
        tensors[f"{PREFIX}{module}{UP}"] = layer.up.detach().to("cpu", save_dtype).contiguous()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": sorted(state.unet),
        # PEFT matches these keys as regular expressions at the end of a module's name.
        "rank_pattern": {
            _pattern(name): layer.rank for name, layer in plain_layers(state.unet).items() if layer.rank != rank
        },
        "alpha_pattern": {
            _pattern(name): layer.alpha for name, layer in plain_layers(state.unet).items() if layer.alpha != alpha
        },
    }
    write_whole(folder / WEIGHTS_NAME, serialize(tensors, {"format": "pt"}))
    write_whole(folder / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())


def read_peft(folder: Path) -> LoraState:
    """Read a PEFT folder of a UNet; module names come out dotted.

    Raises:
        LoraFileError: It is not a plain LoRA (DoRA, rsLoRA scaling is followed), damaged, or unsafe.
    """
    config = _read_config(folder / CONFIG_NAME)
    header, tensors = load_tensors(folder / WEIGHTS_NAME)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind = next((kind for kind in (DOWN, UP) if key.endswith(kind)), None)
        if kind is None or not key.startswith(PREFIX):
            raise LoraFileError(f"{folder.name}: tensor {key} is not a plain LoRA matrix of PEFT")
        parts.setdefault(key.removeprefix(PREFIX).removesuffix(kind), {})[kind] = tensor
    layers: dict[str, LoraLayer] = {}
    for module, pair in sorted(parts.items()):
        if len(pair) != 2:
            raise LoraFileError(f"{folder.name}: module {module} lacks lora_A or lora_B: export it again")
        rank = pair[DOWN].shape[0]
        alpha = float(_by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8)))
        # PEFT scales by the rank that the configuration states, so that one has to be the tensors' own.
        stated_rank = int(_by_pattern(config.get("rank_pattern") or {}, module, config.get("r", 8)))
        if stated_rank != rank:
            raise LoraFileError(f"{folder.name}: {module} has rank {rank}, its configuration says {stated_rank}")
        # rsLoRA scales by alpha / sqrt(rank); our alpha is always divided by the rank.
        alpha *= rank**0.5 if config.get("use_rslora") else 1.0
        layers[module] = LoraLayer(down=pair[DOWN], up=pair[UP], alpha=alpha)
        check_layer(f"{folder.name}: {module}", layers[module])
    return LoraState(unet=layers, metadata=header.metadata)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise LoraFileError(
                f"{path} is larger than {MAX_CONFIG_BYTES} bytes: this is not an adapter's configuration"
            )
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoraFileError(f"{path} cannot be read ({error}): a PEFT folder needs a valid {CONFIG_NAME}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise LoraFileError(f"{path} does not describe a plain LoRA (peft_type LORA without DoRA)")
    return config


def _most_common(state: LoraState) -> tuple[int, float]:
    """Rank and alpha of most modules; the others go into patterns."""
    if not state.unet:
        raise LoraFileError("this LoRA has no layers: nothing to write")
    ranks = Counter(layer.rank for layer in plain_layers(state.unet).values())
    alphas = Counter(layer.alpha for layer in plain_layers(state.unet).values())
    return ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]


def _pattern(module: str) -> str:
    return "^" + re.escape(module)


def _by_pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """PEFT's rule (a pattern matches a name or its end) for literal patterns; a stranger's regex is never run."""
    for pattern, value in patterns.items():
        literal = pattern.removeprefix("^").replace("\\", "")
        if module == literal or (not pattern.startswith("^") and module.endswith("." + literal)):
            return value
    return default
