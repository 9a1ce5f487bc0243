"""Uploads of pictures to begin from and of masks. Called by the API; judged and stored as pictures of datasets are."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from django.core.files.uploadedfile import UploadedFile
from django.db import transaction

from core.failpoints import side_effect
from jobs.artifacts import artifact_put_stream, artifacts_pin
from jobs.models import InputImage, User
from jobs.uploads import FileRejected, Rejections, judged, sort_files


@dataclass
class InputUpload(Rejections):
    """What became of an upload's files."""

    images: list[InputImage] = field(default_factory=list)


def input_images_upload(*, owner: User, files: Sequence[UploadedFile]) -> InputUpload:
    """Judge and store pictures; one that this person uploaded before is answered with its row.

    Args:
        files: PNG, JPEG or WebP.

    Returns:
        A row for every accepted file in their order, and every rejected file with its reason.
    """
    result = InputUpload()
    pictures, others = sort_files(files, result)
    for name, _ in others:
        result.reject(name, FileRejected("image_rejected", "this is no picture: send PNG, JPEG or WebP files"))
    for name, file in pictures:
        try:
            picture, png = judged(file)
        except FileRejected as reason:
            result.reject(name, reason)
            continue
        sha256, size_bytes = artifact_put_stream(png)
        sizes = {"size_bytes": size_bytes, "width": picture.width, "height": picture.height}
        with transaction.atomic():
            artifacts_pin([sha256])
            with side_effect("input_image.record"):
                image, _ = InputImage.objects.get_or_create(
                    owner=owner, sha256=sha256, defaults={"name": name, **sizes}
                )
        result.images.append(image)
    return result
