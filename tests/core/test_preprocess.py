"""Preprocessing: from foreign pictures to a dataset."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.config import PreprocessConfig
from core.errors import Cancelled, DatasetError
from core.manifest import read_dataset
from core.preprocess import SourceImage, preprocess, preprocess_folder, read_source_folder
from core.progress import Progress

CONFIG = PreprocessConfig(resolution=64, bucket_step_px=16)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three good pictures of different shapes, a copy, and three bad files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.effect_noise((200, 100), 90).convert("RGB").save(folder / "a_wide-01.png")
    Image.new("RGB", (100, 150), "blue").save(folder / "b_tall.jpg", quality=95)
    Image.new("RGBA", (90, 90), (255, 0, 0, 128)).save(folder / "c_square.webp")
    (folder / "b_tall.txt").write_text("a tall blue thing\n", encoding="utf-8")
    (folder / "d_copy.png").write_bytes((folder / "a_wide-01.png").read_bytes())
    (folder / "e_empty.png").write_bytes(b"")
    (folder / "f_text.png").write_text("no picture", encoding="utf-8")
    Image.new("RGB", (31, 300)).save(folder / "g_thin.png")
    return folder


def test_good_pictures_are_kept_in_order_and_bad_ones_named_with_a_reason(pictures: Path, tmp_path: Path) -> None:
    result = preprocess(read_source_folder(pictures), CONFIG, tmp_path / "images")

    assert [(i.name, i.width, i.height, i.caption) for i in result.manifest.images] == [
        ("a_wide-01.png", 80, 48, "a wide"),
        ("b_tall.jpg", 48, 80, "a tall blue thing"),
        ("c_square.webp", 64, 64, "c square"),
    ]
    reasons = {rejected.name: rejected.reason for rejected in result.rejected}
    assert reasons.keys() == {"d_copy.png", "e_empty.png", "f_text.png", "g_thin.png"}
    assert "same file as a_wide-01.png" in reasons["d_copy.png"]
    assert "empty" in reasons["e_empty.png"]
    assert "not a PNG" in reasons["f_text.png"]
    assert "too small" in reasons["g_thin.png"]


def test_files_are_named_by_the_hash_of_their_bytes_and_have_the_size_of_the_manifest(
    pictures: Path, tmp_path: Path
) -> None:
    result = preprocess_folder(pictures, tmp_path / "dataset", CONFIG)

    dataset = read_dataset(tmp_path / "dataset")
    assert dataset.manifest == result.manifest
    for image in dataset.manifest.images:
        path = dataset.files[image.sha256]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == image.sha256
        with Image.open(path) as picture:
            assert picture.size == (image.width, image.height)
            assert picture.mode == "RGB"
            assert picture.info == {}
    assert sorted(path.name for path in (tmp_path / "dataset" / "images").iterdir()) == sorted(
        f"{image.sha256}.png" for image in dataset.manifest.images
    )


def test_the_same_pictures_and_configuration_give_the_same_manifest_and_another_configuration_another(
    pictures: Path, tmp_path: Path
) -> None:
    sources = read_source_folder(pictures)
    first = preprocess(sources, CONFIG, tmp_path / "one").manifest.content_hash()

    assert preprocess(sources, CONFIG, tmp_path / "two").manifest.content_hash() == first
    assert preprocess(sources, CONFIG, tmp_path / "one").manifest.content_hash() == first
    other = CONFIG.model_copy(update={"trigger_word": "zkx"})
    assert preprocess(sources, other, tmp_path / "one").manifest.content_hash() != first


def test_without_aspect_buckets_every_picture_is_cut_to_a_square_around_its_centre(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 100), "white")
    image.paste("red", (100, 0, 200, 100))
    image.save(tmp_path / "x.png")
    config = CONFIG.model_copy(update={"aspect_buckets": False})

    result = preprocess(read_source_folder(tmp_path), config, tmp_path / "images")

    (prepared,) = result.manifest.images
    with Image.open(tmp_path / "images" / f"{prepared.sha256}.png") as picture:
        assert picture.size == (64, 64)
        # Anti-aliasing may let the outermost pixels see a little of the white beside the crop.
        pixels = np.asarray(picture)
        assert (pixels[..., 0] == 255).all()
        assert pixels[..., 1:].max() < 30


def test_a_large_photograph_keeps_its_colours_through_the_quick_decoder(tmp_path: Path) -> None:
    gradient = Image.linear_gradient("L").resize((2000, 1200)).convert("RGB")
    gradient.save(tmp_path / "photo of a gradient.jpg", quality=95)

    result = preprocess(read_source_folder(tmp_path), CONFIG, tmp_path / "images")

    (prepared,) = result.manifest.images
    with Image.open(tmp_path / "images" / f"{prepared.sha256}.png") as picture:
        expected = Image.linear_gradient("L").resize(picture.size, Image.Resampling.LANCZOS)
        error = np.asarray(picture, dtype=np.int16)[..., 0] - np.asarray(expected, dtype=np.int16)
        assert np.abs(error).max() < 8


def test_every_picture_is_reported_and_a_cancellation_stops_at_once(pictures: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []

    def cancel_at_two(progress: Progress) -> None:
        seen.append(progress)
        if progress.step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        preprocess(read_source_folder(pictures), CONFIG, tmp_path / "images", cancel_at_two)

    assert [(progress.step, progress.total) for progress in seen] == [(1, 7), (2, 7)]
    assert len(list((tmp_path / "images").iterdir())) == 2


def test_nothing_left_is_an_error_that_gives_the_first_reason(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    source = SourceImage(name="bad.png", path=bad, sha256="0" * 64, caption=None)

    with pytest.raises(DatasetError, match=r"no picture is left of 1 files; first: bad.png: the file is empty"):
        preprocess([source], CONFIG, tmp_path / "images")


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "core.preprocess", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_writes_a_dataset_and_says_what_it_left_out(pictures: Path, tmp_path: Path) -> None:
    done = _run(pictures, tmp_path / "out", "--resolution", 64, "--bucket-step-px", 16, "--trigger-word", "zkx")

    assert done.returncode == 0, done.stderr
    dataset = read_dataset(tmp_path / "out")
    assert dataset.manifest.images[0].caption == "zkx, a wide"
    assert "left out e_empty.png: the file is empty" in done.stdout
    assert dataset.manifest.content_hash() in done.stdout
    assert "preparing pictures: 100%" in done.stderr


def test_the_command_refuses_a_wrong_option_with_one_sentence(pictures: Path, tmp_path: Path) -> None:
    done = _run(pictures, tmp_path / "out", "--resolution", 5)

    assert done.returncode == 1
    assert done.stderr.startswith("error: resolution: Input should be greater than or equal to 32")
    assert done.stderr.count("\n") == 1


def test_the_commands_help_describes_each_option_with_its_default() -> None:
    done = _run("--help")

    assert done.returncode == 0
    for word in ("--resolution", "Default: 512", "sidecar_or_filename", "--no-aspect-buckets", "example:"):
        assert word in done.stdout


def test_preprocessing_loads_no_machine_learning_library() -> None:
    code = "import sys, core.preprocess, core.preprocess_cli; print({'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.strip() == "set()"
