"""Beginning from a picture: img2img as diffusers does it, masks that keep what is black, larger second passes."""

import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from torch import Tensor

from core.config import GenerateConfig, HiresConfig, Sampler
from core.errors import BaseModelError, ConfigError, ImageRejected
from core.image_guidance import (
    enlarge_latents,
    keep_unmasked,
    mask_cells,
    noisy_start,
    paste_masked,
    picture_latents,
    read_init_picture,
    read_mask,
    refuse_inpainting_unet,
    second_pass,
)
from core.pipelines import LoadedBase
from core.randomness import generator
from core.samplers import make_scheduler, timesteps_from
from core.text_encoding import encode_prompts

SIZE = 32


def _noise(seeds: list[int]) -> Tensor:
    return torch.stack([torch.randn((4, 8, 8), generator=generator(seed, "picture")) for seed in seeds])


def _picture() -> Image.Image:
    ramp = np.linspace(0, 255, SIZE, dtype=np.uint8)
    return Image.fromarray(np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(90)), axis=-1))


def _mask(box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (SIZE, SIZE), 0)
    mask.paste(255, box)
    return mask


def _denoise(base: LoadedBase, sampler: Sampler, strength: float, mask: Image.Image | None, seeds: list[int]) -> Tensor:
    """What a track does, in the small."""
    scheduler = make_scheduler(base.scheduler_config, sampler)
    scheduler.set_timesteps(8)
    start = timesteps_from(scheduler, strength)
    clean, noise = picture_latents(base, _picture()), _noise(seeds)
    latents = noisy_start(scheduler, clean, noise, start)
    after = None if mask is None else keep_unmasked(scheduler, clean, noise, mask_cells(base, mask))
    text = encode_prompts(base, ["a red apple"], None).embeddings.repeat(len(seeds), 1, 1)
    with torch.no_grad():
        for position in range(start, len(scheduler.timesteps)):
            timestep = scheduler.timesteps[position]
            model_input = scheduler.scale_model_input(latents, timestep)
            prediction = base.unet(model_input, timestep, encoder_hidden_states=text).sample
            latents = scheduler.step(prediction, timestep, latents).prev_sample
            if after is not None:
                latents = after(latents, position + 1)
    return latents


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "ddim", "unipc", "heun", "dpm2", "lms"])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_img2img_is_that_of_diffusers_for_the_same_latents_and_noise(
    tiny_base: LoadedBase, tiny_base_folder: Path, sampler: Sampler, strength: float
) -> None:
    ours = _denoise(tiny_base, sampler, strength, None, [3, 4])

    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_base_folder, local_files_only=True)
    pipeline.scheduler = make_scheduler(tiny_base.scheduler_config, sampler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=encode_prompts(tiny_base, ["a red apple"], None).embeddings.repeat(2, 1, 1),
        image=picture_latents(tiny_base, _picture()).repeat(2, 1, 1, 1),
        generator=[generator(seed, "picture") for seed in (3, 4)],
        guidance_scale=1.0,
        strength=strength,
        num_inference_steps=8,
        output_type="latent",
    ).images

    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, float(theirs.std()))


def test_the_weaker_the_closer_to_the_picture(tiny_base: LoadedBase) -> None:
    clean = picture_latents(tiny_base, _picture())

    far = [(_denoise(tiny_base, "ddim", strength, None, [3]) - clean).abs().mean() for strength in (0.0, 0.5, 1.0)]

    assert far[0] < far[1] < far[2]


@pytest.mark.parametrize("sampler", ["default", "euler", "dpmpp_2m", "ddim", "heun", "dpm2_a", "unipc", "lcm"])
def test_a_mask_keeps_what_is_black_and_changes_what_is_white(tiny_base: LoadedBase, sampler: Sampler) -> None:
    mask = _mask((0, 0, 16, 32))
    clean = picture_latents(tiny_base, _picture())

    masked = _denoise(tiny_base, sampler, 0.75, mask, [3, 4])

    assert torch.equal(masked[:, :, :, 4:], clean[:, :, :, 4:].expand(2, -1, -1, -1))
    assert (masked[:, :, :, :4] - clean[:, :, :, :4]).abs().mean() > 0.1


def test_a_cell_with_any_white_may_change(tiny_base: LoadedBase) -> None:
    cells = mask_cells(tiny_base, _mask((5, 9, 6, 10)))

    assert cells.shape == (1, 1, 8, 8)
    assert cells.nonzero().tolist() == [[0, 0, 2, 1]]


def test_pasting_keeps_the_pixels_outside_to_the_last_bit() -> None:
    original, drawn = _picture(), Image.new("RGB", (SIZE, SIZE), (255, 0, 0))

    pasted = np.asarray(paste_masked(drawn, original, _mask((0, 0, 8, 32))))

    assert np.array_equal(pasted[:, 24:], np.asarray(original)[:, 24:])
    assert (pasted[:, 0] == (255, 0, 0)).all() or np.abs(pasted[:, 0].astype(int) - (255, 0, 0)).max() < 128


def test_pictures_and_masks_of_any_size_are_fitted_and_bad_ones_refused(tmp_path: Path) -> None:
    _picture().resize((90, 40)).save(tmp_path / "wide.png")
    Image.new("RGB", (20, 20), "black").save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")

    assert read_init_picture(tmp_path / "wide.png", 32, 40).size == (32, 40)
    assert read_mask(tmp_path / "wide.png", 32, 40).mode == "L"
    with pytest.raises(ConfigError, match="no white part"):
        read_mask(tmp_path / "black.png", 32, 32)
    with pytest.raises(ImageRejected):
        read_init_picture(tmp_path / "text.png", 32, 32)


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_the_second_pass_is_larger_and_begins_from_the_first(tiny_base: LoadedBase, upscaler: str) -> None:
    hires = HiresConfig.parse({"scale": 1.6, "steps": 3, "denoising_strength": 0.4, "upscaler": upscaler})
    config = GenerateConfig(prompt="x", width=SIZE, height=SIZE, steps=8, seed=9, count=2, hires=hires)

    larger = second_pass(config, 8)
    latents = enlarge_latents(tiny_base, torch.cat([picture_latents(tiny_base, _picture())] * 2), config)

    assert (larger.width, larger.height, larger.steps, larger.denoising_strength) == (48, 48, 3, 0.4)
    assert (larger.hires, larger.seed, larger.prompt) == (None, 9, "x")
    assert latents.shape == (2, 4, 12, 12)
    direct = picture_latents(tiny_base, _picture().resize((48, 48)))
    # An untrained VAE keeps little of a picture, so only the mean of each channel is compared.
    assert (latents.mean((2, 3)) - direct.mean((2, 3))).abs().max() < 0.5


def test_an_inpainting_checkpoint_is_refused_with_what_to_use_instead(tiny_base: LoadedBase) -> None:
    refuse_inpainting_unet(tiny_base)
    nine = types.SimpleNamespace(config=types.SimpleNamespace(in_channels=9))

    with pytest.raises(BaseModelError, match=r"9 channels instead of 4.*ordinary checkpoint"):
        refuse_inpainting_unet(dataclasses.replace(tiny_base, unet=nine))
