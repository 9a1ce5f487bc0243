"""What a caption is in a step."""

from collections import Counter

from core.caption_variants import caption_at, shuffled
from tests.core.training_parts import quick_config

TAGS = "ink style, a cat, red hat , garden,, night"


def test_parts_come_in_all_orders_and_the_kept_ones_stay_in_front() -> None:
    config = quick_config(shuffle_captions=True, keep_tokens=1, caption_dropout=0.0)
    seen = [caption_at(TAGS, config, step, 0) for step in range(400)]
    assert {text.split(", ")[0] for text in seen} == {"ink style"}
    assert {tuple(sorted(text.split(", "))) for text in seen} == {("a cat", "garden", "ink style", "night", "red hat")}
    assert len(set(seen)) == 24
    second = Counter(text.split(", ")[1] for text in seen)
    assert min(second.values()) > 60


def test_the_order_depends_on_seed_step_and_sample_alone() -> None:
    config = quick_config(shuffle_captions=True, caption_dropout=0.0)
    assert [shuffled(TAGS, config, 3, sample) for sample in range(8)] == [
        shuffled(TAGS, config, 3, sample) for sample in range(8)
    ]
    assert len({shuffled(TAGS, config, 3, sample) for sample in range(8)}) > 1
    other = quick_config(shuffle_captions=True, caption_dropout=0.0, seed=8)
    assert [shuffled(TAGS, other, step, 0) for step in range(8)] != [
        shuffled(TAGS, config, step, 0) for step in range(8)
    ]


def test_another_separator_keeps_commas_together() -> None:
    config = quick_config(shuffle_captions=True, caption_separator=";", caption_dropout=0.0)
    seen = {shuffled("a cat, sitting; at night", config, step, 0) for step in range(30)}
    assert seen == {"a cat, sitting; at night", "at night; a cat, sitting"}


def test_a_caption_that_is_not_shuffled_stays_letter_by_letter() -> None:
    config = quick_config(caption_dropout=0.0)
    assert caption_at(TAGS, config, 0, 0) == TAGS


def test_dropped_captions_are_empty_as_often_as_asked() -> None:
    config = quick_config(shuffle_captions=True, caption_dropout=0.3)
    empty = sum(not caption_at(TAGS, config, step, sample) for step in range(100) for sample in range(8))
    assert 190 < empty < 290
