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

from benchmarks.rendered_lines import Line, Look, draw_page
from experts.base import Hardware
from experts.ocr.lines import clean
from experts.ocr.rapidocr import RapidOcr, RapidOcrConfig, from_own_top_left
from experts.ocr.scripts import script_of
from fusion_pipeline.dataset.evidence import Box, TextLine
from fusion_pipeline.dataset.images import RGB
from tests.experts.pages import CHINESE

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


EACH_TURN = pytest.mark.parametrize(
    ("turn", "first_corner"),
    [
        (None, (0.1, 0.1)),
        (cv2.ROTATE_90_CLOCKWISE, (0.9, 0.1)),
        (cv2.ROTATE_180, (0.9, 0.9)),
        (cv2.ROTATE_90_COUNTERCLOCKWISE, (0.1, 0.9)),
    ],
)


def turned_text(turn: int | None) -> RGB:
    canvas = Image.new("RGB", (500, 500), "white")
    ImageDraw.Draw(canvas).text((50, 50), "Museum entrance closed", "black", font(34))
    image = np.asarray(canvas)
    return image if turn is None else cv2.rotate(image, turn)


def assert_starts_there(line: TextLine, first_corner: tuple[float, float]) -> None:
    assert line.text == "Museum entrance closed"
    assert line.quad[:2] == pytest.approx(first_corner, abs=0.03)
    corners = np.reshape(line.quad, (4, 2))
    along, down = corners[1] - corners[0], corners[3] - corners[0]
    assert along[0] * down[1] - along[1] * down[0] > 0  # clockwise, y downwards
    assert np.linalg.norm(along) > 3 * np.linalg.norm(down)


@EACH_TURN
def test_turned_text_starts_at_its_own_top_left(
    ocr: RapidOcr, turn: int | None, first_corner: tuple[float, float]
) -> None:
    [[line]] = ocr([turned_text(turn)], [])
    assert_starts_there(line, first_corner)


SIGNS = ["人工智能与未来社会", "山水之间的古镇", "第一季度销售额增长"]


def chinese(column: bool) -> RGB:
    lines = [Line(text, CHINESE[0], 30, column=column) for text in SIGNS]
    return draw_page(lines, Look(), random.Random(0)).image


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_chinese_page_is_read_in_order_however_it_is_turned(ocr: RapidOcr, quarters: int) -> None:
    [lines] = ocr([np.ascontiguousarray(np.rot90(chinese(column=False), quarters))], [])
    assert [line.text for line in lines] == SIGNS
    assert {line.script for line in lines} == {"Hani"}


def test_columns_of_characters_are_read_from_right_to_left(ocr: RapidOcr) -> None:
    [lines] = ocr([chinese(column=True)], [])
    assert [line.text for line in lines] == SIGNS[::-1]
    assert {line.block for line in lines} == {0}
    for line in lines:  # each begins at the frame's upper right and runs down
        start, end = np.array(line.quad[:2]), np.array(line.quad[2:4])
        assert end[1] - start[1] > 0.4
        assert abs(end[0] - start[0]) < 0.03


def test_lines_of_a_script_that_is_not_known_hold_no_text(ocr: RapidOcr) -> None:
    image = Image.new("RGB", (700, 200), "white")
    draw = ImageDraw.Draw(image)
    draw.text((20, 20), "Добро пожаловать в наш музей", "black", font(32))
    draw.text((20, 120), "Welcome to our museum", "black", font(32))
    [[unread, read]] = ocr([np.asarray(image)], [])
    assert (unread.text, unread.script, unread.unread) == ("", "Cyrl", True)
    assert unread.score > 0.9
    assert unread.box[1] < 0.2
    assert (read.text, read.script, read.unread) == ("Welcome to our museum", "Latn", False)


def test_script_of_a_text() -> None:
    texts = ["Café №5", "营业时间 9:00", "本日営業中です", "σ και π", "19.99 €", "5 km 以内 ok"]
    assert [script_of(text) for text in texts] == ["Latn", "Hani", "Jpan", "Grek", "", "Latn"]


def test_a_low_strip_is_read(ocr: RapidOcr) -> None:
    strip = Image.new("RGB", (800, 20), "white")
    ImageDraw.Draw(strip).text((6, 1), "Doors open at 8 pm until Friday", "black", font(14))
    [[line]] = ocr([np.asarray(strip)], [])
    assert line.text == "Doors open at 8 pm until Friday"


def test_a_hairline_does_not_exhaust_memory(ocr: RapidOcr, monkeypatch: pytest.MonkeyPatch) -> None:
    quad = np.array([[0, 0], [30000, 0], [30000, 4], [0, 4]], np.float32)
    monkeypatch.setattr(ocr._reader, "_detect", lambda _: quad[None])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ocr([np.full((8, 30000, 3), 255, np.uint8)], [])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_scanned_page(ocr: RapidOcr, photo: Photo) -> None:
    [lines] = ocr([photo("page.png")], [])
    assert [line.text for line in lines] == [
        "Region-based segmentation",
        "Let us first determine markers of the coins and the",
        "background. These markers are pixels that we can label",
        "unambiguously as either object or background. Here,",
        "the markers are found at the two extreme parts of the",
        "histogram of grey values:",
        ">> markers = np.zeros_like(coins)",
    ]
    assert [line.block for line in lines] == [0, 1, 1, 1, 1, 1, 2]


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
