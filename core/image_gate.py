"""The one door through which a foreign picture comes in: judged by content, bounded before decoding, metadata gone.

Called by the web tier, preprocessing and imports. Loads no ML library, and never trusts a file's name.
"""

import io
import logging
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from core.errors import ImageRejected

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 40_000_000
MAX_SIDE_PX = 16_384

# Pillow only warns below 179 megapixels; for the whole process, since changing filters per call is not thread-safe.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

# What Pillow's parsers are seen to raise on damaged files, beside OSError.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
)

# EXIF tag 0x0112, values 2-8 (value 1: upright).
ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(
    source: Path | BinaryIO,
    *,
    max_pixels: int = MAX_PIXELS,
    min_side_px: int = 1,
    draft_side_px: int | None = None,
) -> Image.Image:
    """Decode a picture, if it is one that we accept.

    Args:
        source: A path, or a seekable binary file, read from its start and left open.
        max_pixels: Width times height allowed, judged from the header before anything is decoded.
        min_side_px: The shorter side must have at least this.
        draft_side_px: A JPEG may be decoded smaller (1/2, 1/4, 1/8) as long as both sides stay at least this long:
            several times quicker for photographs. None decodes in full.

    Returns:
        The decoded picture in its own mode, its metadata still on it: give it to `normalise`.

    Raises:
        ImageRejected: Empty, no PNG, JPEG or WebP, damaged, animated, too large or too small.
    """
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                return open_image(file, max_pixels=max_pixels, min_side_px=min_side_px, draft_side_px=draft_side_px)
        except OSError as error:
            raise ImageRejected(f"the file cannot be read ({error.strerror}): upload it again") from error
    if source.seek(0, os.SEEK_END) == 0:
        raise ImageRejected("the file is empty (0 bytes): upload it again")
    source.seek(0)
    image = _read_header(source, max_pixels)
    width, height = image.size
    if width < 1 or height < 1 or max(width, height) > MAX_SIDE_PX or width * height > max_pixels:
        raise _too_large(f"{width} x {height} pixels", max_pixels)
    if min(width, height) < min_side_px:
        raise ImageRejected(
            f"{width} x {height} pixels is too small: the shorter side needs at least {min_side_px}; use a larger one"
        )
    # A JPEG of several pictures (MPO: stereo, depth and gain maps of telephones) is a photograph: its first one counts.
    if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
        raise ImageRejected(f"an animation of {image.n_frames} frames: save the frame you want as a still picture")  # type: ignore[attr-defined]
    if draft_side_px is not None:
        image.draft(None, (draft_side_px, draft_side_px))
    try:
        image.load()
    except DAMAGE as error:
        raise ImageRejected(f"the picture is damaged or cut off ({error}): export it again") from error
    return image


def normalise(image: Image.Image) -> Image.Image:
    """An upright RGB picture of 8 bits per channel without metadata, transparency laid over white.

    Args:
        image: From `open_image`, any mode.

    Returns:
        A new RGB picture; its `info` is empty. Colour profiles are dropped, not applied.
    """
    turn = TURNS.get(_orientation(image))
    if turn is not None:
        transparency = image.info.get("transparency")
        image = image.transpose(turn)
        if transparency is not None:
            image.info["transparency"] = transparency
    if image.mode.startswith("I"):
        # 16-bit grey: convert() would clip at 255 instead of scaling.
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    canvas = Image.new("RGB", image.size, "white")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        rgba = image.convert("RGBA")
        canvas.paste(rgba, mask=rgba.getchannel("A"))
    else:
        canvas.paste(image.convert("RGB"))
    return canvas


def encode_png(image: Image.Image) -> bytes:
    """A picture as PNG bytes: no metadata, and the same bytes for the same pixels."""
    file = io.BytesIO()
    bare = Image.new("RGB", image.size)
    bare.paste(image)
    bare.save(file, format="PNG", compress_level=6)
    return file.getvalue()


def _read_header(file: BinaryIO, max_pixels: int) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_large("far more pixels", max_pixels) from error
    except Image.UnidentifiedImageError as error:
        raise ImageRejected(
            "not a PNG, JPEG or WebP picture (judged by its content, not its name): save it as one of these"
        ) from error
    except DAMAGE as error:
        raise ImageRejected(f"the picture's header is damaged ({error}): export it again") from error


def _too_large(size: str, max_pixels: int) -> ImageRejected:
    return ImageRejected(
        f"{size} is too large: at most {max_pixels / 1e6:g} megapixels and {MAX_SIDE_PX} pixels a side; scale it down"
    )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except DAMAGE as error:
        logger.info("exif ignored reason=%r", error)
        return 1
