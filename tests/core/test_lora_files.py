"""Written LoRAs mean the same to readers that others wrote: diffusers, LyCORIS and PEFT."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from core.errors import LoraFileError
from core.lora_state import LoraLayer, LoraState
from core.lora_targets import target_modules
from core.lora_utils import (
    apply_lora,
    export_lora,
    read_lora,
    sshs_model_hash,
    verify_files_agree,
    write_kohya,
    write_peft,
)
from tests.core.training_parts import sd15_shaped_unet, trained_state, unet_output

DIM = 64
PRESETS = ["attention", "attention_ff", "all_linear", "with_conv"]


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return sd15_shaped_unet()


@pytest.fixture(scope="module")
def expected(unet: nn.Module) -> dict[str, torch.Tensor]:
    """UNet output by preset, with each module's weight changed by its delta W: no LoRA code at work."""
    outputs = {}
    for preset in PRESETS:
        changed = copy.deepcopy(unet)
        for name, layer in trained_state(unet, preset).unet.items():
            changed.get_submodule(name).weight += layer.delta()  # type: ignore[operator]
        outputs[preset] = unet_output(changed, DIM)
        assert (outputs[preset] - unet_output(unet, DIM)).abs().max() > 1e-2
    return outputs


def test_the_attention_preset_at_rank_32_has_the_tensors_of_sd15(unet: nn.Module, tmp_path: Path) -> None:
    state = trained_state(unet, "attention", rank=32, alpha=16.0)
    assert len(state.unet) == 128
    write_kohya(tmp_path / "a.safetensors", state, {})
    tensors = load_file(tmp_path / "a.safetensors")
    assert len(tensors) == 256 + 128
    modules = {key.split(".", 1)[0] for key in tensors}
    assert {key for key in tensors if key.endswith(".alpha")} == {f"{module}.alpha" for module in modules}
    assert all(tensors[f"{module}.alpha"].shape == () and tensors[f"{module}.alpha"] == 16 for module in modules)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in modules
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in modules


def test_presets_grow_from_attention_to_everything(unet: nn.Module) -> None:
    attention, with_ff, linear, conv = (set(target_modules(unet, preset)) for preset in PRESETS)  # type: ignore[arg-type]
    assert attention < with_ff < linear
    assert with_ff < conv
    assert {"mid_block.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv"} <= conv
    assert not any(name.startswith(("conv_in", "conv_out", "time_embedding")) for name in linear | conv)


