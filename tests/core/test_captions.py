"""Caption rules."""

import pytest

from core.captions import make_caption, name_to_words
from core.config import PreprocessConfig


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("red_apple-03.png", "red apple"),
        ("folder/red_apple.JPEG", "red apple"),
        ("C:\\pictures\\red apple (2).png", "red apple"),
        ("3 red apples.png", "3 red apples"),
        ("IMG_1234.JPG", ""),
        ("20240101_120000.jpg", ""),
        ("빨간_사과.png", "빨간 사과"),
        ("baker's dozen.webp", "baker's dozen"),
    ],
)
def test_a_file_name_becomes_words(name: str, words: str) -> None:
    assert name_to_words(name) == words


@pytest.mark.parametrize(
    ("source", "sidecar", "caption"),
    [
        ("sidecar_or_filename", "a shiny apple", "a shiny apple"),
        ("sidecar_or_filename", "  \n", "red apple"),
        ("sidecar_or_filename", None, "red apple"),
        ("sidecar", None, ""),
        ("sidecar", "a shiny apple", "a shiny apple"),
        ("filename", "a shiny apple", "red apple"),
        ("none", "a shiny apple", ""),
    ],
)
def test_the_caption_comes_from_where_the_configuration_says(source: str, sidecar: str | None, caption: str) -> None:
    assert make_caption("red_apple.png", sidecar, PreprocessConfig.parse({"caption_source": source})) == caption


def test_the_trigger_word_is_first_and_the_suffix_last() -> None:
    config = PreprocessConfig(trigger_word="zkx", caption_suffix="blueprint style")

    assert make_caption("red_apple.png", None, config) == "zkx, red apple, blueprint style"
    assert make_caption("IMG_1.png", None, config) == "zkx, blueprint style"


def test_a_sidecar_is_one_line_without_control_characters_and_bounded() -> None:
    config = PreprocessConfig()

    assert make_caption("x.png", "\ufeffa red\r\n\tapple\x00\x1b[31m", config) == "a red apple [31m"
    assert len(make_caption("x.png", "word " * 5000, config)) <= 4000
