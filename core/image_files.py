"""Writes generated pictures as PNG, JPEG or WebP files with the infotext that WebUI users know, and reads it back."""

import io
import os
import tempfile
from pathlib import Path

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from core.config import ImageFormat
from core.infotext import infotext

__all__ = ["CONTENT_TYPES", "ENDINGS", "encode_picture", "infotext", "read_infotext", "save_picture", "save_png"]

CONTENT_TYPES: dict[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
ENDINGS: dict[str, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}

# EXIF 2.3, section 4.6.5: eight bytes name the encoding. WebUI writes big-endian UTF-16 (piexif's "unicode").
_UNICODE = b"UNICODE\0"


def encode_picture(image: Image.Image, infotext: str, *, image_format: ImageFormat = "png", quality: int = 90) -> bytes:
    """The bytes of a picture file.

    Args:
        image: RGB.
        infotext: Goes into the text chunk "parameters" of a PNG, else into EXIF's UserComment; "" writes neither.
        image_format: png, jpeg or webp.
        quality: Of jpeg and webp, 1-100.
    """
    file = io.BytesIO()
    if image_format == "png":
        info = PngInfo()
        if infotext:
            info.add_text("parameters", infotext)
        image.save(file, format="PNG", pnginfo=info)
        return file.getvalue()
    exif = Image.Exif()
    if infotext:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _UNICODE + infotext.encode("utf-16-be")
    image.save(file, format=image_format.upper(), quality=quality, exif=exif.tobytes() if infotext else b"")
    return file.getvalue()


def read_infotext(image: Image.Image) -> str:
    """The infotext of a picture that this or another tool wrote; "" where there is none.

    Args:
        image: Just opened, not converted.
    """
    written = image.info.get("parameters")
    if isinstance(written, str):
        return written
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    if isinstance(comment, str):
        return comment
    if comment.startswith(_UNICODE):
        return str(comment[len(_UNICODE) :].decode("utf-16-be", errors="replace"))
    return str(comment.removeprefix(b"ASCII\0\0\0").decode("utf-8", errors="replace")).strip("\0")


def save_picture(
    image: Image.Image, path: Path, infotext: str, *, image_format: ImageFormat = "png", quality: int = 90
) -> None:
    """Write a picture; it is there complete or not at all.

    Args:
        image: An RGB picture made by `core.generate`.
        path: Its folder is made where missing; a file there is replaced.
        infotext: From `infotext`, or "" for none.
        image_format: png, jpeg or webp, whatever the path's ending (`ENDINGS`) is.
        quality: Of jpeg and webp, 1-100.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(encode_picture(image, infotext, image_format=image_format, quality=quality))
        file.flush()
        os.fsync(file.fileno())  # a resumed training takes a picture that is there for a whole one
    Path(partial).chmod(0o644)
    Path(partial).replace(path)


def save_png(image: Image.Image, path: Path, infotext: str) -> None:
    """`save_picture` as PNG."""
    save_picture(image, path, infotext)
