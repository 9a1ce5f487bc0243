"""Uploaded pictures: each is judged by its content, normalised, stored under its hash. Called by the API and the admin.

A picture's bytes are stored before its row, so no row ever points to nothing; a rejected picture leaves neither.
"""

import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import PurePosixPath
from typing import BinaryIO, cast

from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.db import transaction
from PIL.Image import Image

from core.errors import ImageRejected
from core.failpoints import side_effect
from core.image_gate import encode_png, normalise, open_image
from jobs.artifacts import artifact_put_stream, artifacts_pin, hash_stream
from jobs.errors import NotFound
from jobs.models import Dataset, DatasetImage, User

logger = logging.getLogger(__name__)

MAX_NAME_CHARACTERS = 255
MAX_CAPTION_CHARACTERS = 4000
SIDECAR_ENDING = ".txt"


class FileRejected(Exception):
    """One file of an upload is not accepted; the others go on."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass(frozen=True)
class Rejected:
    """A file that was left out: a stable word and a sentence."""

    name: str
    code: str
    reason: str


@dataclass
class Rejections:
    """Files of an upload that were left out."""

    rejected: list[Rejected] = field(default_factory=list)

    def reject(self, name: str, reason: FileRejected) -> None:
        """Note a file that was left out."""
        self.rejected.append(Rejected(name=name, code=reason.code, reason=reason.reason))


@dataclass
class UploadResult(Rejections):
    """What became of an upload's files."""

    images: list[DatasetImage] = field(default_factory=list)


def dataset_images_upload(*, dataset: Dataset, owner: User, files: Sequence[UploadedFile]) -> UploadResult:
    """Judge and store pictures and their sidecar captions; all rows appear together.

    Args:
        files: Pictures (PNG, JPEG, WebP), and `.txt` files that caption the picture of the same stem in this upload.

    Returns:
        The new rows in the order of the files, and every rejected file with its reason.

    Raises:
        NotFound: The dataset was deleted meanwhile.
        ArtifactMissing: The upload took so long that its first pictures were removed again: upload once more.
    """
    result = UploadResult()
    pictures, sidecars = sort_files(files, result)
    captions = _read_captions(sidecars, {stem_of(name) for name, _ in pictures}, result)
    seen = set(dataset.images.values_list("sha256", flat=True))
    accepted: list[DatasetImage] = []
    for name, file in pictures:
        try:
            image = _store_picture(name, file, seen)
        except FileRejected as reason:
            result.reject(name, reason)
            continue
        image.dataset, image.owner, image.caption = dataset, owner, captions.get(stem_of(name), "")
        seen.add(image.sha256)
        accepted.append(image)
    if accepted:
        _save_rows(dataset, accepted, result)
    logger.info(
        "upload dataset=%s accepted=%s rejected=%s", dataset.pk, len(result.images), [r.code for r in result.rejected]
    )
    return result


def label_of(name: str | None) -> str:
    """A file's name as a label: its last part only, never a path.

    Raises:
        FileRejected: Empty, too long, or holding control characters.
    """
    label = PurePosixPath((name or "").replace("\\", "/")).name.strip()
    if not label or label in (".", ".."):
        raise FileRejected("invalid_name", "the file has no name: give it one")
    if len(label) > MAX_NAME_CHARACTERS:
        raise FileRejected(
            "invalid_name", f"the name has {len(label)} characters, at most {MAX_NAME_CHARACTERS} are kept"
        )
    if any(unicodedata.category(character) == "Cc" for character in label):
        raise FileRejected("invalid_name", "the name holds control characters: rename the file")
    return label


def stem_of(name: str) -> str:
    """What a picture and its sidecar have in common."""
    return PurePosixPath(name).stem


def sort_files(
    files: Sequence[UploadedFile], result: Rejections
) -> tuple[list[tuple[str, UploadedFile]], list[tuple[str, UploadedFile]]]:
    """Pictures and sidecars, each with its label; what has no good name or is too large is rejected."""
    pictures: list[tuple[str, UploadedFile]] = []
    sidecars: list[tuple[str, UploadedFile]] = []
    limit = settings.LORASITE["UPLOAD_MAX_BYTES"]
    for file in files:
        try:
            name = label_of(file.name)
            if file.size and file.size > limit:
                raise FileRejected("file_too_large", f"larger than {limit} bytes, the most for one file: scale it down")
        except FileRejected as reason:
            result.reject((file.name or "")[:MAX_NAME_CHARACTERS], reason)
            continue
        (sidecars if name.lower().endswith(SIDECAR_ENDING) else pictures).append((name, file))
    return pictures, sidecars


def _read_captions(
    sidecars: Sequence[tuple[str, UploadedFile]], stems: set[str], result: UploadResult
) -> dict[str, str]:
    captions: dict[str, str] = {}
    for name, file in sidecars:
        try:
            if stem_of(name) not in stems:
                raise FileRejected("no_picture", f"no picture of this upload is named like it ({stem_of(name)!r})")
            captions[stem_of(name)] = _caption(file)
        except FileRejected as reason:
            result.reject(name, reason)
    return captions


def _caption(file: UploadedFile) -> str:
    # Four bytes a character at most, and a byte-order mark.
    raw = file.read(4 * MAX_CAPTION_CHARACTERS + 4)
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
        raise FileRejected("invalid_caption", f"not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    if len(text) > MAX_CAPTION_CHARACTERS or (file.size or 0) > len(raw):
        raise FileRejected("invalid_caption", f"more than {MAX_CAPTION_CHARACTERS} characters: shorten the caption")
    if any(ord(character) < 32 and character not in "\n\t" for character in text):
        raise FileRejected("invalid_caption", "holds control characters: remove them")
    return text


def _store_picture(name: str, file: UploadedFile, seen: set[str]) -> DatasetImage:
    """Gate, normalise and store one picture; returns its row without dataset and owner, not saved."""
    picture, png = judged(file)
    sha256, size_bytes = hash_stream(png)
    if sha256 in seen:
        raise FileRejected("duplicate", "the same picture is in this dataset already")
    artifact_put_stream(png)
    return DatasetImage(name=name, sha256=sha256, size_bytes=size_bytes, width=picture.width, height=picture.height)


def judged(file: UploadedFile) -> tuple[Image, BytesIO]:
    """An uploaded picture, upright and without metadata, and its bytes as PNG.

    Raises:
        FileRejected: The gate refuses it.
    """
    if not file.size:
        raise FileRejected("empty_file", "the file is empty (0 bytes): upload it again")
    try:
        picture = normalise(open_image(cast(BinaryIO, file.file)))
    except ImageRejected as error:
        raise FileRejected(error.code, str(error)) from error
    return picture, BytesIO(encode_png(picture))


def _save_rows(dataset: Dataset, accepted: list[DatasetImage], result: UploadResult) -> None:
    with transaction.atomic():
        # Two uploads into one dataset take turns, so that neither trips over the other's rows.
        if not Dataset.objects.select_for_update().filter(pk=dataset.pk).exists():
            raise NotFound(f"dataset {dataset.pk} was deleted during the upload")
        artifacts_pin(image.sha256 for image in accepted)
        taken = set(dataset.images.values_list("sha256", flat=True))
        for image in accepted:
            if image.sha256 in taken:
                result.reject(image.name, FileRejected("duplicate", "the same picture is in this dataset already"))
            else:
                with side_effect("upload.record"):
                    image.save(force_insert=True)
                result.images.append(image)
