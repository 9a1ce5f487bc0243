"""The demo's files fit each other: prompts, pictures, settings, licences, base model."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from core.config import GenerateConfig
from core.train_cli import read_training_file
from core.train_config import TrainConfig
from demo.make_pictures import CAPTIONS, SIDE_PX, outlines
from demo.recipe import DEMO, read_recipe

PICTURES = sorted((DEMO / "pictures").glob("*.png"))


def caption_of(picture: Path) -> str:
    return picture.with_suffix(".txt").read_text(encoding="utf-8").strip()


def test_the_training_file_is_what_the_command_line_and_rest_both_take() -> None:
    own, config = read_training_file(DEMO / "train.yaml")
    assert config == read_recipe().train
    assert isinstance(config, TrainConfig)
    assert (DEMO.parent / own["base_model"]).is_dir()
    assert (DEMO.parent / own["pictures"]) == DEMO / "pictures"


def test_a_setting_with_a_wrong_name_is_refused(tmp_path: Path) -> None:
    values = yaml.safe_load((DEMO / "train.yaml").read_text()) | {"lerning_rate": 1}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "prompts.yaml").write_text((DEMO / "prompts.yaml").read_text())
    with pytest.raises(Exception, match="lerning_rate"):
        read_recipe(tmp_path)


def test_sixteen_prompts_with_a_seed_each_are_valid_requests() -> None:
    recipe = read_recipe()
    assert len({(fixed.prompt, fixed.seed) for fixed in recipe.prompts}) == 16
    for fixed in recipe.prompts:
        config = GenerateConfig.parse(
            {"prompt": fixed.prompt, "seed": fixed.seed, "width": 64, "height": 64} | recipe.drawing
        )
        assert config.prompt.endswith(", blueprint style")


def test_no_prompt_asks_for_a_thing_that_the_lora_has_seen() -> None:
    seen = {caption_of(picture) for picture in PICTURES}
    names = set(CAPTIONS)
    for fixed in read_recipe().prompts:
        assert fixed.prompt not in seen
        assert fixed.thing.split()[-1] not in names


def test_the_set_has_forty_to_sixty_pictures() -> None:
    assert 40 <= len(PICTURES) <= 60  # of the 217 things that the base model knows well


def test_every_picture_has_a_caption_in_the_style_and_is_larger_than_the_training_size() -> None:
    assert [picture.stem for picture in PICTURES] == sorted(CAPTIONS)
    for picture in PICTURES:
        assert caption_of(picture) == f"{CAPTIONS[picture.stem]}, blueprint style"
        with Image.open(picture) as image:
            assert image.size == (SIDE_PX, SIDE_PX)
            assert not image.info.get("exif")
    assert read_recipe().preprocess.resolution < SIDE_PX


def test_all_pictures_together_stay_small() -> None:
    assert sum(file.stat().st_size for file in (DEMO / "pictures").iterdir()) < 2**20


def test_outlines_are_white_on_the_edge_and_blue_elsewhere() -> None:
    emoji = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    emoji.paste((200, 30, 30, 255), (16, 16, 48, 48))
    drawing = outlines(emoji)
    blue = (31, 76, 166)
    assert drawing.size == (SIDE_PX, SIDE_PX)
    assert drawing.getpixel((4, 4)) == blue  # outside
    assert drawing.getpixel((64, 64)) == blue  # inside: the red is gone
    assert drawing.getpixel((32, 64)) == (255, 255, 255)  # on the edge


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("Apache-2.0.txt", "Apache License"),
        ("MIT-emoji-datasource.txt", "Cal Henderson"),
        ("MIT-emojilib.txt", "Mu-An Chiou"),
        ("MIT-openai-clip.txt", "OpenAI"),
        ("MIT-open-clip.txt", "Gabriel Ilharco"),
        ("README.md", "Noto"),
    ],
)
def test_the_licences_of_what_is_shipped_are_shipped_too(file: str, words: str) -> None:
    assert words in (DEMO / "LICENSES" / file).read_text(encoding="utf-8")
    assert file == "README.md" or file in (DEMO / "LICENSES" / "README.md").read_text(encoding="utf-8")


def test_the_base_model_is_small_and_declares_its_clip_skip() -> None:
    base = DEMO / "tiny-sd-emoji"
    files = [file for file in base.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 30e6
    assert json.loads((base / "lorasite.json").read_text()) == {"default_clip_skip": 1}
    assert {file.suffix for file in files} <= {".json", ".txt", ".safetensors"}
