"""Turns foreign pictures into a prepared dataset: each gated, cut to its bucket, captioned and named by its hash.

    python -m core.preprocess SOURCE_FOLDER DESTINATION_FOLDER --resolution 64 --bucket-step-px 16

Called by the `preprocess` job and the command lines; loads no ML library.
"""

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path

from PIL import Image

from core.buckets import Size, bucket_sizes, cover_box, nearest_bucket
from core.captions import make_caption
from core.config import PreprocessConfig
from core.errors import DatasetError, ImageRejected
from core.image_gate import encode_png, normalise, open_image
from core.manifest import MANIFEST_NAME, DatasetManifest, PreparedImage
from core.progress import Progress, Report, silent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """A file that a person gave.

    Attributes:
        name: Its file name, a label only; never used as a path.
        path: Where its bytes lie.
        sha256: Of its bytes.
        caption: Text given beside it, None where there is none.
    """

    name: str
    path: Path
    sha256: str
    caption: str | None


@dataclass(frozen=True, kw_only=True)
class RejectedImage:
    """A file that was left out, and the sentence that says why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PreprocessResult:
    """The dataset that came out, in the order of the sources, and what was left out."""

    manifest: DatasetManifest
    rejected: tuple[RejectedImage, ...]


def preprocess(
    sources: Sequence[SourceImage], config: PreprocessConfig, images_folder: Path, report: Report = silent
) -> PreprocessResult:
    """Prepare pictures for training. The same sources and configuration give the same manifest.

    Args:
        sources: In the order of the dataset.
        config: Sizes and captions.
        images_folder: Gets `<sha256>.png` for each picture; files that are there already are kept.
        report: Called after each picture.

    Returns:
        The manifest and the rejected files; one bad file never stops the rest.

    Raises:
        DatasetError: No picture is left.
    """
    images_folder.mkdir(parents=True, exist_ok=True)
    max_aspect = config.max_aspect_ratio if config.aspect_buckets else 1.0
    buckets = bucket_sizes(config.resolution, config.bucket_step_px, max_aspect)
    images: list[PreparedImage] = []
    rejected: list[RejectedImage] = []
    first_names: dict[str, str] = {}
    for step, source in enumerate(sources, start=1):
        if source.sha256 in first_names:
            reason = f"the same file as {first_names[source.sha256]}, which is kept; nothing to do"
            rejected.append(RejectedImage(name=source.name, reason=reason))
        else:
            first_names[source.sha256] = source.name
            try:
                images.append(_prepare(source, config, buckets, images_folder))
            except ImageRejected as error:
                logger.info("picture rejected name=%r reason=%s", source.name, error)
                rejected.append(RejectedImage(name=source.name, reason=str(error)))
        figures = {"kept": float(len(images)), "rejected": float(len(rejected))}
        report(Progress(stage="preparing pictures", step=step, total=len(sources), figures=figures))
    if not images:
        first = f"; first: {rejected[0].name}: {rejected[0].reason}" if rejected else ""
        raise DatasetError(f"no picture is left of {len(sources)} files{first}")
    return PreprocessResult(manifest=DatasetManifest(config=config, images=tuple(images)), rejected=tuple(rejected))


def preprocess_folder(
    source: Path, destination: Path, config: PreprocessConfig, report: Report = silent
) -> PreprocessResult:
    """Prepare a folder of pictures into `destination`, which `core.manifest.read_dataset` then opens.

    Args:
        source: Pictures, each with its caption in a .txt of the same name or without one.
        destination: Gets `manifest.json` and `images/`.
        config: Sizes and captions.
        report: Called after each picture.

    Raises:
        DatasetError: No such folder, or no picture is left.
    """
    result = preprocess(read_source_folder(source), config, destination / "images", report)
    text = json.dumps(result.manifest.to_json(), indent=1, ensure_ascii=False) + "\n"
    _write_atomically(destination / MANIFEST_NAME, text.encode())
    return result


def read_source_folder(folder: Path) -> list[SourceImage]:
    """All files of a folder but hidden ones, by name; `.txt` files are captions of the pictures beside them.

    Raises:
        DatasetError: No such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder: give a folder of pictures")
    sources = []
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.suffix.lower() == ".txt":
            continue
        sidecar = path.with_suffix(".txt")
        caption = sidecar.read_text(encoding="utf-8", errors="replace") if sidecar.is_file() else None
        with path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        sources.append(SourceImage(name=path.name, path=path, sha256=digest, caption=caption))
    if not sources:
        raise DatasetError(f"{folder} holds no pictures: put PNG, JPEG or WebP files there")
    return sources


def _prepare(
    source: SourceImage, config: PreprocessConfig, buckets: Sequence[Size], images_folder: Path
) -> PreparedImage:
    # Twice the longest side of any bucket is enough for a sharp result, and quick to decode.
    draft_side_px = 2 * max(max(size) for size in buckets)
    image = normalise(open_image(source.path, min_side_px=config.min_side_px, draft_side_px=draft_side_px))
    bucket = nearest_bucket(*image.size, buckets)
    box = cover_box(*image.size, bucket)
    # reducing_gap: whole pixels are averaged down to 3 times the target first, which LANCZOS then finishes.
    png = encode_png(image.resize(bucket, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0))
    digest = sha256(png).hexdigest()
    path = images_folder / f"{digest}.png"
    if not path.is_file():
        _write_atomically(path, png)
    return PreparedImage(
        sha256=digest,
        source_sha256=source.sha256,
        name=source.name,
        width=bucket[0],
        height=bucket[1],
        caption=make_caption(source.name, source.caption, config),
    )


def _write_atomically(path: Path, data: bytes) -> None:
    handle, partial = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    Path(partial).chmod(0o644)
    Path(partial).replace(path)


if __name__ == "__main__":
    # Here and not at the top: a worker that only preprocesses needs neither this nor tqdm.
    from core.command_line import run_command
    from core.preprocess_cli import main

    run_command(main)
