"""SD 1.x and SDXL LoRAs reach foreign readers with their strength, and what those write reaches us."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.errors import LoraFileError
from core.lora_keys import sgm_to_diffusers
from core.lora_names import diffusers_to_sgm
from core.lora_state import LoraLayer, LoraState
from core.lora_targets import target_modules
from core.lora_utils import export_lora, read_lora, write_diffusers, write_kohya

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def sdxl_unet() -> nn.Module:
    """SDXL's module tree, a tenth as wide and with shallower transformers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet: Any = UNet2DConditionModel(
            block_out_channels=(16, 32, 64), layers_per_block=2, norm_num_groups=8, sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2), attention_head_dim=(2, 4, 8), cross_attention_dim=48,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        )  # fmt: skip
    unet.eval().requires_grad_(False)
    narrow: nn.Module = unet
    return narrow


def random_state(unet: nn.Module, preset: Any = "with_conv", alpha: float = 3.0) -> LoraState:
    source = torch.Generator().manual_seed(1)
    layers = {}
    for number, name in enumerate(target_modules(unet, preset)):
        weight = unet.get_submodule(name).get_parameter("weight")
        rank = 2 + number % 2
        kernel = [1] * (weight.dim() - 2)
        layers[name] = LoraLayer(
            down=torch.randn(rank, *weight.shape[1:], generator=source),
            up=torch.randn(weight.shape[0], rank, *kernel, generator=source) * 0.1,
            alpha=alpha,
        )
    return LoraState(unet=layers, metadata={"ss_base_model_version": "sdxl_base_v1-0"})


def fused(pipeline_unet: Any) -> Weights:
    """The weights after a foreign reader merged its LoRA."""
    pipeline_unet.fuse_lora()
    return {
        name.replace(".base_layer", ""): value.detach().clone()
        for name, value in pipeline_unet.named_parameters()
        if ".lora_" not in name
    }


def assert_moved_by(before: nn.Module, after: Weights, state: LoraState) -> None:
    for name, weight in before.named_parameters():
        layer = state.unet.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        expected = weight if layer is None else weight + layer.delta()
        torch.testing.assert_close(after[name], expected.reshape(after[name].shape), atol=2e-5, rtol=1e-5)


def pipeline_of(unet: nn.Module) -> Any:
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=copy.deepcopy(unet), scheduler=None,
    )  # fmt: skip


def test_sdxl_files_of_all_three_formats_mean_the_same_to_their_readers(sdxl_unet: nn.Module, tmp_path: Path) -> None:
    state = random_state(sdxl_unet)
    export = export_lora(state, {"ss_base_model_version": "sdxl_base_v1-0"}, tmp_path, "xl")
    keys = load_file(export.kohya_file).keys()
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha" in keys
    assert not any("down_blocks" in key or "up_blocks" in key for key in keys)
    for file in (export.kohya_file, export.diffusers_file):
        pipeline = pipeline_of(sdxl_unet)
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        assert_moved_by(sdxl_unet, fused(pipeline.unet), state)
    merged: Any = PeftModel.from_pretrained(copy.deepcopy(sdxl_unet), str(export.peft_folder)).merge_and_unload()
    assert_moved_by(sdxl_unet, dict(merged.named_parameters()), state)


def test_names_of_sdxl_go_there_and_back(sdxl_unet: nn.Module) -> None:
    for name in target_modules(sdxl_unet, "with_conv"):
        flat = name.replace(".", "_")
        assert sgm_to_diffusers(diffusers_to_sgm(flat)) == flat
        assert diffusers_to_sgm(flat) != flat


