"""Files as the web has them: odd but good ones, and broken ones, each with its expected outcome."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from . import documents, graphics, illustrations, words
from .canvas import Canvas, Picture
from .edits import encode

BOMB_EDGE = 30_000  # pixels a side: 900 million pixels in about 110 kB

# How to store an upright picture so that the EXIF orientation turns it back.
_STORE = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class OddFile:
    """A file of a row. `picture` is what a right decoder sees (upright), None for a broken file.

    `data` is None where the row has no image. `format` is what the bytes are, None where they are
    no image at all. `reason` is the expected typed failure, None for a good file.
    """

    name: str
    data: bytes | None
    extension: str
    format: str | None
    picture: Picture | None = None
    reason: str | None = None


def _saved(image: Image.Image, format: str) -> bytes:
    out = io.BytesIO()
    image.save(out, format)
    return out.getvalue()


def exif_rotated(picture: Picture, orientation: int) -> bytes:
    """A JPEG whose pixels lie on their side and whose EXIF `orientation` says so."""
    stored = picture.image.transpose(_STORE[orientation])
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = orientation
    out = io.BytesIO()
    stored.save(out, "JPEG", quality=90, exif=exif)
    return out.getvalue()


def gray16(picture: Picture, rng: Random) -> bytes:
    """A 16-bit grey PNG that uses the low bits too."""
    gray = np.asarray(picture.image.convert("L")).astype(np.uint16)
    low = np.random.default_rng(rng.getrandbits(64)).integers(0, 257, gray.shape)
    deep = np.minimum(gray.astype(np.int64) * 256 + low, 65535).astype(np.uint16)
    return _saved(Image.fromarray(deep), "PNG")


def transparent_palette(picture: Picture) -> bytes:
    """A palette PNG whose corners are transparent (palette entry 255)."""
    paletted = picture.image.quantize(255)
    # Without an entry 255 of its own the encoder drops the transparency.
    colors = (paletted.getpalette() or [])[: 255 * 3]
    paletted.putpalette(colors + [0] * (256 * 3 - len(colors)))
    corners = Image.new("L", paletted.size, 255)
    ImageDraw.Draw(corners).rounded_rectangle(
        (0, 0, paletted.width - 1, paletted.height - 1), radius=24, fill=0
    )
    paletted.paste(255, (0, 0), corners)
    out = io.BytesIO()
    paletted.save(out, "PNG", transparency=255)
    return out.getvalue()


def animated_gif(frames: list[Picture]) -> bytes:
    first, *rest = [frame.image.quantize(128) for frame in frames]
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=rest, duration=400, loop=0)
    return out.getvalue()


def banner_ad(rng: Random, size: tuple[int, int]) -> Picture:
    """A wide, low advertisement: under any sensible limit of the short edge."""
    canvas = Canvas(illustrations.pattern(rng, size).image)
    width, height = size
    canvas.draw.rectangle((width * 0.2, 0, width * 0.8, height), (250, 246, 226))
    text = f"{words.event(rng)} - {rng.choice(words.MONTHS)}"
    px = height // 3
    canvas.text((width / 2, height / 2), text, "sans-bold", px, (40, 20, 20), "mm", width * 0.56)
    return canvas.picture("banner", ["banner"], [f"Banner for the {text}"])


def good_files(seed: str) -> Iterator[OddFile]:
    """Files that are odd but hold a good picture."""

    def rng(name: str) -> Random:
        return Random(f"{seed}/odd/{name}")

    name = "png_named_jpg"
    picture = graphics.poster(rng(name), 1)
    yield OddFile(name, encode(picture.image, "png"), "jpg", "png", picture)
    name = "jpeg_named_png"
    picture = documents.table(rng(name), 1)
    yield OddFile(name, encode(picture.image, "jpeg"), "png", "jpeg", picture)
    name = "animated_gif"
    template = documents.slide_template(rng(name), 1)
    frames = [documents.slide(template, rng(f"{name}/{i}"), i + 1) for i in range(3)]
    yield OddFile(name, animated_gif(frames), "gif", "gif", frames[0])
    name = "cmyk_jpeg"
    picture = graphics.label(rng(name), 0)
    yield OddFile(name, encode(picture.image.convert("CMYK"), "jpeg"), "jpg", "jpeg", picture)
    name = "gray_16_bit_png"
    picture = documents.chart(rng(name), 0)
    yield OddFile(name, gray16(picture, rng(f"{name}/low")), "png", "png", picture)
    name = "palette_png_transparent"
    picture = graphics.label(rng(name), 1)
    yield OddFile(name, transparent_palette(picture), "png", "png", picture)
    name = "gray_jpeg"
    picture = graphics.poster(rng(name), 0)
    yield OddFile(name, encode(picture.image.convert("L"), "jpeg"), "jpg", "jpeg", picture)
    for orientation in _STORE:
        name = f"exif_orientation_{orientation}"
        picture = graphics.sign(rng(name), orientation)
        yield OddFile(name, exif_rotated(picture, orientation), "jpg", "jpeg", picture)


def undersized_files(seed: str) -> Iterator[OddFile]:
    """Good files around the size limit of 256 px; all but one of them are under it."""

    def rng(name: str) -> Random:
        return Random(f"{seed}/small/{name}")

    sizes = {"short_edge_256": (340, 256), "short_edge_255": (340, 255), "thumbnail": (200, 150)}
    for name, size in sizes.items():
        picture = illustrations.landscape(rng(name), size)
        yield OddFile(name, encode(picture.image, "jpeg"), "jpg", "jpeg", picture)
    for name, size in {"banner_728x90": (728, 90), "banner_468x60": (468, 60)}.items():
        picture = banner_ad(rng(name), size)
        yield OddFile(name, encode(picture.image, "png"), "png", "png", picture)
    picture = illustrations.landscape(rng("panorama"), (1800, 200))
    yield OddFile("panorama", encode(picture.image, "jpeg"), "jpg", "jpeg", picture)
    dot = Picture(Image.new("RGB", (1, 1), (200, 30, 30)), "pixel", captions=["Spacer"])
    yield OddFile("one_pixel", encode(dot.image, "png"), "png", "png", dot)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def _png(width: int, height: int, depth: int, packed: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)  # grey, not interlaced
    chunks = (b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, data) for kind, data in chunks)


def bomb() -> bytes:
    """A valid one-bit PNG of 900 million black pixels."""
    packer = zlib.compressobj(9)
    rows = bytes((1 + BOMB_EDGE // 8) * 1000)  # a filter byte before each row
    packed = b"".join(packer.compress(rows) for _ in range(BOMB_EDGE // 1000)) + packer.flush()
    return _png(BOMB_EDGE, BOMB_EDGE, 1, packed)


_HTML = """<!DOCTYPE html>
<html><head><title>404 Not Found</title></head>
<body><h1>Not Found</h1><p>The picture {number} was moved.</p></body></html>
"""


def bad_files(seed: str) -> Iterator[OddFile]:
    """Files that must fail at ingest, each for its own reason."""
    rng = Random(f"{seed}/bad")
    noise = rng.randbytes(6000)
    marker_free = noise.replace(b"\xff", b"\x7f")  # 0xFF would start a JPEG segment
    photo_like = encode(graphics.sign(rng, 1).image, "jpeg")
    drawing = encode(graphics.poster(rng, 1).image, "png")
    webp = b"WEBPVP8 " + struct.pack("<I", len(noise)) + noise

    yield OddFile("random_bytes", b"\x01\x02" + noise, "jpg", None, reason="not_an_image")
    html = _HTML.format(number=rng.randint(1000, 9999)).encode()
    yield OddFile("html_page", html, "jpg", None, reason="not_an_image")
    yield OddFile("zero_bytes", b"", "jpg", None, reason="empty")
    garbage = photo_like[:20] + marker_free + b"\xff\xd9"
    yield OddFile("jpeg_garbage", garbage, "jpg", "jpeg", reason="corrupt")
    broken = _png(320, 320, 8, b"\x78\x9c" + b"\xff" * 4 + noise)
    yield OddFile("png_garbage", broken, "png", "png", reason="corrupt")
    riff = b"RIFF" + struct.pack("<I", len(webp)) + webp
    yield OddFile("webp_garbage", riff, "webp", "webp", reason="corrupt")
    for share in (35, 90):
        cut = photo_like[: len(photo_like) * share // 100]
        yield OddFile(f"jpeg_truncated_{share}", cut, "jpg", "jpeg", reason="truncated")
    cut = drawing[: len(drawing) * 2 // 3]
    yield OddFile("png_truncated", cut, "png", "png", reason="truncated")
    yield OddFile("png_bomb", bomb(), "png", "png", reason="too_many_pixels")
    for i in (1, 2):
        yield OddFile(f"no_image_{i}", None, "jpg", None, reason="no_image")
