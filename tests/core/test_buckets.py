"""Aspect buckets."""

import pytest

from core.buckets import bucket_sizes, cover_box, nearest_bucket


@pytest.mark.parametrize(("resolution", "step", "max_aspect"), [(512, 64, 2.0), (64, 16, 2.0), (1024, 64, 4.0)])
def test_buckets_keep_to_step_area_and_aspect(resolution: int, step: int, max_aspect: float) -> None:
    sizes = bucket_sizes(resolution, step, max_aspect)

    assert (resolution, resolution) in sizes
    assert len(sizes) > 1
    assert len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= resolution * resolution
        assert max(width, height) / min(width, height) <= max_aspect
        assert (height, width) in sizes


def test_the_buckets_of_512_are_those_of_kohya() -> None:
    assert bucket_sizes(512, 64, 2.0) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]


def test_an_aspect_of_one_leaves_only_the_square() -> None:
    assert bucket_sizes(512, 64, 1.0) == [(512, 512)]


def test_a_resolution_between_two_steps_is_rounded_down() -> None:
    assert bucket_sizes(500, 64, 1.0) == [(448, 448)]


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((1000, 1000), (512, 512)), ((4000, 3000), (576, 448)), ((3000, 4000), (448, 576)), ((9000, 100), (640, 384))],
)
def test_a_picture_goes_to_the_bucket_of_nearest_aspect(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert nearest_bucket(*size, bucket_sizes(512, 64, 2.0)) == bucket


def test_of_two_equally_near_buckets_the_larger_is_taken() -> None:
    assert nearest_bucket(100, 100, [(32, 32), (64, 64)]) == (64, 64)


def test_the_crop_is_centred_and_has_the_buckets_aspect() -> None:
    assert cover_box(200, 100, (50, 50)) == (50, 0, 150, 100)
    left, top, right, bottom = cover_box(333, 777, (384, 640))
    assert (right - left) / (bottom - top) == pytest.approx(384 / 640)
    assert left + right == pytest.approx(333)
    assert top + bottom == pytest.approx(777)
    assert min(left, top) >= 0
