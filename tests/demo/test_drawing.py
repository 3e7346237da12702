"""Drawing and editing keep the record of the text true."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from fusion_pipeline.demo import documents, edits, plan
from fusion_pipeline.demo.canvas import FACES, MIN_PX, Canvas, Picture, TextLine, font, wrapped


def _overlap(a: TextLine, b: TextLine) -> bool:
    across = min(a.box[2], b.box[2]) > max(a.box[0], b.box[0])
    return across and min(a.box[3], b.box[3]) > max(a.box[1], b.box[1])


@pytest.mark.parametrize("seed", range(100, 103))
def test_no_rendered_line_leaves_its_picture_or_runs_into_another(seed: int) -> None:
    pictures = [
        draw(Random(f"{seed}/{kind}/{i}"), i)
        for kind, draw, count in plan.RENDERED
        for i in range(count)
    ]
    template = documents.slide_template(Random(seed), seed)
    pictures += [documents.slide(template, Random(f"{seed}/{i}"), i) for i in range(6)]
    for picture in pictures:
        width, height = picture.image.size
        for i, line in enumerate(picture.texts):
            x1, y1, x2, y2 = line.box
            assert 0 <= x1 < x2 <= width, line
            assert 0 <= y1 < y2 <= height, line
            assert MIN_PX <= line.px <= 64
            assert not any(_overlap(line, other) for other in picture.texts[:i]), line


@given(
    text=st.text("abcfgjpqyAMT 0123456789.,%", min_size=1, max_size=24).filter(str.strip),
    face=st.sampled_from(sorted(FACES)),
    px=st.integers(MIN_PX, 64),
    anchor=st.sampled_from(["la", "ma", "ra", "lm", "mm", "rm"]),
)
@settings(max_examples=60, deadline=None)
def test_the_noted_box_is_exactly_where_ink_is(text: str, face: str, px: int, anchor: str) -> None:
    canvas = Canvas(Image.new("RGB", (3200, 200), (255, 255, 255)))
    blank = canvas.image.copy()
    box = canvas.text((1600, 80), text.strip(), face, px, (0, 0, 0), anchor)
    ink = ImageChops.difference(canvas.image, blank).getbbox()
    assert box == ink


@given(
    words=st.lists(st.text("abcdefgh", min_size=1, max_size=9), min_size=1),
    width=st.integers(20, 400),
)
def test_wrapping_loses_no_word_and_passes_the_width_for_single_words_only(
    words: list[str], width: int
) -> None:
    lines = wrapped(" ".join(words), "serif", 20, width)
    assert " ".join(lines).split() == words
    for line in lines:
        assert font("serif", 20).getlength(line) <= width or " " not in line


def test_a_line_that_cannot_be_made_to_fit_loses_its_last_words() -> None:
    canvas = Canvas(Image.new("RGB", (300, 60)))
    box = canvas.text((0, 0), "far too long for this", "sans", 30, (255, 255, 255), width=60)
    (line,) = canvas.lines
    assert line.text == "far too"  # what the truth names is what is seen
    assert line.px == 12
    assert box[2] - box[0] <= 60


boxes = st.tuples(
    st.integers(0, 90), st.integers(0, 70), st.integers(1, 60), st.integers(1, 30)
).map(lambda b: (b[0], b[1], min(100, b[0] + b[2]), min(80, b[1] + b[3])))


@given(found=st.lists(boxes, max_size=8), window=boxes)
def test_a_crop_accounts_for_every_line_and_moves_it_with_its_pixels(
    found: list[tuple[int, int, int, int]], window: tuple[int, int, int, int]
) -> None:
    pixels = np.arange(100 * 80, dtype=np.int32).reshape(80, 100)
    picture = Picture(Image.fromarray(pixels), "test", [TextLine("t", 20, b) for b in found])
    cropped = edits.crop(picture, window)
    left, top, right, bottom = window
    after = np.asarray(cropped.image)

    def inside(box: tuple[int, int, int, int]) -> set[int]:
        x1, y1, x2, y2 = box
        return set(
            pixels[max(y1, top) : min(y2, bottom), max(x1, left) : min(x2, right)].ravel().tolist()
        )

    def shown(lines: list[TextLine]) -> list[set[int]]:
        return [
            set(after[y1:y2, x1:x2].ravel().tolist())
            for x1, y1, x2, y2 in (line.box for line in lines)
        ]

    whole = [b for b in found if b[0] >= left and b[1] >= top and b[2] <= right and b[3] <= bottom]
    cut = [b for b in found if b not in whole and max(b[0], left) < min(b[2], right)]
    cut = [b for b in cut if max(b[1], top) < min(b[3], bottom)]
    assert shown(cropped.texts) == [inside(b) for b in whole]
    assert shown(cropped.cut_texts) == [inside(b) for b in cut]


def test_text_is_never_mirrored() -> None:
    picture = Picture(Image.new("RGB", (9, 9)), "sign", [TextLine("EXIT", 12, (0, 0, 9, 9))])
    with pytest.raises(ValueError, match="mirrored"):
        edits.mirror(picture)