@pytest.mark.parametrize("with_metadata", [True, False])
def test_what_diffusers_saves_is_read_with_equal_effect(
    with_metadata: bool, sdxl_unet: nn.Module, tmp_path: Path
) -> None:
    state = random_state(sdxl_unet, "attention")
    layers: Weights = {}
    for name, layer in state.unet.items():
        assert isinstance(layer, LoraLayer)
        layers |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
    ranks = {name: layer.rank for name, layer in state.unet.items() if isinstance(layer, LoraLayer)}
    metadata = {"r": 2, "lora_alpha": 3.0, "rank_pattern": ranks, "target_modules": sorted(ranks)}
    extra: Any = {"unet_lora_adapter_metadata": metadata} if with_metadata else {}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **extra)
    back = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert bool(back.notes) is not with_metadata
    for name, layer in state.unet.items():
        assert isinstance(layer, LoraLayer)
        strength = 1.0 if with_metadata else layer.rank / layer.alpha
        torch.testing.assert_close(back.unet[name].delta(), layer.delta() * strength)


def test_diffusers_own_conversion_to_kohya_is_read(sdxl_unet: nn.Module, tmp_path: Path) -> None:
    state = random_state(sdxl_unet, "attention")
    layers: Weights = {}
    for name, layer in state.unet.items():
        assert isinstance(layer, LoraLayer)
        layers |= {f"unet.{name}.lora_A.weight": layer.down, f"unet.{name}.lora_B.weight": layer.up}
    save_file(convert_state_dict_to_kohya(layers), tmp_path / "a.safetensors")
    back = read_lora(tmp_path / "a.safetensors")
    for name, layer in state.unet.items():
        assert isinstance(layer, LoraLayer)
        torch.testing.assert_close(back.unet[name].delta(), layer.delta() * layer.rank / layer.alpha)


def test_the_text_encoders_of_sdxl_have_their_own_prefixes(tmp_path: Path) -> None:
    one, other = (LoraLayer(down=torch.full((2, 8), n), up=torch.ones(6, 2), alpha=1.0) for n in (1.0, 2.0))
    name = "encoder.layers.0.self_attn.q_proj"
    state = LoraState(unet={}, text_encoder={name: one}, text_encoder_2={name: other})
    write_kohya(tmp_path / "a.safetensors", state, {})
    write_diffusers(tmp_path / "b.safetensors", state, {})
    flat = "text_model_encoder_layers_0_self_attn_q_proj"
    assert {f"lora_te1_{flat}.alpha", f"lora_te2_{flat}.alpha"} <= load_file(tmp_path / "a.safetensors").keys()
    for file in ("a", "b"):
        back = read_lora(tmp_path / f"{file}.safetensors")
        assert torch.equal(back.text_encoder[name].delta(), one.delta())
        assert torch.equal(back.text_encoder_2[name].delta(), other.delta())


def test_two_ways_of_counting_blocks_in_one_file_are_refused(tmp_path: Path) -> None:
    tensors = {}
    for module in ("input_blocks_4_1_proj_in", "down_blocks_1_attentions_1_proj_in"):
        tensors[f"lora_unet_{module}.lora_down.weight"] = torch.ones(2, 8)
        tensors[f"lora_unet_{module}.lora_up.weight"] = torch.ones(8, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LoraFileError, match="input_blocks_4_1_proj_in"):
        read_lora(tmp_path / "a.safetensors")


def test_loha_and_lokr_have_the_update_that_lycoris_computes(tmp_path: Path) -> None:
    from lycoris.functional.loha import diff_weight as loha
    from lycoris.functional.lokr import diff_weight as lokr

    torch.manual_seed(0)
    a1, b1, a2, b2 = (torch.randn(*shape) for shape in ((6, 2), (2, 8), (6, 2), (2, 8)))
    w1, w2 = torch.randn(2, 4), torch.randn(3, 2)
    tensors = {
        "lora_unet_x.hada_w1_a": a1, "lora_unet_x.hada_w1_b": b1, "lora_unet_x.hada_w2_a": a2,
        "lora_unet_x.hada_w2_b": b2, "lora_unet_x.alpha": torch.tensor(1.0),
        "lora_unet_y.lokr_w1": w1, "lora_unet_y.lokr_w2": w2, "lora_unet_y.alpha": torch.tensor(7.0),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    back = read_lora(tmp_path / "a.safetensors").unet
    torch.testing.assert_close(back["x"].delta(), loha(b1, a1, b2, a2, None, None, gamma=0.5))
    torch.testing.assert_close(back["y"].delta(), lokr(w1, None, None, w2, None, None, None))
