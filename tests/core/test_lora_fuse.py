"""LoRAs in the weights: equal in effect, and gone without a trace."""

import pytest
import torch

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
    for _ in range(3):
        fused.fuse([(two.unet, 1.0)])
        fused.fuse([(one.unet, 0.6), (two.unet, -0.8)])
        torch.testing.assert_close(unet_output(unet, DIM), expected, atol=2e-5, rtol=0)
    fused.unfuse()
    fused.unfuse()
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), weights, strict=True))


def test_a_lora_of_another_model_changes_nothing() -> None:
    unet = sd15_shaped_unet()
    before = unet_output(unet, DIM)
    wide = LoraLayer(down=torch.ones(4, 1280), up=torch.ones(1280, 4), alpha=4.0)
    with pytest.raises(LoraFileError, match="another base model"):
        FusedLoras(unet).fuse([({"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": wide}, 1.0)])
    assert torch.equal(unet_output(unet, DIM), before)
