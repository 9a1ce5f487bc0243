"""The image gate: what it lets in, what it refuses and with which sentence."""

import io
import resource
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from core.errors import ImageRejected
from core.image_gate import encode_png, normalise, open_image


def _encoded(image: Image.Image, format_name: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format=format_name, **options)
    return io.BytesIO(file.getvalue())


def _pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    colour = image.getpixel((x, y))
    assert isinstance(colour, tuple)
    return colour


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *chunks: bytes, depth: int = 1, colour: int = 0, data: bytes = b"") -> io.BytesIO:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = _chunk(b"IDAT", data or zlib.compress(bytes(1000)))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body + _chunk(b"IEND", b""))


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_are_accepted_from_a_file_and_from_a_path(format_name: str, tmp_path: Path) -> None:
    file = _encoded(Image.new("RGB", (20, 10), "red"), format_name, quality=100)
    path = tmp_path / "misleading_name.gif"
    path.write_bytes(file.getvalue())

    for image in (normalise(open_image(file)), normalise(open_image(path))):
        assert image.mode == "RGB"
        assert image.size == (20, 10)
        red, green, blue = _pixel(image, 5, 5)
        assert red > 245
        assert green < 10
        assert blue < 10


def test_a_zero_byte_file_is_rejected_with_a_reason() -> None:
    with pytest.raises(ImageRejected, match="empty"):
        open_image(io.BytesIO(b""))


def test_a_path_that_is_not_there_is_rejected_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ImageRejected, match="cannot be read"):
        open_image(tmp_path / "nothing.png")


@pytest.mark.parametrize(
    "content",
    [b"hello, I am a text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", b"PK\x03\x04" + bytes(40)],
)
def test_what_is_no_picture_is_rejected_whatever_it_is_called(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)

    with pytest.raises(ImageRejected, match="not a PNG, JPEG or WebP"):
        open_image(path)


