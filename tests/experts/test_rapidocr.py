import random
import resource
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from rapidfuzz.distance import Levenshtein

from experts.base import Hardware
from experts.ocr.rapidocr import RapidOcr, RapidOcrConfig, clean, from_own_top_left, reading_order
from fusion_pipeline.dataset.evidence import Box, TextLine
from fusion_pipeline.dataset.images import RGB

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
TEXT = """summer sale ends Friday quarterly revenue increased 37.5 percent open daily museum
entrance tickets available online market street coffee annual report figure 1998 measured harbour
bridge closed welcome to Lisbon visitors must register before hiking price $19.99"""
WORDS = TEXT.split()
Photo = Callable[[str], RGB]


@pytest.fixture(scope="module")
def ocr() -> RapidOcr:
    return RapidOcr(RapidOcrConfig(), Hardware())


def font(size: int, name: str = "DejaVuSans.ttf") -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONTS / name), size)


def slide(seed: int, width: int, height: int) -> tuple[RGB, list[tuple[str, Box]]]:
    """A page of dark lines on light or the reverse, and each line's text and box (fractions)."""
    rng = random.Random(seed)
    dark = rng.random() < 0.4
    ground, ink = [(rng.randrange(60),) * 3, (rng.randrange(195, 256),) * 3][:: 1 if dark else -1]
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    lines = []
    y = 10
    while True:
        size = rng.choice([12, 12, 14, 16, 20, 24, 32, 48, 64])
        face = font(size, rng.choice(["DejaVuSans.ttf", "DejaVuSerif.ttf", "STIXGeneral.ttf"]))
        if y + 1.4 * size > height:
            return np.asarray(image), lines
        text = rng.choice(WORDS)
        while draw.textlength(longer := f"{text} {rng.choice(WORDS)}", face) < width - 40:
            text = longer
        draw.text((16, y), text, ink, face)
        x1, y1, x2, y2 = draw.textbbox((16, y), text, face)
        lines.append((text, (x1 / width, y1 / height, x2 / width, y2 / height)))
        y += round(1.6 * size)


