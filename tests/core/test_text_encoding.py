"""Prompts to embeddings: clip skip, padding, truncation."""

import logging
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from core.errors import ConfigError
from core.pipelines import LoadedBase
from core.text_encoding import encode_prompts, tokenize


def test_clip_skip_1_is_the_encoders_ordinary_output(tiny_base: LoadedBase) -> None:
    ids = tokenize(tiny_base, ["a red apple"])

    ours = encode_prompts(tiny_base, ["a red apple"], 1).embeddings

    assert torch.equal(ours, tiny_base.text_encoder(ids).last_hidden_state)


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_clip_skip_n_is_diffusers_clip_skip_n_minus_1(
    tiny_base: LoadedBase, tiny_base_folder: Path, clip_skip: int
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base_folder, local_files_only=True)
    # This version of diffusers looks for the final layer norm under `text_model`, a level that transformers 5 dropped.
    pipeline.text_encoder.__dict__["text_model"] = pipeline.text_encoder
    theirs, _ = pipeline.encode_prompt("a blue cat", "cpu", 1, False, clip_skip=clip_skip - 1 or None)

    ours = encode_prompts(tiny_base, ["a blue cat"], clip_skip).embeddings

    assert torch.allclose(ours, theirs, atol=1e-6)


def test_each_clip_skip_gives_something_else_and_none_is_the_bases_default(tiny_base: LoadedBase) -> None:
    one, two, three, default = (encode_prompts(tiny_base, ["a red apple"], skip).embeddings for skip in (1, 2, 3, None))

    assert torch.equal(default, two)
    assert (one - two).abs().mean() > 0.01
    assert (two - three).abs().mean() > 0.01


def test_a_clip_skip_beyond_the_layers_is_refused_with_what_is_allowed(tiny_base: LoadedBase) -> None:
    with pytest.raises(ConfigError, match=r"clip_skip 4 .* has 3 layers; choose 1 to 3"):
        encode_prompts(tiny_base, ["a red apple"], 4)


def test_prompts_are_padded_to_the_bases_own_length_and_do_not_touch_each_other(tiny_base: LoadedBase) -> None:
    prompts = ["", "a red apple", "a picture of a green house"]

    together = encode_prompts(tiny_base, prompts, None)

    assert together.embeddings.shape == (3, tiny_base.facts.max_tokens, 32)
    assert together.pooled is None
    for index, prompt in enumerate(prompts):
        alone = encode_prompts(tiny_base, [prompt], None).embeddings
        assert torch.allclose(together.embeddings[index], alone[0], atol=1e-5)


def test_a_prompt_that_is_too_long_is_cut_and_the_lost_text_is_logged(
    tiny_base: LoadedBase, caplog: pytest.LogCaptureFixture
) -> None:
    fits = " ".join(["apple"] * (tiny_base.facts.max_tokens - 2))
    with caplog.at_level(logging.WARNING):
        kept = encode_prompts(tiny_base, [fits], None).embeddings
        assert caplog.text == ""
        cut = encode_prompts(tiny_base, [f"{fits} green house"], None).embeddings

    assert "cut_off='green house'" in caplog.text
    assert torch.equal(kept, cut)


def test_no_prompt_at_all_is_refused(tiny_base: LoadedBase) -> None:
    with pytest.raises(ConfigError, match="no prompt"):
        encode_prompts(tiny_base, [], None)
