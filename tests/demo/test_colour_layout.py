"""The demo's figure on pictures whose distance is known."""

import numpy as np
import pytest
from PIL import Image

from demo.colour_layout import colour_layout, distance_to_dataset, fall_percent, layout_distance

WHITE, BLACK = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "black")


def test_black_and_white_are_one_apart_and_equal_pictures_zero() -> None:
    assert layout_distance(colour_layout(WHITE), colour_layout(BLACK)) == pytest.approx(1.0)
    assert layout_distance(colour_layout(WHITE), colour_layout(WHITE)) == 0.0


def test_a_cell_is_the_mean_of_its_pixels() -> None:
    picture = Image.new("RGB", (8, 8), "black")
    picture.putpixel((0, 0), (255, 0, 0))  # one of the four pixels of the first cell
    layout = colour_layout(picture)
    assert layout.shape == (4, 4, 3)
    assert layout[0, 0] == pytest.approx([0.25, 0, 0])
    assert np.abs(layout).sum() == pytest.approx(0.25)


def test_size_and_mode_do_not_matter_only_where_which_colour_lies() -> None:
    halves = Image.new("L", (64, 64), 255)
    halves.paste(0, (0, 0, 32, 64))
    larger = halves.convert("RGB").resize((256, 128), Image.Resampling.NEAREST)
    assert layout_distance(colour_layout(halves), colour_layout(larger)) == pytest.approx(0.0, abs=1e-6)
    assert layout_distance(colour_layout(halves), colour_layout(halves.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) == (
        pytest.approx(1.0)
    )


def test_sides_that_are_no_multiple_of_four_share_pixels_between_cells() -> None:
    layout = colour_layout(Image.new("RGB", (6, 6), (51, 102, 204)))
    assert layout[2, 1] == pytest.approx([0.2, 0.4, 0.8], abs=1e-6)


def test_mean_goes_over_the_whole_dataset_and_nearest_takes_the_best_of_it() -> None:
    grey = Image.new("RGB", (64, 64), (51, 51, 51))  # 0.2
    distance = distance_to_dataset([grey, WHITE], [BLACK, WHITE])
    assert distance.mean == pytest.approx((0.2 + 0.8 + 1 + 0) / 4)
    assert distance.nearest == pytest.approx((0.2 + 0) / 2)


def test_an_empty_side_is_refused() -> None:
    with pytest.raises(ValueError, match="0 pictures and 1 of the dataset"):
        distance_to_dataset([], [WHITE])


def test_fall_is_in_percent_of_the_first_value_and_negative_for_a_rise() -> None:
    assert fall_percent(0.4, 0.1) == pytest.approx(75)
    assert fall_percent(0.2, 0.3) == pytest.approx(-50)
