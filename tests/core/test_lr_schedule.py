"""The learning rate of a step."""

import pytest

from core.lr_schedule import lr_at
from tests.core.training_parts import quick_config


def test_warm_up_rises_in_a_line_to_the_peak() -> None:
    config = quick_config(learning_rate=1.0, lr_warmup_steps=4, steps=10, lr_schedule="constant")
    assert [lr_at(step, config) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_to_zero_one_step_after_the_last() -> None:
    config = quick_config(learning_rate=1.0, steps=4, lr_schedule="linear")
    assert [lr_at(step, config) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_cosine_passes_half_in_the_middle_and_never_goes_negative() -> None:
    config = quick_config(learning_rate=1.0, steps=100, lr_schedule="cosine")
    assert lr_at(0, config) == 1.0
    assert lr_at(50, config) == pytest.approx(0.5)
    assert 0 < lr_at(99, config) < 0.001
    assert lr_at(150, config) == pytest.approx(0.0)


def test_a_warm_up_as_long_as_the_training_is_no_division_by_zero() -> None:
    config = quick_config(learning_rate=1.0, lr_warmup_steps=8, steps=8)
    assert lr_at(7, config) == 1.0
    assert lr_at(8, config) == pytest.approx(1.0)


def test_restarts_fall_from_the_peak_again_and_end_at_zero() -> None:
    config = quick_config(learning_rate=1.0, steps=8, lr_schedule="cosine_with_restarts", lr_cycles=2)
    once = quick_config(learning_rate=1.0, steps=4, lr_schedule="cosine")
    fall = [lr_at(step, once) for step in range(4)]
    assert [lr_at(step, config) for step in range(8)] == pytest.approx(fall + fall)
    assert lr_at(8, config) == pytest.approx(0.0)


def test_polynomial_falls_as_a_square() -> None:
    config = quick_config(learning_rate=1.0, steps=4, lr_schedule="polynomial")
    assert [lr_at(step, config) for step in range(5)] == [1.0, 0.5625, 0.25, 0.0625, 0.0]
