"""Generation: equal to diffusers, independent of batch mates, cancellable at every step."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from core.config import GenerateConfig, Sampler
from core.errors import Cancelled, ConfigError
from core.generate import denoise, generate, to_pictures
from core.lora_state import LoraLayer, LoraState
from core.lora_utils import write_kohya
from core.pipelines import LoadedBase, load_base
from core.prepared_base import prepare_base
from core.progress import Progress
from core.randomness import generator
from core.samplers import make_scheduler
from core.text_encoding import encode_prompts
from tests.tiny_models import make_tiny_pipeline

SAMPLERS: tuple[Sampler, ...] = ("default", "dpmpp_2m", "euler", "euler_a", "ddim")
CONFIG = GenerateConfig(prompt="a red apple", negative_prompt="a cat", width=32, height=40, steps=6, seed=5)


def _pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


@pytest.fixture
def lora_file(tiny_base: LoadedBase, tmp_path: Path) -> Path:
    """A strong LoRA on one attention layer."""
    name = next(name for name, _ in tiny_base.unet.named_modules() if name.endswith("attn2.to_v"))
    layer = tiny_base.unet.get_submodule(name)
    rows, columns = layer.weight.shape
    down = torch.randn(4, columns, generator=generator(1, "down"))
    up = torch.randn(rows, 4, generator=generator(1, "up"))
    path = tmp_path / "strong.safetensors"
    write_kohya(path, LoraState(unet={name: LoraLayer(down=down, up=up, alpha=4.0)}), {})
    return path


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_latents_equal_those_of_diffusers_for_the_same_noise(
    tiny_base: LoadedBase, tiny_base_folder: Path, sampler: Sampler, guidance: float
) -> None:
    config = CONFIG.model_copy(update={"sampler": sampler, "guidance": guidance})
    prompts = [config.negative_prompt, config.prompt] if guidance > 1 else [config.prompt]
    embeddings = encode_prompts(tiny_base, prompts, 2).embeddings
    ours = denoise(tiny_base, config, embeddings, [11, 12])

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base_folder, local_files_only=True)
    pipeline.scheduler = make_scheduler(tiny_base.scheduler_config, sampler)
    pipeline.set_progress_bar_config(disable=True)
    generators = [generator(seed, "picture") for seed in (11, 12)]
    theirs = pipeline(
        prompt_embeds=embeddings[-1:].repeat(2, 1, 1),
        negative_prompt_embeds=embeddings[:1].repeat(2, 1, 1) if guidance > 1 else None,
        generator=generators,
        guidance_scale=guidance,
        num_inference_steps=config.steps,
        width=config.width,
        height=config.height,
        output_type="latent",
    ).images

    assert ours.std() > 0.1
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_gives_the_same_picture_alone_and_among_others(tiny_base: LoadedBase, sampler: Sampler) -> None:
    config = CONFIG.model_copy(update={"sampler": sampler})
    four = _pixels(generate(tiny_base, config.model_copy(update={"count": 4})))
    alone = _pixels(generate(tiny_base, config.model_copy(update={"seed": 7})))
    embeddings = encode_prompts(tiny_base, [config.negative_prompt, config.prompt], None).embeddings
    latents_of_four = denoise(tiny_base, config, embeddings, [5, 6, 7, 8])
    latents_alone = denoise(tiny_base, config, embeddings, [7])

    assert np.abs(four[2] - alone[0]).max() <= 1
    assert np.abs(four[1] - four[2]).max() > 3
    # Random weights give latents of a standard deviation near 8, so rounding is measured against that.
    assert (latents_of_four[2] - latents_alone[0]).abs().max() <= 1e-5 * latents_alone.std()


def test_more_pictures_than_fit_a_forward_are_drawn_in_order_and_counted_as_one_work(tiny_base: LoadedBase) -> None:
    config = CONFIG.model_copy(update={"count": 11, "steps": 2, "sampler": "ddim"})
    seen: list[Progress] = []
    largest = 0

    def measure(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal largest
        largest = max(largest, len(inputs[0]))

    hook = tiny_base.unet.register_forward_pre_hook(measure)
    try:
        images = generate(tiny_base, config, report=seen.append)
    finally:
        hook.remove()

    assert [(progress.step, progress.total) for progress in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert largest == 16
    last = generate(tiny_base, config.model_copy(update={"seed": 15, "count": 1}))
    assert np.abs(_pixels(images)[10] - _pixels(last)[0]).max() <= 1


def test_guidance_1_runs_no_unconditional_half(tiny_base: LoadedBase) -> None:
    sizes: list[int] = []
    hook = tiny_base.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    try:
        generate(tiny_base, CONFIG.model_copy(update={"guidance": 1.0, "steps": 1, "sampler": "ddim"}))
        generate(tiny_base, CONFIG.model_copy(update={"guidance": 2.0, "steps": 1, "sampler": "ddim"}))
    finally:
        hook.remove()

    assert sizes == [1, 2]


def test_prompt_negative_prompt_and_clip_skip_each_change_the_picture(tiny_base: LoadedBase) -> None:
    plain = _pixels(generate(tiny_base, CONFIG))

    for change in ({"prompt": "a blue house"}, {"negative_prompt": ""}, {"clip_skip": 1}):
        assert np.abs(_pixels(generate(tiny_base, CONFIG.model_copy(update=change))) - plain).max() > 0, change


def test_a_cancellation_stops_at_that_step_and_leaves_the_model_as_it_was(
    tiny_base: LoadedBase, lora_file: Path
) -> None:
    before = _pixels(generate(tiny_base, CONFIG))
    steps: list[int] = []

    def cancel_at_three(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        generate(tiny_base, CONFIG, [(lora_file, 1.0)], cancel_at_three)

    assert steps == [1, 2, 3]
    assert np.array_equal(_pixels(generate(tiny_base, CONFIG)), before)


def test_a_lora_changes_the_picture_in_proportion_and_weight_0_is_no_lora(
    tiny_base: LoadedBase, lora_file: Path
) -> None:
    plain = _pixels(generate(tiny_base, CONFIG))
    weak = _pixels(generate(tiny_base, CONFIG, [(lora_file, 0.1)]))
    strong = _pixels(generate(tiny_base, CONFIG, [(lora_file, 1.0)]))

    assert np.array_equal(_pixels(generate(tiny_base, CONFIG, [(lora_file, 0.0)])), plain)
    assert 0 < np.abs(weak - plain).mean() < np.abs(strong - plain).mean()
    assert np.array_equal(_pixels(generate(tiny_base, CONFIG)), plain)


@pytest.mark.parametrize(("field", "value", "nearest"), [("width", 33, "32 or 40"), ("height", 100, "96 or 104")])
def test_a_size_that_does_not_fit_is_refused_with_the_nearest_ones(
    tiny_base: LoadedBase, field: str, value: int, nearest: str
) -> None:
    with pytest.raises(ConfigError, match=f"{field} {value} is no multiple of 8.*use {nearest}"):
        generate(tiny_base, CONFIG.model_copy(update={field: value}))


def test_a_v_prediction_base_that_pools_its_text_draws_pictures(tmp_path: Path) -> None:
    source = make_tiny_pipeline(tmp_path / "v", prediction_type="v_prediction", addition_embed_type="text")
    base = load_base(prepare_base(source, tmp_path / "prepared").folder)

    (image,) = generate(base, CONFIG)
    as_epsilon = dataclasses.replace(base, scheduler_config=base.scheduler_config | {"prediction_type": "epsilon"})
    (other,) = generate(as_epsilon, CONFIG)

    assert image.size == (32, 40)
    assert image.mode == "RGB"
    assert np.abs(_pixels([image]) - _pixels([other])).max() > 3


def test_pixels_are_rounded_and_not_cut() -> None:
    (image,) = to_pictures(torch.tensor([0.0, 0.5019, 1.0]).reshape(1, 3, 1, 1))

    assert image.getpixel((0, 0)) == (0, 128, 255)


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "core.generate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_draws_pictures_of_an_unprepared_base_with_a_lora(
    tiny_pipeline_folder: Path, lora_file: Path, tmp_path: Path
) -> None:
    done = _run(
        "--base", tiny_pipeline_folder, "--prompt", "a red apple", "--seed", 3, "--count", 2, "--steps", 2,
        "--lora", lora_file, "--lora-weight", 0.5, "--out", tmp_path / "out", "--cache", tmp_path / "cache",
        "--device", "cpu",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert [re.sub("^[0-9a-f]{8}", "", path.name) for path in paths] == ["-seed-3.png", "-seed-4.png"]
    with Image.open(paths[1]) as image:
        assert image.size == (64, 64)
        assert image.info["parameters"].startswith("a red apple <lora:strong:0.5>\nSteps: 2, ")
        assert "Seed: 4, Size: 64x64, Model: tiny-sd, Clip skip: 2" in image.info["parameters"]
    assert "denoising: 100%" in done.stderr


def test_the_command_says_in_one_sentence_what_is_wrong(tmp_path: Path) -> None:
    done = _run("--base", tmp_path / "no such folder", "--prompt", "x", "--out", tmp_path)

    assert done.returncode == 1
    assert re.fullmatch(r"error: .*no such folder does not exist: .*\n", done.stderr)
