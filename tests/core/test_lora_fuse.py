"""LoRAs in the weights: equal in effect, and gone without a trace."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from core.errors import LoraFileError
from core.lora_fuse import FusedLoras
from core.lora_state import LoraLayer
from core.lora_utils import apply_lora
from tests.core.training_parts import sd15_shaped_unet, trained_state, unet_output

DIM = 64


def test_fused_loras_have_the_effect_of_applied_ones_and_leave_the_very_bits() -> None:
    unet = sd15_shaped_unet()
    weights = [weight.clone() for weight in unet.state_dict().values()]
    one, two = trained_state(unet, "attention"), trained_state(unet, "with_conv", rank=8, alpha=5.0)
    with apply_lora(unet, [(one, 0.6), (two, -0.8)]):
        expected = unet_output(unet, DIM)
    fused = FusedLoras(unet)
    first, second = fused.fitted(one.unet), fused.fitted(two.unet)
    for _ in range(3):
        fused.fuse([(second, 1.0)])
        fused.fuse([(first, 0.6), (second, -0.8)])
        torch.testing.assert_close(unet_output(unet, DIM), expected, atol=2e-5, rtol=0)
    fused.unfuse()
    fused.unfuse()
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), weights, strict=True))


def test_fusing_another_lora_takes_the_one_before_out_of_modules_that_it_leaves_alone() -> None:
    unet = sd15_shaped_unet()
    one, two = trained_state(unet, "attention"), trained_state(unet, "with_conv", rank=8, alpha=5.0)
    fused = FusedLoras(unet)
    few, all_of_it = fused.fitted(one.unet), fused.fitted(two.unet)
    fused.fuse([(few, 1.0)])
    expected = [weight.clone() for weight in unet.state_dict().values()]
    fused.fuse([(all_of_it, 1.0)])
    fused.fuse([(few, 1.0)])
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), expected, strict=True))


def test_convolutions_in_channels_last_are_changed_too() -> None:
    unet = sd15_shaped_unet()
    state = trained_state(unet, "with_conv", rank=8, alpha=5.0)
    with apply_lora(unet, [(state, 1.0)]):
        expected = unet_output(unet, DIM)
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    before = [weight.clone() for weight in unet.state_dict().values()]
    fused = FusedLoras(unet)
    fused.fuse([(fused.fitted(state.unet), 1.0)])
    torch.testing.assert_close(unet_output(unet, DIM), expected, atol=2e-5, rtol=0)
    fused.unfuse()
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), before, strict=True))


def test_a_failure_half_way_leaves_the_untouched_weights() -> None:
    unet = sd15_shaped_unet()
    weights = [weight.clone() for weight in unet.state_dict().values()]
    fused = FusedLoras(unet)
    fitted = fused.fitted(trained_state(unet, "attention").unet)
    weight, up, down, scale = fitted.products[5]
    broken = replace(fitted, products=(*fitted.products[:5], (weight, up, down[:-1], scale)))
    with pytest.raises(RuntimeError):
        fused.fuse([(broken, 1.0)])
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), weights, strict=True))


def test_a_lora_of_another_model_changes_nothing() -> None:
    unet = sd15_shaped_unet()
    before = unet_output(unet, DIM)
    wide = LoraLayer(down=torch.ones(4, 1280), up=torch.ones(1280, 4), alpha=4.0)
    with pytest.raises(LoraFileError, match="another base model"):
        FusedLoras(unet).fitted({"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": wide})
    assert torch.equal(unet_output(unet, DIM), before)
