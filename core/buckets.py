"""Aspect buckets: the few sizes that training pictures are cut to. Numbers only, no picture is touched here."""

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""(width, height) in pixels."""


def bucket_sizes(resolution: int, step: int, max_aspect: float) -> list[Size]:
    """The buckets of a training resolution: sides are multiples of `step`, the area is at most that of the square.

    The rule of kohya sd-scripts (`make_bucket_resolutions`), with the extremes cut by aspect instead of by side.

    Args:
        resolution: Side of the square in pixels; rounded down to a multiple of `step`.
        step: Pixels; a VAE and UNet accept only such sizes.
        max_aspect: Longest side over shortest side of the most extreme bucket, >= 1. 1 leaves only the square.

    Returns:
        (width, height) pairs from tall to wide, the square among them; each has its mirror image.
    """
    side = resolution // step * step
    sizes = {(side, side)}
    width = side + step
    while True:
        height = side * side // width // step * step
        if height < step or width / height > max_aspect:
            break
        sizes |= {(width, height), (height, width)}
        width += step
    return sorted(sizes)


def nearest_bucket(width: int, height: int, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest (by its logarithm), the larger one of two equally near.

    Args:
        width: Of the picture in pixels.
        height: Of the picture in pixels.
        buckets: At least one.
    """
    aspect = math.log(width / height)
    return min(
        buckets, key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1], size)
    )


def cover_box(width: int, height: int, bucket: Size) -> tuple[float, float, float, float]:
    """The centred part of a picture that has the bucket's aspect: left, top, right, bottom in pixels."""
    scale = max(bucket[0] / width, bucket[1] / height)
    part_width, part_height = min(width, bucket[0] / scale), min(height, bucket[1] / scale)
    left, top = (width - part_width) / 2, (height - part_height) / 2
    return left, top, left + part_width, top + part_height
