"""Generated pictures as PNG files with infotext."""

from pathlib import Path

from PIL import Image

from core.config import GenerateConfig, LoraUse
from core.image_files import infotext, save_png


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


def test_a_saved_picture_keeps_pixels_and_infotext_in_any_language_and_leaves_no_other_file(tmp_path: Path) -> None:
    image = Image.effect_noise((32, 32), 50).convert("RGB")
    path = tmp_path / "new" / "a.png"

    save_png(image, path, "빨간 사과\nSteps: 20")
    save_png(image, path, "빨간 사과\nSteps: 21")

    with Image.open(path) as saved:
        assert saved.info == {"parameters": "빨간 사과\nSteps: 21"}
        assert saved.tobytes() == image.tobytes()
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_infotext_writes_no_metadata(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", "")

    with Image.open(tmp_path / "a.png") as saved:
        assert saved.info == {}
