"""Prompts to embeddings: clip skip, padding, truncation."""

import logging
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from core.errors import ConfigError
from core.pipelines import LoadedBase
from core.prompt_chunks import literal_chunk, prompt_chunks
from core.text_encoding import added_conditions, encode_prompts


def test_clip_skip_1_is_the_encoders_ordinary_output(tiny_base: LoadedBase) -> None:
    ids = torch.tensor([literal_chunk(tiny_base.tokenizer, "a red apple", tiny_base.facts.max_tokens).ids])

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


def test_a_caption_that_is_too_long_is_cut_and_the_lost_text_is_logged(
    tiny_base: LoadedBase, caplog: pytest.LogCaptureFixture
) -> None:
    fits = " ".join(["apple"] * (tiny_base.facts.max_tokens - 2))
    with caplog.at_level(logging.WARNING):
        kept = encode_prompts(tiny_base, [fits], None, literal=True).embeddings
        assert caplog.text == ""
        cut = encode_prompts(tiny_base, [f"{fits} green house"], None, literal=True).embeddings

    assert "cut_off='green house'" in caplog.text
    assert torch.equal(kept, cut)


@pytest.mark.parametrize("prompt", ["", "a red apple", "a picture of a green house, style\n", "빨간 사과"])
def test_a_short_prompt_without_grammar_has_the_very_bytes_of_a_caption(tiny_base: LoadedBase, prompt: str) -> None:
    caption = encode_prompts(tiny_base, [prompt], None, literal=True)

    assert torch.equal(encode_prompts(tiny_base, [prompt], None).embeddings, caption.embeddings)


def test_captions_know_no_grammar(tiny_base: LoadedBase) -> None:
    plain, bracketed = (
        encode_prompts(tiny_base, [text], None, literal=True).embeddings for text in ("a cat", "a (cat AND [dog|cat])")
    )

    assert plain.shape == bracketed.shape
    assert not torch.equal(plain, bracketed)


def test_a_weight_scales_the_words_output_and_keeps_the_mean(tiny_base: LoadedBase) -> None:
    plain = encode_prompts(tiny_base, ["a red apple"], 1).embeddings[0]  # (tokens, dim)
    weighted = encode_prompts(tiny_base, ["a (red:1.5) apple"], 1).embeddings[0]

    expected = plain.clone()
    expected[2] *= 1.5  # behind the start token and "a"
    expected *= plain.mean() / expected.mean()
    assert torch.allclose(weighted, expected, atol=1e-5)
    assert weighted.mean().item() == pytest.approx(plain.mean().item(), abs=1e-6)


def test_a_weighted_prompt_does_not_touch_its_neighbours(tiny_base: LoadedBase) -> None:
    prompts = ["a cat", "a (red:1.5) apple", "a [blue] house"]
    together = encode_prompts(tiny_base, prompts, None).embeddings

    for index, prompt in enumerate(prompts):
        assert torch.allclose(together[index], encode_prompts(tiny_base, [prompt], None).embeddings[0], atol=1e-5)


def test_a_long_prompt_takes_chunks_and_short_ones_are_padded_to_the_same_length(tiny_base: LoadedBase) -> None:
    limit = tiny_base.facts.max_tokens
    long = " ".join(["apple"] * (limit - 2) + ["green", "house"])

    both = encode_prompts(tiny_base, ["a cat", long], None).embeddings

    assert both.shape == (2, 2 * limit, 32)
    for row, chunk, text in ((0, 0, "a cat"), (0, 1, ""), (1, 1, "green house")):
        alone = encode_prompts(tiny_base, [text], None).embeddings[0]
        assert torch.allclose(both[row, chunk * limit : (chunk + 1) * limit], alone, atol=1e-5)


