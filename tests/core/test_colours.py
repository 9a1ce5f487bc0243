"""Colours: whatever is loaded, swapped, restored and drawn in whatever order, the VAE is fp32 and no dtype is wrong."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings

from core.config import GenerateConfig
from core.generate import generate
from core.lora_state import LoraLayer, LoraState
from core.lora_utils import apply_lora
from core.pipelines import LoadedBase, assert_vae_fp32, load_base

STEPS = ("load", "apply", "remove", "restore", "batch", "move")


def a_lora(base: LoadedBase) -> LoraState:
    """Of one attention projection, in fp32 as files have it."""
    name = next(n for n, _ in base.unet.named_modules() if n.endswith("attn2.to_q"))
    module = base.unet.get_submodule(name)
    down = torch.full((2, module.in_features), 0.05)
    up = torch.full((module.out_features, 2), 0.05)
    return LoraState(unet={name: LoraLayer(down=down, up=up, alpha=2.0)})


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_after_any_sequence_the_vae_is_fp32_and_a_picture_comes_out_as_from_a_fresh_base(
    steps: list[str], dtype: torch.dtype, tiny_base_folder: Path
) -> None:
    config = GenerateConfig(prompt="a red apple", width=32, height=32, steps=1, seed=3)
    base = load_base(tiny_base_folder, dtype=dtype)
    snapshot = {name: weight.clone() for name, weight in base.unet.state_dict().items()}
    applied: list[Any] = []
    for step in steps:
        if step == "load":
            while applied:
                applied.pop().remove()
            base = load_base(tiny_base_folder, dtype=dtype)
        elif step == "apply" and not applied:
            applied.append(apply_lora(base.unet, [(a_lora(base), 1.0)]))
        elif step == "remove" and applied:
            applied.pop().remove()
        elif step == "restore" and not applied:
            base.unet.load_state_dict(snapshot)
        elif step == "move":
            for part in (base.text_encoder, base.unet, base.vae):
                part.to(base.device)
        elif step == "batch":
            generate(base, pair_of(config))
        assert_vae_fp32(base)
        assert base.unet.conv_in.weight.dtype == dtype
    while applied:
        applied.pop().remove()

    picture = generate(base, config)[0]

    assert picture.tobytes() == generate(load_base(tiny_base_folder, dtype=dtype), config)[0].tobytes()
    assert base.vae.dtype == torch.float32


def pair_of(config: GenerateConfig) -> GenerateConfig:
    """Two pictures in one batch."""
    return GenerateConfig.parse(config.dump() | {"count": 2})
