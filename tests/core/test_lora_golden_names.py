"""The names in kohya files of true SD 1.5 and SDXL UNets, against lists that are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from core.lora_names import kohya_module
from core.lora_state import LoraLayer, LoraState
from core.lora_targets import target_modules
from core.lora_utils import write_kohya

GOLDEN = Path(__file__).parent / "golden"
SD15 = {"cross_attention_dim": 768}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def unet_of(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize(("family", "config"), [("sd1", SD15), ("sdxl", SDXL)])
def test_the_names_are_those_that_are_kept(family: str, config: dict[str, Any]) -> None:
    names = [kohya_module("unet", name, family) for name in target_modules(unet_of(config), "with_conv")]
    assert sorted(names) == (GOLDEN / f"{family}_kohya_modules.txt").read_text().split()


def test_sd15_attention_at_rank_32_and_alpha_64_has_384_tensors(tmp_path: Path) -> None:
    unet = unet_of(SD15)
    layers = {}
    for name in target_modules(unet, "attention"):
        out, inputs = unet.get_submodule(name).weight.shape
        layers[name] = LoraLayer(down=torch.ones(32, inputs), up=torch.ones(out, 32), alpha=64.0)
    write_kohya(tmp_path / "a.safetensors", LoraState(unet=layers), {}, save_dtype=torch.float16)
    tensors = load_file(tmp_path / "a.safetensors")
    alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
    assert (len(tensors), len(alphas)) == (256 + 128, 128)
    assert {float(alpha) for alpha in alphas} == {64.0}
