"""The demo's figure: how near generated pictures come to a dataset's colour layout. Pure numbers, no model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Layout = npt.NDArray[np.float64]

CELLS = 4
"""A picture's layout is the mean colour of each cell of a 4x4 grid: where which colour lies, no detail."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Distances of some pictures to a dataset, 0 (same layout) to 1 (black against white).

    Attributes:
        mean: To all pictures of the dataset, averaged.
        nearest: To the nearest picture of the dataset, averaged over the pictures.
    """

    mean: float
    nearest: float


def colour_layout(picture: Image.Image) -> Layout:
    """Mean RGB of each of 4x4 cells.

    Args:
        picture: Any mode and size; sides need not be multiples of 4.

    Returns:
        (4, 4, 3), in [0, 1].
    """
    # A box filter to 4x4 pixels is the mean of each cell, also where a cell ends within a pixel.
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255  # (h, w, 3)
    channels = [
        np.asarray(Image.fromarray(pixels[..., channel]).resize((CELLS, CELLS), Image.Resampling.BOX))
        for channel in range(3)
    ]
    return np.stack(channels, axis=-1).astype(np.float64)


def layout_distance(a: Layout, b: Layout) -> float:
    """Mean absolute difference of two layouts, 0 to 1."""
    return float(np.abs(a - b).mean())


def distance_to_dataset(pictures: Sequence[Image.Image], dataset: Sequence[Image.Image]) -> Distance:
    """How far `pictures` are from `dataset`.

    Raises:
        ValueError: One of the two is empty.
    """
    if not pictures or not dataset:
        raise ValueError(f"{len(pictures)} pictures and {len(dataset)} of the dataset: both need at least one")
    goals = [colour_layout(picture) for picture in dataset]
    rows = [[layout_distance(colour_layout(picture), goal) for goal in goals] for picture in pictures]
    table = np.array(rows)  # (pictures, dataset)
    return Distance(mean=float(table.mean()), nearest=float(table.min(axis=1).mean()))


def fall_percent(before: float, after: float) -> float:
    """By how many percent `after` is below `before`; negative where it rose."""
    return 100 * (1 - after / before)
