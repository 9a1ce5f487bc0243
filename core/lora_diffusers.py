"""The LoRA file of diffusers, `pytorch_lora_weights.safetensors`: written here. Reading is `core.lora_file`'s.

Called by `core.lora_utils`. Names and header follow diffusers' `save_lora_weights`.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from core.adapter_config import EMBEDDED_KEY, adapter_config
from core.errors import LoraFileError
from core.lora_kohya import kohya_hashes
from core.lora_names import diffusers_module
from core.lora_state import LoraLayer, LoraState, check_layer, plain_layers
from core.tensor_files import serialize, write_whole

FILE_NAME = "pytorch_lora_weights.safetensors"


def write_diffusers(
    path: Path, state: LoraState, metadata: dict[str, str], *, save_dtype: torch.dtype = torch.float32
) -> None:
    """Write a file for `load_lora_weights`.

    The format has no alpha beside the tensors, and readers other than diffusers take it as 1.0 without looking at the
    header: the scale is folded into `lora_B`, so that every reader gets the trained strength.

    Args:
        path: Replaced in one step.
        state: What to write.
        metadata: Header strings of the training; `ss_network_alpha` becomes what the folded file has.
        save_dtype: Of the tensors.

    Raises:
        LoraFileError: A layer is not finite, or is no product of two matrices.
    """
    tensors: dict[str, Tensor] = {}
    configs: dict[str, object] = {}
    ranks: set[int] = set()
    for component, layers in state.components().items():
        folded = {diffusers_module(component, name): fold(layer) for name, layer in plain_layers(layers).items()}
        for module, layer in folded.items():
            check_layer(module, layer)
            name = f"{component}.{module}"
            tensors[f"{name}.lora_A.weight"] = layer.down.detach().to("cpu", save_dtype).contiguous()
            tensors[f"{name}.lora_B.weight"] = layer.up.detach().to("cpu", save_dtype).contiguous()
            if layer.magnitude is not None:
                tensors[f"{name}.lora_magnitude_vector"] = layer.peft_magnitude(save_dtype)
            ranks.add(layer.rank)
        if folded:
            # Versions of transformers differ in the wrapper; PEFT compares the end of a name.
            bare = {module.removeprefix("text_model."): layer for module, layer in folded.items()}
            config = adapter_config(bare)
            configs |= {f"{component}.{field}": value for field, value in config.items()}
    if not tensors:
        raise LoraFileError("this LoRA has no layers: nothing to write")
    header = {key: value for key, value in metadata.items() if key not in ("ss_network_alpha", EMBEDDED_KEY)}
    header["ss_network_alpha"] = str(max(ranks))
    header |= {"format": "pt", EMBEDDED_KEY: json.dumps(configs, indent=2, sort_keys=True)}
    write_whole(path, serialize(tensors, header | kohya_hashes(tensors, header)))


def fold(layer: LoraLayer) -> LoraLayer:
    """The same update at scale 1; exact where the scale is a power of two."""
    if layer.alpha == layer.rank:
        return layer
    return replace(layer, up=layer.up.float() * layer.scale, alpha=float(layer.rank))
