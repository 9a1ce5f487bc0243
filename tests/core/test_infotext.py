"""Generation parameters as WebUI writes and reads them."""

import re

import pytest

from core.config import GenerateConfig, HiresConfig, LoraUse
from core.infotext import config_values, infotext, parse_infotext


def test_the_infotext_has_the_form_that_webui_reads() -> None:
    config = GenerateConfig(
        prompt="a red apple", negative_prompt="blurry, dark", steps=20, guidance=7.5, sampler="euler_a", clip_skip=2,
        loras=(LoraUse(sha256="0" * 64, weight=0.8), LoraUse(sha256="1" * 64)),
    )  # fmt: skip

    assert infotext(config, 42, "tiny-sd", ["blueprint.safetensors", "emoji"]) == (
        "a red apple <lora:blueprint:0.8> <lora:emoji:1>\n"
        "Negative prompt: blurry, dark\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 42, Size: 512x512, Model: tiny-sd, Clip skip: 2, "
        "Version: lorasite"
    )


def test_paths_and_characters_that_would_break_a_tag_do_not_reach_the_infotext() -> None:
    config = GenerateConfig(prompt="x", loras=(LoraUse(sha256="0" * 64),))

    text = infotext(config, 1, "/home/someone/models/my model, v2", ["/home/someone/a:b>c.safetensors"])

    assert "someone" not in text
    assert "<lora:a_b_c:1>" in text
    assert 'Model: "my_model,_v2"' in text
    assert "Clip skip" not in text
    assert "Negative prompt" not in text


def test_everything_else_that_readers_look_for_is_written_under_webuis_names() -> None:
    config = GenerateConfig(
        prompt="x", sampler="dpmpp_2m", schedule="karras", vae="vae-ft-mse", seed=1,
        hires=HiresConfig(scale=1.5, steps=10, denoising_strength=0.4, upscaler="lanczos"),
        loras=(LoraUse(sha256="0" * 64, weight=0.8), LoraUse(sha256="1" * 64)),
    )  # fmt: skip

    text = infotext(
        config, 1, "sd15", ["a", "b"], clip_skip=1, model_hash="ab" * 32, lora_hashes=["cd" * 32, "ef" * 32]
    )

    assert text.splitlines()[-1] == (
        "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, "
        "Model hash: ababababab, Model: sd15, VAE: vae-ft-mse, Denoising strength: 0.4, Hires upscale: 1.5, "
        'Hires steps: 10, Hires upscaler: Lanczos, Lora hashes: "a: cdcdcdcdcdcd, b: efefefefefef", Version: lorasite'
    )


def test_img2img_says_how_strongly_it_was_changed() -> None:
    config = GenerateConfig(prompt="x", init_image="0" * 64, denoising_strength=0.35)

    assert "Denoising strength: 0.35" in infotext(config, 1, "sd15", [])
    assert "Denoising strength" not in infotext(GenerateConfig(prompt="x"), 1, "sd15", [])


@pytest.mark.parametrize(
    "config",
    [
        GenerateConfig(prompt="a red apple", seed=7),
        GenerateConfig(
            prompt="several\nlines, (red:1.2): \"quoted\"", negative_prompt="blurry,\ndark", seed=7, steps=8,
            guidance=2.5, sampler="dpmpp_2m_sde", schedule="exponential", width=640, height=384, clip_skip=2,
            vae="my,vae",
        ),
        GenerateConfig(prompt="x", seed=7, sampler="euler_a", hires=HiresConfig(scale=1.5, denoising_strength=0.4)),
        GenerateConfig(prompt="x", seed=7, sampler="heun", schedule="automatic", clip_skip=3),
    ],
)  # fmt: skip
def test_what_was_written_is_read_back(config: GenerateConfig) -> None:
    values = config_values(parse_infotext(infotext(config, 7, "sd15", [])))

    expected = config if config.clip_skip else config.model_copy(update={"clip_skip": 1})
    assert GenerateConfig.parse({**values, "seed": int(str(values["seed"]))}) == expected


def test_a_picture_of_webui_is_understood() -> None:
    parameters = parse_infotext(
        "a cat <lora:emoji:0.8>\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, "
        'Seed: 123, Size: 512x768, Model hash: 6ce0161689, Model: v1-5, Lora hashes: "emoji: 0123456789ab", '
        "Version: v1.7.0"
    )

    assert parameters["Lora hashes"] == "emoji: 0123456789ab"
    config = GenerateConfig.parse(config_values(parameters))
    assert (config.prompt, config.sampler, config.schedule) == ("a cat", "dpmpp_2m", "karras")
    assert (config.width, config.height, config.seed, config.clip_skip) == (512, 768, 123, 1)


def test_any_other_text_is_a_prompt() -> None:
    assert parse_infotext("just words\nSteps: 20")["Prompt"] == "just words\nSteps: 20"


def test_the_last_line_is_what_civitais_reader_wants() -> None:
    text = infotext(GenerateConfig(prompt="x"), 1, "sd15", [])

    assert text.splitlines()[-1].startswith("Steps: ")
    assert len(re.findall(r"(\w[\w \-/]+): ", text.splitlines()[-1])) >= 3