@pytest.mark.parametrize("preset", PRESETS)
def test_diffusers_reads_the_kohya_file(
    preset: str, unet: nn.Module, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write_kohya(tmp_path / "a.safetensors", trained_state(unet, preset), {})
    own = copy.deepcopy(unet)
    pipeline: Any = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=own, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    torch.testing.assert_close(unet_output(own, DIM), expected[preset], atol=1e-5, rtol=0)


@pytest.mark.parametrize("preset", ["attention", "with_conv"])
def test_lycoris_reads_the_kohya_file(
    preset: str, unet: nn.Module, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    from lycoris import LycorisNetwork, create_lycoris_from_weights

    state = trained_state(unet, preset)
    write_kohya(tmp_path / "a.safetensors", state, {})
    own = copy.deepcopy(unet)
    prefix_before = LycorisNetwork.LORA_PREFIX
    LycorisNetwork.LORA_PREFIX = "lora_unet"
    try:
        network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), own)
        network.apply_to()
    finally:
        LycorisNetwork.LORA_PREFIX = prefix_before
    assert len(network.loras) == len(state.unet)
    torch.testing.assert_close(unet_output(own, DIM), expected[preset], atol=1e-5, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_peft_reads_the_folder(preset: str, unet: nn.Module, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_peft(tmp_path / "peft", trained_state(unet, preset))
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    model = PeftModel.from_pretrained(copy.deepcopy(unet), str(tmp_path / "peft"))
    torch.testing.assert_close(unet_output(model, DIM), expected[preset], atol=1e-5, rtol=0)


def test_mixed_ranks_and_alphas_reach_peft_and_ourselves(unet: nn.Module, tmp_path: Path) -> None:
    state = trained_state(unet, "attention")
    wider = trained_state(unet, "attention", rank=8, alpha=3.0)
    names = list(state.unet)
    mixed = LoraState(unet=state.unet | {name: wider.unet[name] for name in names[::3]})
    write_peft(tmp_path / "peft", mixed)
    write_kohya(tmp_path / "a.safetensors", mixed, {})
    assert verify_files_agree(mixed, tmp_path / "a.safetensors", tmp_path / "peft") < 1e-6
    with apply_lora(unet, [(mixed, 1.0)]):
        ours = unet_output(unet, DIM)
    theirs = unet_output(PeftModel.from_pretrained(copy.deepcopy(unet), str(tmp_path / "peft")), DIM)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_hashes_are_those_of_kohya(unet: nn.Module, tmp_path: Path) -> None:
    """As `precalculate_safetensors_hashes` and `addnet_hash_safetensors` of sd-scripts compute them."""
    path = tmp_path / "a.safetensors"
    write_kohya(path, trained_state(unet, "attention"), {"ss_network_dim": "4", "modelspec.title": "a"})
    data = path.read_bytes()
    content = data[8 + int.from_bytes(data[:8], "little") :]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["sshs_model_hash"] == hashlib.sha256(content).hexdigest() == sshs_model_hash(path)
    assert len(metadata["sshs_legacy_hash"]) == 8
    copy_path = tmp_path / "ss-only.safetensors"
    save_file(load_file(path), copy_path, {"ss_network_dim": "4"})
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(copy_path.read_bytes()[0x100000:0x110000]).hexdigest()[:8]


def test_equal_input_gives_equal_bytes(unet: nn.Module, tmp_path: Path) -> None:
    metadata = {f"ss_{number}": "x" for number in range(30)}
    for name in ("a", "b"):
        write_kohya(tmp_path / name, trained_state(unet, "attention"), metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_half_precision_exports_agree_with_the_rounded_weights(unet: nn.Module, tmp_path: Path) -> None:
    state = trained_state(unet, "with_conv", alpha=0.7)
    export = export_lora(state, {}, tmp_path, "half", save_dtype=torch.float16)
    kohya = export.kohya_file
    assert {tensor.dtype for key, tensor in load_file(kohya).items() if ".alpha" not in key} == {torch.float16}
    assert {path.name for path in tmp_path.iterdir()} == {"half.safetensors", "half-peft", "half-diffusers"}


def test_an_export_with_another_scale_is_not_published(unet: nn.Module, tmp_path: Path) -> None:
    state = trained_state(unet, "attention")
    export = export_lora(state, {}, tmp_path, "a")
    kohya, peft = export.kohya_file, export.peft_folder
    tensors = load_file(kohya)
    key = next(key for key in tensors if key.endswith(".alpha"))
    save_file(tensors | {key: tensors[key] * 2}, kohya)
    with pytest.raises(LoraFileError, match="changes module"):
        verify_files_agree(state, kohya, peft)
    del tensors[key], tensors[key.replace("alpha", "lora_up.weight")], tensors[key.replace("alpha", "lora_down.weight")]
    save_file(tensors, kohya)
    with pytest.raises(LoraFileError, match="other modules"):
        verify_files_agree(state, kohya, peft)


def test_not_a_number_is_neither_written_nor_read(unet: nn.Module, tmp_path: Path) -> None:
    state = trained_state(unet, "attention")
    write_kohya(tmp_path / "a.safetensors", state, {})
    name, layer = next(iter(state.unet.items()))
    layer.down[0, 0] = float("nan")
    with pytest.raises(LoraFileError, match=f"{name}.*NaN"):
        write_kohya(tmp_path / "b.safetensors", state, {})
    with pytest.raises(LoraFileError, match="NaN"):
        write_peft(tmp_path / "peft", state)
    assert not (tmp_path / "b.safetensors").exists()
    tensors = load_file(tmp_path / "a.safetensors")
    next(tensor for key, tensor in tensors.items() if "lora_up" in key)[0, 0] = float("inf")
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LoraFileError, match="NaN or infinite"):
        read_lora(tmp_path / "a.safetensors")


def test_a_missing_alpha_means_scale_one(tmp_path: Path) -> None:
    down, up = torch.ones(4, 8), torch.ones(6, 4)
    save_file({"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": up}, tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors").unet["x"].scale == 1


def test_text_encoder_layers_keep_their_own_place(tmp_path: Path) -> None:
    one, other = (LoraLayer(down=torch.ones(2, 8), up=torch.ones(6, 2), alpha=1.0) for _ in range(2))
    state = LoraState(unet={"mid.x": one}, text_encoder={"text_model.encoder.layers.0.self_attn.q_proj": other})
    write_kohya(tmp_path / "a.safetensors", state, {})
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in load_file(tmp_path / "a.safetensors")
    back = read_lora(tmp_path / "a.safetensors")
    assert list(back.unet) == ["mid.x"]
    assert list(back.text_encoder) == ["encoder.layers.0.self_attn.q_proj"]


def test_a_damaged_peft_configuration_is_refused(unet: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    write_peft(folder, trained_state(unet, "attention"))
    config = json.loads((folder / "adapter_config.json").read_text())
    for change in ({"peft_type": "IA3"}, {"modules_to_save": ["conv_in"]}, {"r": 5}):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(LoraFileError):
            read_lora(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(LoraFileError, match="cannot be read"):
        read_lora(folder)