def test_break_begins_a_chunk_and_a_full_chunk_breaks_behind_a_near_comma(tiny_base: LoadedBase) -> None:
    tokenizer, limit = tiny_base.tokenizer, tiny_base.facts.max_tokens

    def texts(prompt: str) -> list[str]:
        chunks = prompt_chunks(tokenizer, prompt, limit)
        return [str(tokenizer.decode(list(chunk.ids), skip_special_tokens=True)).strip() for chunk in chunks]

    assert texts("a cat BREAK a house") == ["a cat", "a house"]
    head = " ".join(["apple"] * 15)
    chunks = texts(f"{head}, a red cat of a blue house of a green cat")
    assert [chunk.replace(" ,", ",") for chunk in chunks] == [f"{head},", "a red cat of a blue house of a green cat"]


def test_a_prompt_of_far_too_many_chunks_or_with_a_lora_tag_is_refused(tiny_base: LoadedBase) -> None:
    with pytest.raises(ConfigError, match="chunks of 22 tokens, 16 are the most"):
        encode_prompts(tiny_base, ["cat " * 400], None)
    with pytest.raises(ConfigError, match=r"'emoji'.*give their files"):
        encode_prompts(tiny_base, ["a cat <lora:emoji:1>"], None)


def test_sd1_is_told_nothing_besides_the_text(tiny_base: LoadedBase) -> None:
    assert added_conditions(tiny_base, None, 64, 64) == {}


def test_no_prompt_at_all_is_refused(tiny_base: LoadedBase) -> None:
    with pytest.raises(ConfigError, match="no prompt"):
        encode_prompts(tiny_base, [], None)


def test_sdxl_embeddings_and_pooled_are_those_of_diffusers(
    tiny_sdxl_base: LoadedBase, tiny_sdxl_base_folder: Path
) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_base_folder, local_files_only=True)
    theirs, their_negative, their_pooled, their_negative_pooled = pipeline.encode_prompt(
        "a red apple", device="cpu", negative_prompt="a cat"
    )

    ours = encode_prompts(tiny_sdxl_base, ["a cat", "a red apple"], None, negatives=1)

    assert ours.pooled is not None
    assert torch.allclose(ours.embeddings, torch.cat([their_negative, theirs]), atol=1e-5)
    assert torch.allclose(ours.pooled, torch.cat([their_negative_pooled, their_pooled]), atol=1e-5)


def test_an_empty_negative_prompt_of_sdxl_is_zero_and_an_empty_prompt_is_not(tiny_sdxl_base: LoadedBase) -> None:
    both = encode_prompts(tiny_sdxl_base, ["", ""], None, negatives=1)

    assert both.pooled is not None
    assert both.embeddings[0].abs().max() == both.pooled[0].abs().max() == 0
    assert both.embeddings[1].abs().max() > 0
    assert both.pooled[1].abs().max() > 0


def test_sdxl_is_told_its_pooled_text_and_sizes_height_first(tiny_sdxl_base: LoadedBase) -> None:
    text = encode_prompts(tiny_sdxl_base, ["a cat", "a house"], None)

    added = added_conditions(tiny_sdxl_base, text.pooled, width=640, height=384)

    assert added["text_embeds"] is text.pooled
    assert added["time_ids"].tolist() == [[384, 640, 0, 0, 384, 640]] * 2


def test_a_long_weighted_prompt_of_sdxl_takes_chunks_of_both_encoders(tiny_sdxl_base: LoadedBase) -> None:
    limit = tiny_sdxl_base.facts.max_tokens
    plain = encode_prompts(tiny_sdxl_base, ["a red cat BREAK a house"], None)
    weighted = encode_prompts(tiny_sdxl_base, ["a (red:1.4) cat BREAK a house"], None)

    assert plain.embeddings.shape[1] == 2 * limit
    assert not torch.allclose(plain.embeddings[:, :limit], weighted.embeddings[:, :limit], atol=1e-3)
    assert torch.equal(plain.embeddings[:, limit:], weighted.embeddings[:, limit:])
    assert plain.pooled is not None
    assert weighted.pooled is not None
    assert torch.equal(plain.pooled, weighted.pooled)
