"""Texts of a configuration: bounded, composed, without characters that nobody can see."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import GenerateConfig, PreprocessConfig, canonical_json_hash
from core.errors import ConfigError
from core.train_config import TrainConfig

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


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected"),
    [
        ("Euler a", None, ("euler_a", "default")),
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Karras", "Automatic", ("dpmpp_2m_sde", "karras")),
        ("dpm++ 2m", "SGM Uniform", ("dpmpp_2m", "sgm_uniform")),
        ("PLMS", "automatic", ("pndm", "automatic")),
        ("k_euler_a", "normal", ("euler_a", "uniform")),
        ("dpmpp_2m", "karras", ("dpmpp_2m", "karras")),
    ],
)
def test_samplers_and_schedules_are_understood_under_their_webui_names(
    sampler: str, schedule: str | None, expected: tuple[str, str]
) -> None:
    values: dict[str, object] = {"prompt": "x", "sampler": sampler}
    config = GenerateConfig.parse(values if schedule is None else values | {"schedule": schedule})

    assert (config.sampler, config.schedule) == expected


def test_an_unknown_sampler_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"sampler: .*'dpmpp_2m'.*got 'DPM fast'"):
        GenerateConfig.parse({"prompt": "x", "sampler": "DPM fast"})


def test_a_request_without_later_fields_has_the_hash_and_the_version_that_it_always_had() -> None:
    first = {
        "prompt": "a red apple", "negative_prompt": "", "count": 1, "seed": 0, "width": 512, "height": 512,
        "steps": 25, "guidance": 7.0, "sampler": "default", "clip_skip": None, "loras": [],
    }  # fmt: skip
    config = GenerateConfig.parse(first)

    assert config.dump() == first
    assert config.content_hash() == canonical_json_hash(first)
    assert config.spec_version == 1


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "euler", "schedule": "karras"},
        {"sampler": "heun"},
        {"init_image": "0" * 64, "denoising_strength": 0.5},
        {"hires": {"scale": 1.5}},
        {"exact": True},
        {"image_format": "webp"},
        {"prompt": "a (red:1.2) apple"},
    ],
)
def test_what_older_workers_do_not_know_is_kept_from_them_and_read_back_unchanged(change: dict[str, object]) -> None:
    config = GenerateConfig.parse({"prompt": "x"} | change)

    assert config.spec_version == 2
    assert GenerateConfig.parse(config.dump()) == config
    assert config.content_hash() != GenerateConfig.parse({"prompt": "x"}).content_hash()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"mask": "0" * 64}, "mask needs init_image"),
        ({"hires": {"scale": 4.5}}, "hires.scale"),
        ({"hires": {}, "init_image": "0" * 64}, "hires is for pictures from noise"),
        ({"hires": {"scale": 4}, "width": 2048}, "8192 px, 4096 is the most"),
        ({"denoising_strength": 1.5}, "denoising_strength"),
        ({"init_image": "/etc/passwd"}, "init_image"),
        ({"image_format": "gif"}, "image_format"),
        ({"schedule": "karras"}, "sampler default has a schedule of its own"),
        ({"sampler": "ddim", "schedule": "karras"}, "uniform and sgm_uniform alone"),
        ({"sampler": "lcm", "steps": 51}, "at most 50 steps"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_the_reason(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        GenerateConfig.parse({"prompt": "x"} | values)


def test_a_training_without_newer_settings_keeps_its_first_hash_and_older_workers_may_run_it() -> None:
    plain = TrainConfig()
    assert plain.dump().keys().isdisjoint(TrainConfig.later_fields)
    assert plain.spec_version == 1
    assert TrainConfig.parse(plain.dump()) == plain


@pytest.mark.parametrize(
    "values",
    [{"zero_terminal_snr": True}, {"shuffle_captions": True, "keep_tokens": 1}, {"lr_schedule": "polynomial"}],
)
def test_a_training_with_newer_settings_is_kept_from_older_workers(values: dict[str, object]) -> None:
    config = TrainConfig.parse(values)
    assert config.spec_version == 3
    assert TrainConfig.parse(config.dump()) == config
