"""The pictures that the base model learns from."""

import random

import numpy as np
import pytest

from demo.base_pictures import BACKGROUNDS, HUES, Thing, caption, colour_of, draw, main_hue, own_colour, with_article


def disc(red: float, green: float, blue: float) -> np.ndarray:
    """(64, 64, 4): a disc of one colour, transparent around."""
    y, x = np.mgrid[:64, :64] - 31.5
    rgba = np.zeros((64, 64, 4), dtype=np.float32)
    rgba[..., :3] = (red, green, blue)
    rgba[..., 3] = x**2 + y**2 < 400
    return rgba


def thing(rgba: np.ndarray) -> Thing:
    return Thing(words=("ball",), rgba=rgba, hue=main_hue(rgba))


def test_a_red_disc_has_a_red_hue_and_a_grey_one_has_none() -> None:
    assert main_hue(disc(0.9, 0.1, 0.1)) == pytest.approx(0, abs=1)
    assert main_hue(disc(0.5, 0.5, 0.5)) is None
    assert own_colour(thing(disc(0.9, 0.1, 0.1))) == "red"


@pytest.mark.parametrize("colour", HUES)
def test_a_recoloured_thing_is_judged_to_have_that_colour(colour: str) -> None:
    ball = thing(disc(0.9, 0.1, 0.1))

    picture = draw(ball, colour, "white")

    assert colour_of(picture, ball.rgba[..., 3] > 0.5) == colour


@pytest.mark.parametrize("ground", BACKGROUNDS)
def test_a_background_lies_behind_the_thing_alone(ground: str) -> None:
    picture = draw(thing(disc(0.9, 0.1, 0.1)), None, ground)

    assert np.allclose(picture[0, 0] * 255, BACKGROUNDS[ground], atol=0.5)
    assert np.allclose(picture[32, 32], (0.9, 0.1, 0.1), atol=1e-6)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("apple", "an apple"),
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("blue apple", "a blue apple"),
        ("orange bell", "an orange bell"),
        ("grapes", "grapes"),
        ("pink scissors", "pink scissors"),
    ],
)
def test_an_article_is_put_where_people_say_one(words: str, expected: str) -> None:
    assert with_article(words) == expected


def test_captions_name_colour_and_background() -> None:
    dice = random.Random(0)

    captions = {caption("apple", "blue", "yellow", dice=dice) for _ in range(50)}

    assert len(captions) > 5
    assert all("blue apple" in text and "yellow" in text for text in captions)
