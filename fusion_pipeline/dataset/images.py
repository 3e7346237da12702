"""The one safe image decoder.

Every byte is hostile: the size is checked before pixels are decoded, only formats named here are
tried, and each failure has a typed reason. Nothing else in the project decodes an image.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

RGB = npt.NDArray[np.uint8]
"""uint8 [height, width, 3], red first, EXIF-upright."""

MAX_PIXELS = 100_000_000
"""Default limit of width x height; a larger image is refused before its pixels are decoded."""


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class DecodeReason(StrEnum):
    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    """No known image signature: an error page, random bytes."""
    CORRUPT = "corrupt"
    """A known signature, but the content can't be decoded."""
    TRUNCATED = "truncated"
    """The end of the file is missing."""
    TOO_MANY_PIXELS = "too_many_pixels"
    UNSUPPORTED = "unsupported"
    """Decodable, but of a pixel type that has no faithful 8-bit picture (32-bit float)."""


class DecodeError(Exception):
    """An image that can't be used, with its typed reason."""

    def __init__(self, reason: DecodeReason, detail: str = "") -> None:
        detail = _ADDRESS.sub("", detail)  # reasons are stored: they must not vary
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ImageInfo:
    format: str
    """Lower-case format found in the bytes: jpeg, png, webp, gif, bmp, tiff."""
    width: int
    """Pixels in the upright frame."""
    height: int
    orientation: int
    """EXIF orientation, 1..8; 1 for a TIFF, which Pillow turns upright by itself."""
    mode: str
    """Pillow's name of the stored pixel type: RGB, CMYK, I;16, P, ..."""
    animated: bool

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "ImageInfo":
        """Of a row of a `samples` table."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})


EXTENSIONS = {
    "jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif", "bmp": "bmp", "tiff": "tiff",
}  # fmt: skip

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _sniff(data: bytes) -> str | None:
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:2] == b"BM":
        return "bmp"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    return None


def _is_cut_off(data: bytes, kind: str) -> bool:
    """Whether the format's own end mark or declared length is missing."""
    if kind == "jpeg":
        return b"\xff\xd9" not in data[-64:]
    if kind == "png":
        return b"IEND" not in data[-64:]
    if kind == "webp":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    if kind == "gif":
        return data.rstrip(b"\0")[-1:] != b"\x3b"
    return False


@contextlib.contextmanager
def _typed_errors(data: bytes, kind: str) -> Iterator[None]:
    """Turns what Pillow raises on damaged bytes into a DecodeError."""
    try:
        yield
    except (DecodeError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError(DecodeReason.TOO_MANY_PIXELS, str(error)) from error
    except Exception as error:  # plugins raise struct.error, IndexError, anything
        unreadable = isinstance(error, UnidentifiedImageError)
        cut = _is_cut_off(data, kind) or (not unreadable and "truncated" in str(error))
        reason = DecodeReason.TRUNCATED if cut else DecodeReason.CORRUPT
        raise DecodeError(reason, "unreadable header" if unreadable else str(error)) from error


def _open(data: bytes, max_pixels: int) -> tuple[Image.Image, str]:
    if not data:
        raise DecodeError(DecodeReason.EMPTY)
    kind = _sniff(data)
    if kind is None:
        raise DecodeError(DecodeReason.NOT_AN_IMAGE, f"starts with {data[:8]!r}")
    with warnings.catch_warnings(), _typed_errors(data, kind):
        # Pillow's own limit warns below ours; the check that counts is the next one.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=[kind.upper()])
    if image.width * image.height > max_pixels:
        raise DecodeError(
            DecodeReason.TOO_MANY_PIXELS, f"{image.width} x {image.height}, limit {max_pixels:,}"
        )
    return image, kind


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: keep the high byte; Pillow's convert would clip
        pixels = np.asarray(image)
        if pixels.dtype != np.uint16:  # stored as 32 bits
            pixels = pixels.clip(0, 65535).astype(np.uint16)
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DecodeError(DecodeReason.UNSUPPORTED, "32-bit float pixels")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _load(data: bytes, max_pixels: int, min_short_edge: int | None) -> tuple[Image.Image, str]:
    image, kind = _open(data, max_pixels)
    with _typed_errors(data, kind):
        if min_short_edge is not None and kind == "jpeg":
            # DCT scaling: the JPEG decoder skips the detail nobody asked for (1/2, 1/4, 1/8).
            scale = min_short_edge / min(image.size)
            if scale < 1:
                image.draft(None, (round(image.width * scale), round(image.height * scale)))
        image.load()
    return image, kind


def inspect(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Decode every pixel of the first frame and describe the image.

    Raises DecodeError when the image is unusable.
    """
    image, kind = _load(data, max_pixels, None)
    stored_mode = image.mode
    orientation = _orientation(image)
    width, height = image.size if orientation < 5 else image.size[::-1]
    with _typed_errors(data, kind):
        _to_rgb(image)  # raises for pixel types that have no 8-bit picture
    return ImageInfo(kind, width, height, orientation, stored_mode, _is_animated(image))


def decode(data: bytes, *, min_short_edge: int | None = None, max_pixels: int = MAX_PIXELS) -> RGB:
    """Pixels of the first frame, upright, on white where transparent.

    With `min_short_edge`, a JPEG may come back smaller than stored (by 2, 4 or 8), its short edge
    never under that many pixels: what a model with a small input needs, at a fraction of the cost.

    Raises DecodeError when the image is unusable.
    """
    image, kind = _load(data, max_pixels, min_short_edge)
    with _typed_errors(data, kind):
        return np.asarray(_to_rgb(_upright(image)))


def layout_of(width: int, height: int) -> str:
    """`portrait`, `landscape`, or `square` within 5 % of one."""
    ratio = width / height
    return "portrait" if ratio < 0.95 else "square" if ratio < 1.05 else "landscape"


def jpeg_tables(data: bytes) -> list[list[int]]:
    """Quantisation tables of a JPEG, luma first, 64 numbers each; empty for other formats.

    Raises DecodeError when the image is unusable.
    """
    image, kind = _open(data, MAX_PIXELS)
    with _typed_errors(data, kind):
        tables: dict[int, list[int]] = getattr(image, "quantization", None) or {}
        return [list(tables[number]) for number in sorted(tables)]


def to_loadable(data: bytes, info: ImageInfo) -> tuple[str, bytes]:
    """The image as (extension, bytes) that every loader opens upright: 8-bit RGB or gray, JPEG or
    PNG. Bytes that are so already stay as they are; others are encoded anew.

    Raises DecodeError.
    """
    plain = info.orientation == 1 and info.mode in ("RGB", "L") and not info.animated
    if plain and info.format in ("jpeg", "png"):
        return EXTENSIONS[info.format], data
    return encode(decode(data), info)


def encode(pixels: RGB, info: ImageInfo) -> tuple[str, bytes]:
    """Pixels of such an image as (extension, bytes): lossy formats as JPEG (quality 95), others as
    PNG; without metadata."""
    image = Image.fromarray(pixels)
    sink = io.BytesIO()
    if info.format in ("jpeg", "webp"):
        image.save(sink, "JPEG", quality=95, subsampling=0)
        return "jpg", sink.getvalue()
    image.save(sink, "PNG")
    return "png", sink.getvalue()


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # noqa: BLE001 - damage after the first frame, which is all that is used
        return False


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - damaged EXIF is common and says nothing of the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose also writes the EXIF anew, and fails on damaged entries.
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)
