"""The PEFT adapter folder (`adapter_config.json` + `adapter_model.safetensors`): written and read here.

Called by `core.lora_utils`. The format is described in peft's docs/source/developer_guides/checkpoint.md; text encoders
have folders of their own in it, since a PEFT folder describes one model.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from core.adapter_config import CONFIG_NAME, adapter_config, read_adapter_config
from core.errors import LoraFileError
from core.lora_file import Groups, group_tensors, state_of
from core.lora_names import diffusers_module
from core.lora_state import LoraState, check_layer, plain_layers
from core.tensor_files import load_tensors, serialize, write_whole

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
TEXT_FOLDERS = ("text_encoder", "text_encoder_2")

__all__ = ["CONFIG_NAME", "PREFIX", "WEIGHTS_NAME", "read_peft", "write_peft"]


def write_peft(
    folder: Path, state: LoraState, *, base_model: str = "", save_dtype: torch.dtype = torch.float32
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained(unet, folder)` opens.

    Args:
        folder: Made if absent; the weights are written first, so a folder with a configuration is complete. Layers of
            text encoders go to `text_encoder/` and `text_encoder_2/` in it, each a PEFT folder.
        state: What to write.
        base_model: Name of the base, a label.
        save_dtype: Of the tensors.

    Raises:
        LoraFileError: A layer is not finite, is no product of two matrices, or there are none.
    """
    if not any(state.components().values()):
        raise LoraFileError("this LoRA has no layers: nothing to write")
    for component, layers in state.components().items():
        if not layers:
            continue
        target = folder if component == "unet" else folder / component
        named = {_module(component, module): layer for module, layer in plain_layers(layers).items()}
        tensors: dict[str, Tensor] = {}
        for module, layer in named.items():
            check_layer(module, layer)
            tensors[f"{PREFIX}{module}{DOWN}"] = layer.down.detach().to("cpu", save_dtype).contiguous()
            tensors[f"{PREFIX}{module}{UP}"] = layer.up.detach().to("cpu", save_dtype).contiguous()
            if layer.magnitude is not None:
                tensors[f"{PREFIX}{module}{MAGNITUDE}"] = layer.peft_magnitude(save_dtype)
        config = adapter_config(named, base_model)
        write_whole(target / WEIGHTS_NAME, serialize(tensors, {"format": "pt"}))
        write_whole(target / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())


def read_peft(folder: Path) -> LoraState:
    """Read a PEFT folder of a UNet, of text encoders, or of both as `write_peft` lays them out.

    `rank_pattern`, `alpha_pattern`, `use_rslora` and `use_dora` are followed.

    Raises:
        LoraFileError: It is no LoRA, damaged, or unsafe.
    """
    parts = {"unet": folder} | {name: folder / name for name in TEXT_FOLDERS}
    found = {component: part for component, part in parts.items() if (part / CONFIG_NAME).is_file()}
    if not found:
        read_adapter_config(folder / CONFIG_NAME)  # raises with the reason
    groups: Groups = {}
    configs = {}
    for component, part in found.items():
        configs[component] = read_adapter_config(part / CONFIG_NAME)
        header, tensors = load_tensors(part / WEIGHTS_NAME)
        modules, naming = group_tensors(part.name, tensors)
        if naming != "peft" or modules.keys() != {"unet"}:
            raise LoraFileError(f"{part.name}: tensor {next(iter(tensors))} is not named as PEFT names them")
        own = modules["unet"]
        if component == "unet" and all(module.startswith(("text_model.", "encoder.layers.")) for module in own):
            component = "text_encoder"  # a folder made of a text encoder alone
            configs[component] = configs["unet"]
        groups[component] = {module.removeprefix("text_model."): tensors for module, tensors in own.items()}
    return state_of(
        folder.name, groups, header, lambda component, module, rank: configs[component].alpha_of(module, rank)
    )


def _module(component: str, module: str) -> str:
    """As diffusers and transformers name it: the first text encoder without a wrapper, SDXL's second with one."""
    name = diffusers_module(component, module)
    return name.removeprefix("text_model.") if component == "text_encoder" else name
