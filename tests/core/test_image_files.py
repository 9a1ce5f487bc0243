"""Generated pictures as files with infotext."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.config import ImageFormat
from core.image_files import ENDINGS, encode_picture, read_infotext, save_picture, save_png


def test_a_saved_picture_keeps_pixels_and_infotext_in_any_language_and_leaves_no_other_file(tmp_path: Path) -> None:
    image = Image.effect_noise((32, 32), 50).convert("RGB")
    path = tmp_path / "new" / "a.png"

    save_png(image, path, "빨간 사과\nSteps: 20")
    save_png(image, path, "빨간 사과\nSteps: 21")

    with Image.open(path) as saved:
        assert saved.info == {"parameters": "빨간 사과\nSteps: 21"}
        assert saved.tobytes() == image.tobytes()
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_infotext_writes_no_metadata(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", "")

    with Image.open(tmp_path / "a.png") as saved:
        assert saved.info == {}


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_jpeg_and_webp_carry_the_infotext_where_webui_looks_for_it(tmp_path: Path, image_format: ImageFormat) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (64, 64, 3))
    image, text = Image.fromarray(ramp.copy()), "빨간 사과, (red:1.2)\nSteps: 20, Sampler: Euler"
    path = tmp_path / f"a{ENDINGS[image_format]}"

    save_picture(image, path, text, image_format=image_format, quality=95)

    with Image.open(path) as saved:
        assert saved.format == image_format.upper()
        assert read_infotext(saved) == text
        # What piexif.helper.UserComment.dump(text, encoding="unicode") gives, by which WebUI writes and reads it.
        assert b"UNICODE\0" + text.encode("utf-16-be") in path.read_bytes()
        assert np.abs(np.asarray(saved.convert("RGB"), dtype=int) - np.asarray(image, dtype=int)).max() <= 8


def test_quality_is_a_matter_of_bytes() -> None:
    image = Image.effect_noise((64, 64), 50).convert("RGB")

    small, large = (encode_picture(image, "", image_format="jpeg", quality=quality) for quality in (30, 95))

    assert len(small) < len(large) / 2


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_a_picture_without_infotext_reads_as_none(image_format: ImageFormat) -> None:
    file = io.BytesIO(encode_picture(Image.new("RGB", (8, 8)), "", image_format=image_format))

    with Image.open(file) as picture:
        assert read_infotext(picture) == ""
