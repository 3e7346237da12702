"""The one decoder: odd formats come out right, hostile bytes end in a typed reason."""

import contextlib
import io
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fusion_pipeline.dataset.images import (
    DecodeError,
    DecodeReason,
    decode,
    inspect,
    to_loadable,
)
from tests.dataset.pictures import ENCODED, close, noise, save, smooth

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damage


# Odd formats


def test_sixteen_bit_png_keeps_its_tonal_range() -> None:
    ramp = np.linspace(0, 65535, 64 * 4).astype(np.uint16).reshape(4, 64)
    data = save(Image.fromarray(ramp), "PNG")
    assert inspect(data).mode == "I;16"
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels[..., 0], (ramp >> 8).astype(np.uint8))  # not clipped at 255
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_sixteen_bit_colour_png_keeps_its_tonal_range() -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(">u2")
    pixels = decode(png_file(7, 5, 16, 2, b"".join(b"\0" + row.tobytes() for row in samples)))
    assert np.abs(pixels.astype(int) - (samples >> 8).astype(int)).max() <= 1


def png_file(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_cmyk_jpeg_has_its_colours() -> None:
    data = save(smooth().convert("CMYK"), "JPEG", quality=95)
    assert inspect(data).mode == "CMYK"
    assert close(decode(data), np.asarray(smooth()), 6)


def test_transparency_is_on_white() -> None:
    palette = Image.new("P", (4, 2), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((3, 1), 1)
    for kind in ("PNG", "GIF"):
        pixels = decode(save(palette, kind, transparency=0))
        assert pixels[0, 0].tolist() == [255, 255, 255], kind
        assert pixels[1, 3].tolist() == [200, 100, 50], kind
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert decode(save(half, "PNG"))[0, 0].tolist() == [127, 127, 127]
    assert decode(save(Image.new("LA", (2, 2), (0, 0)), "PNG"))[1, 1].tolist() == [255, 255, 255]


# What a camera stores for each orientation, from the upright picture (EXIF 2.3, tag 0x0112).
STORED = {
    1: lambda up: up,
    2: lambda up: up[:, ::-1],
    3: lambda up: up[::-1, ::-1],
    4: lambda up: up[::-1],
    5: lambda up: up.transpose(1, 0, 2),
    6: lambda up: np.rot90(up, 1),
    7: lambda up: np.rot90(up, 2).transpose(1, 0, 2),
    8: lambda up: np.rot90(up, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_comes_out_upright(orientation: int, kind: str) -> None:
    upright = np.asarray(smooth())
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(stored, kind, exif=exif)
    info = inspect(data)
    seen = 1 if kind == "TIFF" else orientation  # Pillow turns a TIFF by itself
    assert (info.width, info.height, info.orientation) == (48, 32, seen)
    assert close(decode(data), upright, 12 if kind == "WEBP" else 4)
    small = decode(data, min_short_edge=9)
    assert small.shape[1] > small.shape[0]
    extension, loadable = to_loadable(data, info)
    with Image.open(io.BytesIO(loadable)) as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert close(np.asarray(image.convert("RGB")), upright, 12)
        assert extension == {"JPEG": "jpg", "PNG": "png"}[str(image.format)]


def test_damaged_exif_costs_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 300.0
    data = save(smooth(), "JPEG", exif=exif)
    start, end = data.index(b"Exif"), data.index(b"Exif") + 60
    turned = 0
    for position in range(start + 6, end):
        for value in (0, 1, 255):
            hurt = data[:position] + bytes([value]) + data[position + 1 :]
            assert decode(hurt).shape in ((48, 32, 3), (32, 48, 3))
            turned += inspect(hurt).orientation == 6
    assert turned > 100  # most of the damage does not touch the orientation


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "lime", "blue")]
    data = save(frames[0], kind, save_all=True, append_images=frames[1:])
    assert inspect(data).animated
    assert close(decode(data), np.asarray(frames[0]))
    assert not inspect(save(frames[0], kind)).animated


@pytest.mark.parametrize("name", ["gif animated", "webp animated", "apng"])
def test_damage_behind_the_first_frame_costs_nothing_or_has_a_reason(name: str) -> None:
    whole = ENCODED[name]
    for keep in range(len(whole) // 3, len(whole), 11):
        assert_typed(whole[:keep])
        with contextlib.suppress(DecodeError):
            assert np.array_equal(decode(whole[:keep]), decode(whole))


def test_format_comes_from_the_bytes() -> None:
    """There is no name to mislead: a `.jpg` that holds WebP is WebP."""
    expected = {name: name.split()[0].removeprefix("a") for name in ENCODED}
    assert {name: inspect(data).format for name, data in ENCODED.items()} == expected


# Reasons


HUGE = [
    png_file(50_000, 50_000, 8, 2, b"\0"),
    png_file(12_000, 12_000, 8, 2, b"\0"),  # under Pillow's own limit
    b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b"\x2c" + bytes(20) + b"\x3b",
    b"BM" + struct.pack("<IIIIiiHHIIIIII", 60, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0),
]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", DecodeReason.EMPTY),
        (b"<html>404</html>", DecodeReason.NOT_AN_IMAGE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", DecodeReason.NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", DecodeReason.NOT_AN_IMAGE),  # Pillow would run Ghostscript
        (b"\xff\xd8\xff" + bytes(400) + b"\xff\xd9", DecodeReason.CORRUPT),
        (ENCODED["png"][:40] + bytes(30) + ENCODED["png"][70:], DecodeReason.CORRUPT),
        *((ENCODED[name][:300], DecodeReason.TRUNCATED) for name in ("jpeg", "png", "webp", "gif")),
        *((data, DecodeReason.TOO_MANY_PIXELS) for data in HUGE),
        (save(Image.new("F", (4, 4), 0.5), "TIFF"), DecodeReason.UNSUPPORTED),
    ],
)
def test_each_failure_has_its_reason(data: bytes, reason: DecodeReason) -> None:
    messages = set()
    for attempt in (inspect, decode, inspect):
        with pytest.raises(DecodeError) as raised:
            attempt(data)
        assert raised.value.reason is reason
        messages.add(str(raised.value))
    (message,) = messages  # stored in tables: the same each time
    assert message.split(": ")[0] == reason.value
    assert " at 0x" not in message


def test_the_pixel_limit_is_exact() -> None:
    data = save(Image.new("L", (10, 10)), "PNG")
    assert inspect(data, 100).width == 10
    with pytest.raises(DecodeError, match="too_many_pixels: 10 x 10, limit 99"):
        inspect(data, 99)


def test_a_bomb_is_refused_without_its_memory() -> None:
    """Peak memory of a fresh process that is shown files declaring 0.4 to 10 GB of pixels."""
    code = """
import json, resource, sys, time
from fusion_pipeline.dataset.images import DecodeError, decode, inspect
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
refused = 0
for line in sys.stdin:
    for attempt in (inspect, decode):
        try:
            attempt(bytes.fromhex(line))
        except DecodeError as error:
            refused += error.reason == "too_many_pixels"
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([refused, after - before, time.perf_counter() - started]))
"""
    real = save(Image.new("1", (16_000, 16_000)), "PNG")  # 256 megapixels in 32 kB
    files = "\n".join(data.hex() for data in [*HUGE, real])
    shown = subprocess.run(
        [sys.executable, "-c", code], input=files, capture_output=True, text=True, check=True
    )
    refused, kilobytes, seconds = json.loads(shown.stdout)
    assert refused == 2 * (len(HUGE) + 1)
    assert kilobytes < 40_000
    assert seconds < 2


# Hostile bytes


def assert_typed(data: bytes) -> None:
    """Whole, or a DecodeError; both functions agree."""
    outcomes = []
    for attempt in (inspect, decode):
        try:
            attempt(data, max_pixels=1_000_000)
            outcomes.append("ok")
        except DecodeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert " at 0x" not in outcomes[0]


@pytest.mark.parametrize("name", ENCODED)
def test_cut_off_anywhere(name: str) -> None:
    whole = ENCODED[name]
    other = []
    for keep in range(0, len(whole), max(1, len(whole) // 250)):
        assert_typed(whole[:keep])
        try:
            # All pixels there, only the end mark missing; never half a picture for a whole one.
            assert np.array_equal(decode(whole[:keep]), decode(whole))
        except DecodeError as error:
            if keep > 64 and error.reason is not DecodeReason.TRUNCATED:
                other.append(keep)
    if name.split()[0] in ("jpeg", "png", "apng", "webp", "gif"):
        assert len(other) <= 3  # where a byte looks like the end mark by chance


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_altered_anywhere(data: st.DataObject) -> None:
    content = bytearray(ENCODED[data.draw(st.sampled_from(sorted(ENCODED)))])
    place = st.integers(0, len(content) - 1) | st.integers(0, 100)
    for position, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=8)):
        content[position] = value
    keep = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    assert_typed(bytes(content[:keep]))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(
        [b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"MM\0*"]
    ),
    st.binary(max_size=400),
)
def test_random_bytes_behind_any_signature(signature: bytes, body: bytes) -> None:
    assert_typed(signature + body)


