"""The kohya / WebUI LoRA file (SD 1.x names): written and read here, hashes included.

Called by `core.lora_utils` and `core.checkpoint`. Names, scaling and hashes follow kohya-ss/sd-scripts.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from core.errors import LoraFileError
from core.lora_state import LoraLayer, LoraState, check_layer, flat_name, plain_layers
from core.tensor_files import load_tensors, serialize, write_whole

UNET_PREFIX = "lora_unet_"
# The first is kohya's own for SD 1.x; diffusers' exporter writes the second.
TEXT_ENCODER_PREFIXES = ("lora_te_", "lora_te1_")
DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


def write_kohya(
    path: Path, state: LoraState, metadata: dict[str, str], *, save_dtype: torch.dtype = torch.float32
) -> None:
    """Write one file that kohya, WebUI, ComfyUI and diffusers read with the same strength.

    Every module gets its `.alpha`: readers agree on a present alpha divided by the rank, and on little else.

    Args:
        path: Replaced in one step; a reader never sees half a file.
        state: What to write.
        metadata: Header strings; `sshs_model_hash` and `sshs_legacy_hash` are added.
        save_dtype: Of the matrices: fp32 keeps the trained values, fp16 halves the file. Alpha stays fp32.

    Raises:
        LoraFileError: A layer has NaN or infinite values or impossible shapes.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, layers in ((UNET_PREFIX, state.unet), (TEXT_ENCODER_PREFIXES[0], state.text_encoder)):
        for module, layer in plain_layers(layers).items():
            check_layer(module, layer)
            key = prefix + flat_name(module)
            tensors[f"{key}.{DOWN}"] = layer.down.detach().to("cpu", save_dtype).contiguous()  # (rank, in[, k, k])
            tensors[f"{key}.{UP}"] = layer.up.detach().to("cpu", save_dtype).contiguous()  # (out, rank[, 1, 1])
            tensors[f"{key}.{ALPHA}"] = torch.tensor(layer.alpha, dtype=torch.float32)  # ()
    write_whole(path, serialize(tensors, metadata | _kohya_hashes(tensors, metadata)))


def read_kohya(path: Path) -> LoraState:
    """Read a kohya / WebUI file; module names come out with underscores.

    A missing `.alpha` means scale 1, as every reader has it.

    Raises:
        LoraFileError: The file is damaged, unsafe, or holds another kind of adapter (LyCORIS, DoRA, SDXL).
    """
    header, tensors = load_tensors(path)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.partition(".")
        if kind not in (DOWN, UP, ALPHA):
            raise LoraFileError(
                f"{path.name}: tensor {key} is not part of a plain LoRA (lora_down, lora_up, alpha): "
                "LyCORIS, DoRA and lora_mid files are not supported"
            )
        modules.setdefault(module, {})[kind] = tensor
    unet: dict[str, LoraLayer] = {}
    text_encoder: dict[str, LoraLayer] = {}
    for module, parts in sorted(modules.items()):
        layer = _layer(path.name, module, parts)
        te_prefix = next((prefix for prefix in TEXT_ENCODER_PREFIXES if module.startswith(prefix)), None)
        if module.startswith(UNET_PREFIX):
            unet[module.removeprefix(UNET_PREFIX)] = layer
        elif te_prefix:
            text_encoder[module.removeprefix(te_prefix)] = layer
        else:
            raise LoraFileError(f"{path.name}: module {module} is not of an SD 1.x UNet or text encoder")
    return LoraState(unet=unet, text_encoder=text_encoder, metadata=header.metadata)


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


def _layer(label: str, module: str, parts: dict[str, Tensor]) -> LoraLayer:
    missing = [kind for kind in (DOWN, UP) if kind not in parts]
    if missing:
        raise LoraFileError(f"{label}: module {module} has no {missing[0]}: the file is incomplete, export it again")
    alpha = parts.get(ALPHA)
    if alpha is not None and alpha.numel() != 1:
        raise LoraFileError(f"{label}: {module}.alpha has shape {tuple(alpha.shape)}, a single number is needed")
    down = parts[DOWN]  # (rank, in[, k, k])
    layer = LoraLayer(down=down, up=parts[UP], alpha=float(down.shape[0] if alpha is None else alpha.item()))
    check_layer(f"{label}: {module}", layer)
    return layer


def _kohya_hashes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """Both hashes that kohya computes over a copy with nothing but `ss_*` metadata (train_util.py)."""
    copy = serialize(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    content = copy[8 + int.from_bytes(copy[:8], "little") :]
    return {
        "sshs_model_hash": hashlib.sha256(content).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(copy[0x100000:0x110000]).hexdigest()[:8],
    }