@pytest.mark.parametrize("format_name", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_picture_formats_are_rejected(format_name: str) -> None:
    with pytest.raises(ImageRejected, match="not a PNG, JPEG or WebP"):
        open_image(_encoded(Image.new("RGB", (32, 32)), format_name))


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_picture_is_rejected_with_a_reason(format_name: str) -> None:
    noise = Image.effect_noise((128, 128), 80).convert("RGB")
    data = _encoded(noise, format_name).getvalue()

    with pytest.raises(ImageRejected, match=r"damaged|not a PNG"):
        open_image(io.BytesIO(data[: len(data) // 2]))


@pytest.mark.parametrize("format_name", ["PNG", "WEBP"])
def test_an_animation_is_rejected_with_its_number_of_frames(format_name: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    file = _encoded(frames[0], format_name, save_all=True, append_images=frames[1:])

    with pytest.raises(ImageRejected, match="animation of 3 frames"):
        open_image(file)


def test_the_first_picture_of_a_telephones_multi_picture_jpeg_is_taken() -> None:
    pictures = [Image.new("RGB", (32, 16), "red"), Image.new("RGB", (8, 8), "blue")]
    file = _encoded(pictures[0], "MPO", save_all=True, append_images=pictures[1:])

    assert normalise(open_image(file)).size == (32, 16)


def test_a_900_megapixel_bomb_is_rejected_without_using_memory() -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(ImageRejected, match="too large"):
        open_image(_png(30_000, 30_000))

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 20_000


@pytest.mark.parametrize(("width", "height"), [(13_000, 13_000), (8_000, 8_000), (17_000, 10), (10, 60_000)])
def test_a_picture_over_the_limits_is_rejected_from_its_header(width: int, height: int) -> None:
    with pytest.raises(ImageRejected, match="too large: at most 40 megapixels and 16384 pixels a side"):
        open_image(_png(width, height))


def test_the_pixel_limit_can_be_lowered() -> None:
    with pytest.raises(ImageRejected, match="20 x 20 pixels is too large"):
        open_image(_encoded(Image.new("RGB", (20, 20)), "PNG"), max_pixels=399)
    assert open_image(_encoded(Image.new("RGB", (20, 20)), "PNG"), max_pixels=400).size == (20, 20)


def test_a_compressed_text_bomb_in_a_png_is_rejected() -> None:
    bomb = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000), 9))

    with pytest.raises(ImageRejected, match="damaged"):
        open_image(_png(8, 8, bomb))


def test_a_picture_below_the_smallest_side_is_rejected_with_both_sizes() -> None:
    with pytest.raises(ImageRejected, match="40 x 31 pixels is too small: the shorter side needs at least 32"):
        open_image(_encoded(Image.new("RGB", (40, 31)), "PNG"), min_side_px=32)


def test_a_large_jpeg_is_decoded_smaller_only_while_both_sides_stay_long_enough() -> None:
    file = _encoded(Image.new("RGB", (1600, 800), "red"), "JPEG")

    assert open_image(file, draft_side_px=200).size == (400, 200)
    assert open_image(file).size == (1600, 800)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("red", (0, 0, 16, 8))  # the upper left quarter
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation

    image = normalise(open_image(_encoded(stored, "PNG", exif=exif)))

    assert image.size == (32, 16)
    assert _pixel(image, 4, 4) == (255, 0, 0)
    assert _pixel(image, 28, 4) == (255, 255, 255)
    assert _pixel(image, 4, 12) == (255, 255, 255)


def test_no_metadata_is_left_after_normalising_and_encoding() -> None:
    exif = Image.Exif()
    exif[0x010F] = "SecretCameraMaker"
    exif.get_ifd(0x8825)[1] = "N"
    file = _encoded(
        Image.new("RGB", (16, 16), "red"), "JPEG", exif=exif, comment=b"secret comment", icc_profile=b"secret"
    )

    image = normalise(open_image(file))
    data = encode_png(image)

    assert b"Secret" in file.getvalue()
    assert image.info == {}
    assert len(image.getexif()) == 0
    kinds, offset = [], 8
    while offset < len(data):
        length, kind = struct.unpack(">I4s", data[offset : offset + 8])
        kinds.append(kind)
        offset += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]


def test_a_damaged_exif_block_does_not_reject_the_picture() -> None:
    file = _encoded(Image.new("RGB", (16, 16), "red"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")

    assert normalise(open_image(file)).size == (16, 16)


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.putpixel((1, 1), (255, 0, 0, 255))
    image.putpixel((2, 2), (0, 0, 0, 128))

    flat = normalise(open_image(_encoded(image, "PNG")))

    assert flat.getpixel((0, 0)) == (255, 255, 255)
    assert flat.getpixel((1, 1)) == (255, 0, 0)
    assert flat.getpixel((2, 2)) == (127, 127, 127)


def test_a_palette_with_a_transparent_entry_is_laid_over_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((3, 3), 1)

    flat = normalise(open_image(_encoded(image, "PNG", transparency=0)))

    assert flat.getpixel((0, 0)) == (255, 255, 255)
    assert flat.getpixel((3, 3)) == (200, 0, 0)


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    rows = b"".join(b"\0" + struct.pack(">4H", 0, 257 * 50, 257 * 200, 65535) for _ in range(4))
    file = _png(4, 4, depth=16, data=zlib.compress(rows))

    image = normalise(open_image(file))

    assert [_pixel(image, x, 0)[0] for x in range(4)] == [0, 50, 200, 255]


@pytest.mark.parametrize(
    ("mode", "colour", "format_name", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), "JPEG", (255, 0, 0)),
        ("L", 100, "PNG", (100, 100, 100)),
        ("LA", (100, 255), "PNG", (100, 100, 100)),
        ("1", 1, "PNG", (255, 255, 255)),
    ],
)
def test_other_modes_become_rgb(
    mode: str, colour: float | tuple[float, ...], format_name: str, expected: tuple[int, int, int]
) -> None:
    image = normalise(open_image(_encoded(Image.new(mode, (16, 16), colour), format_name)))

    assert image.mode == "RGB"
    assert all(abs(got - want) <= 4 for got, want in zip(_pixel(image, 8, 8), expected, strict=True))


def test_the_same_pixels_give_the_same_png_bytes() -> None:
    noise = Image.effect_noise((64, 64), 60).convert("RGB")
    tagged = noise.copy()
    tagged.info["comment"] = "different metadata"

    assert encode_png(noise) == encode_png(tagged)
    assert Image.open(io.BytesIO(encode_png(noise))).tobytes() == noise.tobytes()
