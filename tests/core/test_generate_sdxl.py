"""SDXL pictures: two text encoders and the size as further conditions, each row's own in a shared run."""

import numpy as np

from core.config import GenerateConfig
from core.drawing import Request
from core.generate import generate, generate_together
from core.pipelines import LoadedBase

CONFIG = GenerateConfig(prompt="a red apple", negative_prompt="a cat", width=64, height=64, steps=3, seed=5)


def test_a_picture_in_company_is_the_one_drawn_alone(tiny_sdxl_base: LoadedBase) -> None:
    configs = [
        CONFIG.model_copy(update={"sampler": "dpmpp_2m"}),
        CONFIG.model_copy(update={"prompt": "a blue house", "guidance": 1.0, "steps": 2, "seed": 9}),
        CONFIG.model_copy(update={"prompt": "a green car, " * 12, "sampler": "euler", "seed": 30, "count": 2}),
    ]
    together = generate_together(tiny_sdxl_base, [Request(config=config) for config in configs])
    for outcome, config in zip(together, configs, strict=True):
        assert isinstance(outcome, list), outcome
        for mine, alone in zip(outcome, generate(tiny_sdxl_base, config), strict=True):
            assert np.abs(np.asarray(mine, dtype=int) - np.asarray(alone, dtype=int)).max() <= 1


def test_the_size_is_a_condition(tiny_sdxl_base: LoadedBase) -> None:
    seen: list[list[float]] = []
    hook = tiny_sdxl_base.unet.register_forward_pre_hook(
        lambda module, inputs, options: seen.append(options["added_cond_kwargs"]["time_ids"].tolist()),
        with_kwargs=True,
    )
    try:
        generate(tiny_sdxl_base, CONFIG.model_copy(update={"width": 128, "steps": 1, "sampler": "euler"}))
    finally:
        hook.remove()
    assert seen == [[[64.0, 128.0, 0.0, 0.0, 64.0, 128.0]] * 2]
