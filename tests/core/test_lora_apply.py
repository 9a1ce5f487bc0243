"""LoRAs go on together and come off without a trace."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from core.errors import LoraFileError
from core.lora_state import LoraLayer, LoraState
from core.lora_utils import apply_lora, write_kohya, write_peft
from core.pipelines import LoadedBase
from core.text_encoding import encode_prompts
from tests.core.training_parts import sd15_shaped_unet, trained_state, unet_output

DIM = 64


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return sd15_shaped_unet()


def module_tree(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules()]


def test_removal_is_bit_equal_and_leaves_the_very_modules(unet: nn.Module) -> None:
    before, tree, attributes = unet_output(unet, DIM), module_tree(unet), set(vars(unet))
    handle = apply_lora(unet, [(trained_state(unet, "with_conv"), 1.0)])
    assert not torch.equal(unet_output(unet, DIM), before)
    handle.remove()
    handle.remove()
    assert torch.equal(unet_output(unet, DIM), before)
    assert module_tree(unet) == tree
    assert set(vars(unet)) == attributes
    assert not any("lora" in key for key in unet.state_dict())


def test_several_loras_add_up_with_their_weights(unet: nn.Module, tmp_path: Path) -> None:
    one, two = trained_state(unet, "attention"), trained_state(unet, "with_conv", rank=8, alpha=5.0)
    write_kohya(tmp_path / "one.safetensors", one, {})
    write_peft(tmp_path / "two", two)
    changed = copy.deepcopy(unet)
    for state, weight in ((one, 0.6), (two, -0.8)):
        for name, layer in state.unet.items():
            changed.get_submodule(name).weight += weight * layer.delta()  # type: ignore[operator]
    with apply_lora(unet, [(tmp_path / "one.safetensors", 0.6), (tmp_path / "two", -0.8)]):
        together = unet_output(unet, DIM)
    torch.testing.assert_close(together, unet_output(changed, DIM), atol=2e-5, rtol=0)


def test_a_weight_of_zero_changes_nothing(unet: nn.Module) -> None:
    before = unet_output(unet, DIM)
    with apply_lora(unet, [(trained_state(unet, "attention"), 0.0)]):
        assert torch.equal(unet_output(unet, DIM), before)


def test_no_lora_is_fine(unet: nn.Module) -> None:
    with apply_lora(unet, []):
        assert unet_output(unet, DIM).shape == (2, 4, 8, 8)


def test_applying_draws_nothing_from_the_global_generator(unet: nn.Module) -> None:
    state, before = trained_state(unet, "with_conv"), torch.get_rng_state()
    apply_lora(unet, [(state, 1.0)]).remove()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_lora_of_another_base_is_refused_by_its_first_misfit(unet: nn.Module) -> None:
    tree = module_tree(unet)
    fitting = trained_state(unet, "attention").unet
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    wide = LoraLayer(down=torch.ones(4, 1280), up=torch.ones(1280, 4), alpha=4.0)
    with pytest.raises(LoraFileError, match=rf"{name}.*\(1280, 1280\).*\(128, 128\)"):
        apply_lora(unet, [(LoraState(unet=fitting | {name: wide}), 1.0)])
    with pytest.raises(LoraFileError, match=r"input_blocks_4_1_proj_in has no counterpart"):
        apply_lora(unet, [(LoraState(unet=fitting | {"input_blocks_4_1_proj_in": wide}), 1.0)])
    assert module_tree(unet) == tree


def test_text_encoder_layers_need_the_text_encoder(tiny_base: LoadedBase) -> None:
    dim = tiny_base.text_encoder.config.hidden_size
    drawn = torch.randn(2, 2, dim, generator=torch.Generator().manual_seed(0))
    layer = LoraLayer(down=drawn[0], up=drawn[1].T, alpha=2.0)
    state = LoraState(unet={}, text_encoder={"text_model_encoder_layers_0_self_attn_q_proj": layer})
    with pytest.raises(LoraFileError, match="text encoder"):
        apply_lora(tiny_base.unet, [(state, 1.0)])
    before = encode_prompts(tiny_base, ["a cat"], 1).embeddings
    with apply_lora(tiny_base.unet, [(state, 1.0)], text_encoder=tiny_base.text_encoder):
        assert not torch.equal(encode_prompts(tiny_base, ["a cat"], 1).embeddings, before)
    assert torch.equal(encode_prompts(tiny_base, ["a cat"], 1).embeddings, before)