# Scaled decoding, loadable copies


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 300), st.integers(8, 300), st.integers(1, 320))
def test_a_scaled_jpeg_never_gets_shorter_than_asked(width: int, height: int, short: int) -> None:
    pixels = decode(save(smooth(width, height), "JPEG"), min_short_edge=short)
    h, w, _ = pixels.shape
    assert min(h, w) >= min(short, width, height)
    factor = next(f for f in (1, 2, 4, 8) if (-(-height // f), -(-width // f)) == (h, w))
    assert factor == 8 or min(width, height) // (2 * factor) <= short  # no larger than needed


def test_scaling_saves_work_and_keeps_the_picture() -> None:
    data = save(smooth(1600, 1200), "JPEG", quality=90)
    pixels = decode(data, min_short_edge=150)
    assert pixels.shape == (150, 200, 3)
    assert close(pixels, np.asarray(smooth(200, 150)))
    png = save(smooth(1600, 1200), "PNG")
    assert decode(png, min_short_edge=150).shape == (1200, 1600, 3)


def test_loadable_copies() -> None:
    for kind, image, kept in [
        ("JPEG", noise(), "jpg"),
        ("JPEG", noise().convert("L"), "jpg"),
        ("PNG", noise(), "png"),
    ]:
        data = save(image, kind)
        assert to_loadable(data, inspect(data)) == (kept, data)  # already fine: the same bytes
    odd = [
        ("jpg", save(noise().convert("CMYK"), "JPEG")),
        ("jpg", ENCODED["webp"]),
        ("png", ENCODED["png palette"]),
        ("png", ENCODED["gif animated"]),
        ("png", ENCODED["apng"]),
        ("png", ENCODED["bmp"]),
        ("png", save(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG")),
    ]
    for expected, data in odd:
        extension, made = to_loadable(data, inspect(data))
        assert extension == expected
        with Image.open(io.BytesIO(made)) as image:
            assert image.mode == "RGB"
            assert not getattr(image, "is_animated", False)
            tolerance = 0.01 if expected == "png" else 6
            assert close(np.asarray(image), decode(data), tolerance)
    with pytest.raises(DecodeError):
        to_loadable(ENCODED["webp"][:100], inspect(ENCODED["webp"]))
