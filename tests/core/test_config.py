"""Texts of a configuration: bounded, composed, without characters that nobody can see."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import GenerateConfig, PreprocessConfig, TrainConfig
from core.errors import ConfigError

VISIBLE_OR_LINES = st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t")


@pytest.mark.parametrize("bad", ["\0", "\x07", "\r", "\x1b", "\x7f", "\x85", "\x9f"])
def test_control_characters_are_refused_by_code_point(bad: str) -> None:
    for parse in (
        lambda text: GenerateConfig.parse({"prompt": text}),
        lambda text: GenerateConfig.parse({"prompt": "x", "negative_prompt": text}),
        lambda text: TrainConfig.parse({"sample_prompts": [text]}),
        lambda text: PreprocessConfig.parse({"trigger_word": text}),
        lambda text: PreprocessConfig.parse({"caption_suffix": text}),
    ):
        with pytest.raises(ConfigError, match=f"U\\+{ord(bad):04X}"):
            parse(f"a{bad}b")


def test_line_breaks_and_tabs_are_kept() -> None:
    assert GenerateConfig.parse({"prompt": "a\n\tb"}).prompt == "a\n\tb"


def test_the_same_looking_prompt_is_the_same_configuration() -> None:
    composed, decomposed = (GenerateConfig.parse({"prompt": text}) for text in ("caf\u00e9", "cafe\u0301"))
    assert composed == decomposed
    assert composed.content_hash() == decomposed.content_hash()


def test_the_length_counts_after_composition() -> None:
    assert len(GenerateConfig.parse({"prompt": "e\u0301" * 4000}).prompt) == 4000
    with pytest.raises(ConfigError, match="4000"):
        GenerateConfig.parse({"prompt": "e\u0301" * 4001})
    # U+0958 composes to two characters.
    with pytest.raises(ConfigError, match="4000"):
        GenerateConfig.parse({"prompt": "\u0958" * 2001})


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(ConfigError, match="unicode"):
        GenerateConfig.parse({"prompt": "a\ud800b"})


@given(st.text(VISIBLE_OR_LINES, max_size=200))
def test_every_other_text_is_kept_but_for_its_composition_and_read_back_unchanged(text: str) -> None:
    config = GenerateConfig.parse({"prompt": text})
    assert config.prompt == unicodedata.normalize("NFC", text)
    assert GenerateConfig.parse(config.dump()) == config
