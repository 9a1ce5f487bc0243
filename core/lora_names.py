"""How each kind of LoRA file names the modules of a model: the way out of diffusers' names, by rules.

Called by the writers. The way in is `core.lora_keys`, which the web tier uses too; the two are each other's inverse.
"""

import re

from core.lora_keys import LAYERS_PER_BLOCK, SGM_PARTS, SGM_SINGLES, dotted_module, flat_module

TEXT_MODEL = "text_model"
KOHYA_TEXT_PREFIXES = {
    "sd1": {"text_encoder": "lora_te_"},
    "sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
_DIFFUSERS_PARTS = {name: part for part, name in SGM_PARTS.items()}
_DIFFUSERS_SINGLES = {name: sgm for sgm, name in SGM_SINGLES.items()}


def kohya_module(component: str, module: str, family: str) -> str:
    """A module as kohya and WebUI name it: SD 1.x by diffusers' names, SDXL's UNet by Stability's.

    Args:
        component: "unet", "text_encoder" or "text_encoder_2".
        module: Dotted or flat, in diffusers' counting.
        family: "sd1" or "sdxl".
    """
    flat = flat_module(component, module)
    if component == "unet":
        return "lora_unet_" + (diffusers_to_sgm(flat) if family == "sdxl" else flat)
    prefix = KOHYA_TEXT_PREFIXES[family].get(component, "lora_te2_")
    return prefix + (flat if flat == "text_projection" else f"{TEXT_MODEL}_{flat}")


def diffusers_module(component: str, module: str) -> str:
    """A dotted module name as diffusers and PEFT files have it; text models with the wrapper that old versions need."""
    dotted = dotted_module(flat_module(component, module)) if "." not in module else module
    if component == "unet":
        return dotted
    bare = dotted.removeprefix(f"{TEXT_MODEL}.")
    return bare if bare == "text_projection" else f"{TEXT_MODEL}.{bare}"


def diffusers_to_sgm(flat: str) -> str:
    """A flat UNet name of diffusers in Stability's counting; names that are in it already stay as they are.

    The counting is that of kohya's SDXL networks: input block 0 is `conv_in`, then each block has its layers and a
    change of size; an output block's change of size stands behind its attention.
    """
    if flat in _DIFFUSERS_SINGLES:
        return _DIFFUSERS_SINGLES[flat]
    if match := re.fullmatch(r"mid_block_(resnets|attentions)_([01])_(.+)", flat):
        kind, number, rest = match[1], int(match[2]), match[3]
        return f"middle_block_1_{rest}" if kind == "attentions" else f"middle_block_{2 * number}_{_part(rest)}"
    if match := re.fullmatch(r"(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_(.+)", flat):
        side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks_{(block + 1) * (LAYERS_PER_BLOCK + 1)}_0_op"
        if kind == "upsamplers":
            return f"output_blocks_{block * (LAYERS_PER_BLOCK + 1) + LAYERS_PER_BLOCK}_2_conv"
        number = block * (LAYERS_PER_BLOCK + 1) + layer
        name = f"input_blocks_{number + 1}" if side == "down" else f"output_blocks_{number}"
        return f"{name}_1_{rest}" if kind == "attentions" else f"{name}_0_{_part(rest)}"
    return flat


def _part(name: str) -> str:
    return _DIFFUSERS_PARTS.get(name, name)
