"""Weights are pages of their files: nothing is copied, nobody can change the files, and the results are the same."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from core.errors import BaseModelError
from core.file_hash import hash_file
from core.mapped_weights import map_model
from core.pipelines import LoadedBase, load_base

CPU = torch.device("cpu")
CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mapped_model_is_the_one_that_the_library_loads(
    name: str, dtype: torch.dtype, tiny_sdxl_base_folder: Path
) -> None:
    ours = map_model(CLASSES[name], tiny_sdxl_base_folder / name, dtype=dtype, device=CPU)
    theirs = CLASSES[name].from_pretrained(tiny_sdxl_base_folder / name, dtype=dtype)

    expected = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    found = dict(ours.named_parameters()) | dict(ours.named_buffers())
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    assert not any(module.training for module in ours.modules())
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_a_write_into_a_weight_never_reaches_the_file_or_another_model(tiny_base_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base_folder / "unet", tmp_path / "unet"))
    path = folder / "diffusion_pytorch_model.safetensors"
    before = hash_file(path)
    first = map_model(UNet2DConditionModel, folder, dtype=torch.float32, device=CPU)
    second = map_model(UNet2DConditionModel, folder, dtype=torch.float32, device=CPU)

    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()

    assert hash_file(path) == before
    assert all(torch.equal(second.get_parameter(key), weight) for key, weight in load_file(path).items())


def test_a_file_may_be_removed_while_its_model_lives(tiny_base_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base_folder / "vae", tmp_path / "vae"))
    kept = load_file(tiny_base_folder / "vae" / "diffusion_pytorch_model.safetensors")
    vae = map_model(AutoencoderKL, folder, dtype=torch.float32, device=CPU)
    shutil.rmtree(folder)

    assert all(torch.equal(vae.get_parameter(key), weight) for key, weight in kept.items())


def test_weights_are_mapped_and_not_copied(tiny_base_folder: Path) -> None:
    path = tiny_base_folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet = map_model(UNet2DConditionModel, tiny_base_folder / "unet", dtype=torch.float32, device=CPU)

    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]

    assert all(any(low <= weight.data_ptr() < high for low, high in ranges) for weight in unet.parameters())


def test_models_of_one_skeleton_share_no_module_hook_or_place(tiny_base_folder: Path) -> None:
    first, second = load_base(tiny_base_folder).unet, load_base(tiny_base_folder).unet

    assert not {id(module) for module in first.modules()} & {id(module) for module in second.modules()}
    first.conv_in.register_forward_hook(lambda *_: None)
    assert not second.conv_in._forward_hooks
    first.mid_block.attentions[0].proj_in = torch.nn.Identity()
    assert not isinstance(second.mid_block.attentions[0].proj_in, torch.nn.Identity)


@pytest.mark.parametrize("damage", ["missing", "shape", "unknown", "garbage"])
def test_weights_that_do_not_fit_are_refused_with_the_name(damage: str, tiny_base_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base_folder / "unet", tmp_path / "unet"))
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    changed = {"missing": {}, "shape": {"conv_in.bias": torch.zeros(3)}, "unknown": {"more.weight": torch.zeros(3)}}
    weights = {key: value for key, value in weights.items() if damage != "missing" or key != "conv_in.bias"}
    path.unlink()
    if damage == "garbage":
        path.write_bytes(b"\x10" * 200)
    else:
        save_file(weights | changed[damage], path)

    with pytest.raises(BaseModelError, match="safetensors" if damage == "garbage" else r"conv_in\.bias|more\.weight"):
        map_model(UNet2DConditionModel, folder, dtype=torch.float32, device=CPU)


def test_both_text_encoders_of_sdxl_are_loaded(tiny_sdxl_base: LoadedBase, tiny_base: LoadedBase) -> None:
    assert isinstance(tiny_sdxl_base.text_encoder_2, CLIPTextModelWithProjection)
    assert tiny_sdxl_base.tokenizer_2 is not None
    assert tiny_base.text_encoder_2 is None
    assert tiny_base.tokenizer_2 is None
