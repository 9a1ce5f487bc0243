"""The kohya / WebUI LoRA file of SD 1.x and SDXL: written here, hashes included. Reading is `core.lora_file`'s.

Called by `core.lora_utils` and `core.checkpoint`. Names, scaling and hashes follow kohya-ss/sd-scripts.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from core.errors import LoraFileError
from core.lora_keys import PARTS
from core.lora_lycoris import LycorisUpdate
from core.lora_names import kohya_module
from core.lora_state import LoraLayer, LoraState, ModuleUpdate, check_layer
from core.tensor_files import serialize, write_whole

DOWN, UP, ALPHA, MAGNITUDE = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
FILE_PARTS = {part: ending for ending, part in PARTS.items()}


def write_kohya(
    path: Path,
    state: LoraState,
    metadata: dict[str, str],
    *,
    save_dtype: torch.dtype = torch.float32,
    family: str | None = None,
) -> None:
    """Write one file that kohya, WebUI, ComfyUI and diffusers read with the same strength.

    Every module gets its `.alpha`: readers agree on a present alpha divided by the rank, and on little else.

    Args:
        path: Replaced in one step; a reader never sees half a file.
        state: What to write.
        metadata: Header strings; `sshs_model_hash` and `sshs_legacy_hash` are added.
        save_dtype: Of the matrices: fp32 keeps the trained values, fp16 halves the file. Alpha stays fp32.
        family: "sd1" or "sdxl", which decides the names; None: as `family_of` finds it.

    Raises:
        LoraFileError: A layer has NaN or infinite values or impossible shapes, or is of a kind without a kohya name.
    """
    family = family or family_of(state, metadata)
    tensors: dict[str, Tensor] = {}
    taken: set[str] = set()
    for component, layers in state.components().items():
        for module, layer in layers.items():
            key = kohya_module(component, module, family)
            if key in taken:
                raise LoraFileError(f"two layers of this LoRA are called {key} in a kohya file ({module})")
            taken.add(key)
            for part, tensor in _parts(module, layer, save_dtype).items():
                tensors[f"{key}.{part}"] = tensor
    write_whole(path, serialize(tensors, metadata | kohya_hashes(tensors, metadata)))


def _parts(module: str, layer: ModuleUpdate, save_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one module by what follows its name; alpha in fp32."""
    if isinstance(layer, LycorisUpdate):
        parts = {FILE_PARTS[part]: tensor.detach() for part, tensor in layer.parts.items()}
        # A kind without a rank has no use for an alpha, but readers that want one are content with 1.
        alpha = layer.scale * (layer.rank or 1)
        if layer.magnitude is not None:
            parts[MAGNITUDE] = layer.magnitude.detach()
    elif isinstance(layer, LoraLayer):
        check_layer(module, layer)
        parts, alpha = {DOWN: layer.down.detach(), UP: layer.up.detach()}, layer.alpha
        if layer.magnitude is not None:
            parts[MAGNITUDE] = layer.written_magnitude(save_dtype)  # (out, 1[, 1, 1])
    else:
        raise LoraFileError(f"{module} is a {type(layer).__name__}, for which kohya's files have no name")
    written = {part: tensor.to("cpu", save_dtype).contiguous() for part, tensor in parts.items()}
    return written | {ALPHA: torch.tensor(alpha, dtype=torch.float32)}


def family_of(state: LoraState, metadata: dict[str, str] | None = None) -> str:
    """ "sdxl" or "sd1": by the header's `ss_base_model_version`, by layers that SDXL alone has, by the text's width."""
    told = ((metadata or {}).get("ss_base_model_version") or state.metadata.get("ss_base_model_version", "")).lower()
    if told.startswith("sdxl"):
        return "sdxl"
    names = {module.replace(".", "_") for module in state.unet}
    # SD 1.x has one transformer block a place, and no conditions beside text and time.
    only_sdxl = any("transformer_blocks_1_" in name or name.startswith("add_embedding") for name in names)
    widths = {layer.shape[1] for name, layer in state.unet.items() if name.endswith(("attn2.to_k", "attn2_to_k"))}
    return "sdxl" if not told and (state.text_encoder_2 or only_sdxl or widths == {2048}) else "sd1"


def sshs_model_hash(path: Path) -> str:
    """SHA-256 (64 hex digits) of the tensor bytes alone, so that editing metadata keeps a LoRA's identity.

    Same as kohya's `addnet_hash_safetensors`; WebUI shows its first 12 digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def kohya_hashes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """Both hashes that kohya computes over a copy with nothing but `ss_*` metadata (train_util.py)."""
    copy = serialize(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    content = copy[8 + int.from_bytes(copy[:8], "little") :]
    return {
        "sshs_model_hash": hashlib.sha256(content).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(copy[0x100000:0x110000]).hexdigest()[:8],
    }
