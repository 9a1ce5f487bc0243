"""Options made from configuration classes, and errors as sentences."""

import argparse

import pytest

from core.command_line import ProgressBar, add_config_options, parser, read_config, run_command
from core.config import GenerateConfig, PreprocessConfig
from core.errors import Cancelled, ConfigError
from core.progress import Progress


def _options(config: type[PreprocessConfig] | type[GenerateConfig]) -> argparse.ArgumentParser:
    options = parser("core.example", "An example.", example="python -m core.example")
    add_config_options(options, config, skip={"loras"}, defaults={"width": "the base's own"})
    return options


def test_every_scalar_field_is_an_option_with_its_description_and_default() -> None:
    text = " ".join(_options(GenerateConfig).format_help().split())

    for name, field in GenerateConfig.model_fields.items():
        assert (f"--{name.replace('_', '-')}" in text) == (name != "loras")
        assert name == "loras" or " ".join((field.description or "").split()) in text.replace("%%", "%")
    assert "Default: the base's own." in text
    assert "Default: 25." in text


def test_options_that_are_not_given_keep_the_classes_defaults() -> None:
    given = _options(PreprocessConfig).parse_args([])

    assert read_config(PreprocessConfig, given) == PreprocessConfig()


def test_given_options_reach_the_class_with_their_types() -> None:
    words = ["--resolution", "64", "--bucket-step-px", "16", "--no-aspect-buckets", "--caption-source", "none"]
    given = _options(PreprocessConfig).parse_args(words)

    config = read_config(PreprocessConfig, given, trigger_word="zkx")

    assert config == PreprocessConfig(
        resolution=64, bucket_step_px=16, aspect_buckets=False, caption_source="none", trigger_word="zkx"
    )


def test_the_class_judges_values_and_all_wrong_ones_are_named_at_once() -> None:
    given = _options(GenerateConfig).parse_args(["--prompt", "x", "--count", "65", "--steps", "many"])

    with pytest.raises(ConfigError, match=r"count: .*64.*; steps: .*'many'"):
        read_config(GenerateConfig, given)


def test_a_missing_required_option_and_an_unknown_choice_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, complaint in (([], "--prompt"), (["--prompt", "x", "--sampler", "magic"], "dpmpp_2m")):
        with pytest.raises(SystemExit):
            _options(GenerateConfig).parse_args(words)
        assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [(ConfigError("steps 0 is too few"), 1, "error: steps 0 is too few\n"), (Cancelled(), 130, "stopped\n")],
)
def test_expected_errors_become_one_sentence_and_an_exit_status(
    error: Exception, status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command(fail)

    assert stopped.value.code == status
    assert capsys.readouterr().err == text


def test_a_surprise_keeps_its_traceback() -> None:
    def surprise() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(surprise)


def test_the_progress_bar_draws_each_stage_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    for stage in ("first", "second"):
        for step in (1, 2):
            bar(Progress(stage=stage, step=step, total=2, figures={"loss": 0.5}))
    bar.close()

    drawn = capsys.readouterr().err
    assert "first: 100%" in drawn
    assert "second: 100%" in drawn
    assert "loss=0.5" in drawn
