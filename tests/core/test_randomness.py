"""Random numbers depend on their words alone."""

import torch

from core.randomness import generator, normal, uniform


def test_the_same_words_give_the_same_numbers_whatever_was_drawn_before() -> None:
    first = normal((3, 4), 5, "noise", 10, 2)
    torch.manual_seed(99)
    torch.randn(7)
    normal((2,), 5, "noise", 11, 2)
    assert torch.equal(first, normal((3, 4), 5, "noise", 10, 2))


def test_other_seeds_steps_samples_and_purposes_give_other_numbers() -> None:
    words: list[tuple[int, str, int, int]] = [
        (5, "noise", 10, 2),
        (6, "noise", 10, 2),
        (5, "noise", 1, 2),
        (5, "noise", 10, 3),
        (5, "offset", 10, 2),
    ]
    drawn = [tuple(normal((4,), *each).tolist()) for each in words]
    assert len(set(drawn)) == len(words)


def test_words_do_not_run_together() -> None:
    assert uniform(0, "a", 12, 3) != uniform(0, "a", 1, 23)
    assert uniform(0, "1") != uniform(0, 1)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    before = torch.get_rng_state()
    normal((100,), 0, "x")
    generator(3, "y")
    assert torch.equal(before, torch.get_rng_state())


def test_uniform_numbers_fill_the_unit_interval() -> None:
    values = torch.tensor([uniform(1, "u", index) for index in range(2000)])
    assert values.min() >= 0 and values.max() < 1
    assert abs(float(values.mean()) - 0.5) < 0.02
