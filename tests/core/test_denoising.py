"""Tracks in one run: each goes its own way, whoever joins, leaves, or shares its forwards."""

import torch

from core.config import GenerateConfig
from core.denoising import DenoisingRun, Track
from core.generate import denoise
from core.pipelines import LoadedBase
from core.text_encoding import TextCondition
from core.track_start import begin_track, encode_texts

CONFIG = GenerateConfig(prompt="a red apple", negative_prompt="a cat", width=32, height=32, steps=20, seed=5)
OTHERS = [
    {"prompt": "a blue house", "seed": 40, "steps": 7, "sampler": "euler_a"},
    {"prompt": "a green car", "seed": 50, "steps": 30, "guidance": 1.0, "sampler": "ddim"},
    {"prompt": "a dog", "seed": 60, "steps": 20, "guidance": 3.0, "sampler": "dpm2"},
]


def track_of(base: LoadedBase, config: GenerateConfig, count: int = 1) -> Track:
    return begin_track(base, config, encode_texts(base, config), [config.seed + n for n in range(count)])


def among_others(base: LoadedBase, config: GenerateConfig, join_at: dict[int, int], place: int = 0) -> torch.Tensor:
    """Latents of a picture while others join at the steps named and leave when they are done."""
    run = DenoisingRun(base)
    mine = track_of(base, config)
    others = [track_of(base, CONFIG.model_copy(update=change)) for change in OTHERS]
    for other in others[:place]:
        run.join(other)
    run.join(mine)
    step = 0
    while not mine.is_done:
        for number in [number for number, at in join_at.items() if at == step]:
            run.join(others[number])
        run.step()
        step += 1
    return mine.latents


def test_twenty_steps_in_company_end_where_they_end_alone(tiny_base: LoadedBase) -> None:
    for sampler in ("dpmpp_2m", "euler"):
        config = CONFIG.model_copy(update={"sampler": sampler})
        text = encode_texts(tiny_base, config)
        alone = denoise(tiny_base, config, text.embeddings, [config.seed])
        company = among_others(tiny_base, config, {0: 0, 1: 3, 2: 9})
        # Random weights make latents of a standard deviation near 8, a trained model's is 1.
        assert (company - alone).abs().max() <= 1e-4 * max(1.0, float(alone.std())), sampler
        assert alone.std() > 0.1


def test_an_exact_picture_has_the_same_bytes_alone_and_in_any_company(tiny_base: LoadedBase) -> None:
    config = CONFIG.model_copy(update={"sampler": "dpmpp_2m", "exact": True})
    alone = among_others(tiny_base, config, {})
    for join_at, place in (({0: 0, 1: 3, 2: 9}, 0), ({2: 1}, 2), ({}, 3)):
        assert torch.equal(among_others(tiny_base, config, join_at, place), alone)


def test_every_row_of_a_forward_has_its_own_timestep_and_only_guided_pictures_have_two(tiny_base: LoadedBase) -> None:
    seen: list[list[float]] = []
    hook = tiny_base.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].tolist()))
    run = DenoisingRun(tiny_base)
    guided = track_of(tiny_base, CONFIG.model_copy(update={"steps": 4, "sampler": "ddim"}), count=2)
    plain = track_of(tiny_base, CONFIG.model_copy(update={"steps": 2, "guidance": 1.0, "sampler": "ddim"}))
    try:
        run.join(guided)
        run.step()
        run.join(plain)
        assert run.step() == []
        assert run.step() == [plain]
        assert run.step() == [guided]
    finally:
        hook.remove()

    first, second, third, fourth = guided.scheduler.timesteps.tolist()
    early, late = plain.scheduler.timesteps.tolist()
    assert seen == [[first] * 4, [second] * 4 + [early], [third] * 4 + [late], [fourth] * 4]
    assert run.tracks == ()


def test_who_leaves_changes_nothing_for_the_others(tiny_base: LoadedBase) -> None:
    run = DenoisingRun(tiny_base)
    staying, leaving = (track_of(tiny_base, CONFIG.model_copy(update={"seed": seed})) for seed in (5, 9))
    run.join(leaving)
    run.join(staying)
    for _ in range(3):
        run.step()
    run.leave(leaving)
    while not staying.is_done:
        run.step()

    assert leaving.steps_done == 3
    alone = denoise(tiny_base, CONFIG, encode_texts(tiny_base, CONFIG).embeddings, [5])
    assert (staying.latents - alone).abs().max() <= 1e-4 * float(alone.std())


def test_sizes_and_text_lengths_that_differ_go_through_forwards_of_their_own(tiny_base: LoadedBase) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = tiny_base.unet.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    run = DenoisingRun(tiny_base)
    small = track_of(tiny_base, CONFIG)
    wide = track_of(tiny_base, CONFIG.model_copy(update={"width": 64}))
    text = encode_texts(tiny_base, CONFIG).embeddings
    wordy = begin_track(tiny_base, CONFIG, TextCondition(embeddings=torch.cat([text, text], dim=1), pooled=None), [5])
    try:
        for track in (small, wide, wordy):
            run.join(track)
        run.step()
    finally:
        hook.remove()
    channels = tiny_base.facts.latent_channels
    assert shapes == [(2, channels, 8, 8), (2, channels, 8, 16), (2, channels, 8, 8)]