def inside(line: TextLine, box: Box) -> bool:
    x, y = (line.box[0] + line.box[2]) / 2, (line.box[1] + line.box[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def test_slides_are_read_in_place_and_in_order(ocr: RapidOcr) -> None:
    good = total = 0
    sizes = [(500, 400), (640, 480), (800, 600), (800, 450), (1000, 750)]
    for seed, (width, height) in enumerate(sizes):
        image, truth = slide(seed, width, height)
        [found] = ocr([image], [])
        read = []
        for text, box in truth:
            total += 1
            matches = [line for line in found if inside(line, box)]
            if len(matches) != 1:
                continue
            read.append(found.index(matches[0]))
            good += Levenshtein.distance(text, matches[0].text) <= 0.05 * len(text)
            # The detector leaves a margin that grows with the height of the line.
            margin = 0.4 * (box[3] - box[1]) * height + 8
            shift = (np.array(matches[0].box) - box) * ([width, height] * 2)
            assert np.abs(shift).max() <= margin
        assert read == sorted(read)
    assert total > 50
    assert good / total >= 0.95


def test_small_text_in_a_20_megapixel_photo_is_read_at_full_resolution(ocr: RapidOcr) -> None:
    image = Image.new("RGB", (5000, 4000), "white")
    ImageDraw.Draw(image).text((1000, 3000), "Tickets available online", "black", font(100))
    [[line]] = ocr([np.asarray(image)], [])
    assert line.text == "Tickets available online"
    assert line.box[:2] == pytest.approx((0.2, 0.755), abs=0.015)


@pytest.mark.parametrize(
    ("turn", "first_corner"),
    [
        (None, (0.1, 0.1)),
        (cv2.ROTATE_90_CLOCKWISE, (0.9, 0.1)),
        (cv2.ROTATE_180, (0.9, 0.9)),
        (cv2.ROTATE_90_COUNTERCLOCKWISE, (0.1, 0.9)),
    ],
)
def test_turned_text_starts_at_its_own_top_left(
    ocr: RapidOcr, turn: int | None, first_corner: tuple[float, float]
) -> None:
    canvas = Image.new("RGB", (500, 500), "white")
    ImageDraw.Draw(canvas).text((50, 50), "Museum entrance closed", "black", font(34))
    image = np.asarray(canvas)
    [[line]] = ocr([image if turn is None else cv2.rotate(image, turn)], [])
    assert line.text == "Museum entrance closed"
    assert line.quad[:2] == pytest.approx(first_corner, abs=0.03)
    corners = np.reshape(line.quad, (4, 2))
    along, down = corners[1] - corners[0], corners[3] - corners[0]
    assert along[0] * down[1] - along[1] * down[0] > 0  # clockwise, y downwards
    assert np.linalg.norm(along) > 3 * np.linalg.norm(down)


def test_a_low_strip_is_read(ocr: RapidOcr) -> None:
    strip = Image.new("RGB", (800, 20), "white")
    ImageDraw.Draw(strip).text((6, 1), "Doors open at 8 pm until Friday", "black", font(14))
    [[line]] = ocr([np.asarray(strip)], [])
    assert line.text == "Doors open at 8 pm until Friday"


def test_a_hairline_does_not_exhaust_memory(ocr: RapidOcr, monkeypatch: pytest.MonkeyPatch) -> None:
    quad = np.array([[0, 0], [30000, 0], [30000, 4], [0, 4]], np.float32)
    monkeypatch.setattr(ocr, "_detect", lambda _: quad[None])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ocr([np.full((8, 30000, 3), 255, np.uint8)], [])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_scanned_page(ocr: RapidOcr, photo: Photo) -> None:
    [lines] = ocr([photo("page.png")], [])
    assert lines[0].text == "Region-based segmentation"


def test_score_floor(photo: Photo) -> None:
    [lines] = RapidOcr(RapidOcrConfig(score_floor=0.9), Hardware())([photo("page.png")], [])
    assert lines
    assert min(line.score for line in lines) >= 0.9


def test_loads_offline_and_in_silence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    RapidOcr(RapidOcrConfig(), Hardware())([np.full((64, 64, 3), 255, np.uint8)], [])
    assert capfd.readouterr() == ("", "")


@given(st.text())
def test_clean_text_is_printable_and_stable(text: str) -> None:
    result = clean(text)
    assert all(unicodedata.category(c)[0] != "C" for c in result)
    assert result == " ".join(result.split()) == clean(result)


def test_clean_keeps_what_can_be_seen() -> None:
    assert clean("Prix\t19 €\u202e\x1b[31m 中文\x00 ") == "Prix 19 €[31m 中文"


def test_corners_of_a_flat_quad() -> None:
    quad = np.array([[0, 0], [10, 0], [10, 4], [0, 4]], np.float32)
    assert from_own_top_left(quad, False).tolist() == quad.tolist()
    assert from_own_top_left(quad, True).tolist() == [[10, 4], [0, 4], [0, 0], [10, 0]]


def line(text: str, x1: float, y1: float, x2: float, y2: float) -> TextLine:
    return TextLine(text, 1.0, (x1, y1, x2, y1, x2, y2, x1, y2))


def test_rows_come_before_columns() -> None:
    ordered = reading_order(
        [
            line("d", 0.6, 0.31, 0.9, 0.36),
            line("margin", 0.01, 0.0, 0.05, 1.0),  # upright text along the whole page
            line("b", 0.6, 0.09, 0.9, 0.15),
            line("c", 0.1, 0.3, 0.5, 0.35),
            line("a", 0.1, 0.1, 0.5, 0.15),
            line("e", 0.1, 0.7, 0.5, 0.75),
        ]
    )
    assert [item.text for item in ordered] == ["a", "b", "c", "d", "margin", "e"]


unit = st.floats(0, 1, width=32)


@given(st.lists(st.tuples(st.text(max_size=3), unit, unit, unit, unit), max_size=12), st.randoms())
def test_order_ignores_the_order_of_detection(
    items: list[tuple[str, float, float, float, float]], rng: random.Random
) -> None:
    lines = [line(t, min(a, c), min(b, d), max(a, c), max(b, d)) for t, a, b, c, d in items]
    shuffled = rng.sample(lines, len(lines))
    assert reading_order(lines) == reading_order(shuffled)
    assert sorted(reading_order(lines), key=repr) == sorted(lines, key=repr)
