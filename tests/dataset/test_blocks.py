"""Reading order and blocks: the same page however it is turned, columns, paragraphs, margins."""

import math
import random
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_pipeline.dataset.blocks import reading_order
from fusion_pipeline.dataset.evidence import TextLine


def line(text: str, x1: float, y1: float, x2: float, y2: float) -> TextLine:
    return TextLine(text, 0.9, (x1, y1, x2, y1, x2, y2, x1, y2))


def blocks(lines: Sequence[TextLine]) -> list[str]:
    """Texts in reading order, the lines of each block joined by blanks."""
    shuffled = random.Random(7).sample(lines, len(lines))
    grouped = groupby(reading_order(shuffled), key=lambda line: line.block)
    numbers, texts = zip(*((n, " ".join(i.text for i in part)) for n, part in grouped), strict=True)
    assert numbers == tuple(range(len(numbers)))
    return list(texts)


PAGE = [
    line("Headline", 0.1, 0.02, 0.9, 0.10),
    *(line(f"a{i}", 0.05, 0.20 + 0.05 * i, 0.45, 0.24 + 0.05 * i) for i in range(4)),
    *(line(f"b{i}", 0.05, 0.42 + 0.05 * i, 0.40, 0.46 + 0.05 * i) for i in range(3)),
    *(line(f"c{i}", 0.55, 0.21 + 0.05 * i, 0.95, 0.25 + 0.05 * i) for i in range(8)),
    line("Foot", 0.05, 0.615, 0.95, 0.655),
]
READ = ["Headline", "a0 a1 a2 a3", "b0 b1 b2", "c0 c1 c2 c3 c4 c5 c6 c7", "Foot"]


def turned(lines: Sequence[TextLine], degrees: float, aspect: float = 1) -> list[TextLine]:
    """As on a page that was turned clockwise; `aspect` is the frame's width by its height."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    found = []
    for item in lines:
        corners = (np.array(item.quad).reshape(4, 2) - 0.5) * (aspect, 1)
        corners = corners @ np.array([[cos, sin], [-sin, cos]]) / (aspect, 1) + 0.5
        found.append(TextLine(item.text, item.score, tuple(corners.ravel().tolist())))
    return found


@pytest.mark.parametrize("aspect", [0.6, 1, 1.7])
@pytest.mark.parametrize("degrees", [0, 4, -12, 25, -30, 90, 97, 180, 200, 270])
def test_a_page_reads_the_same_however_it_is_turned(degrees: float, aspect: float) -> None:
    assert blocks(turned(PAGE, degrees, aspect)) == READ


def test_one_line_taken_for_upside_down_stays_in_its_place() -> None:
    page = [*PAGE]
    page[3] = TextLine("a2", 0.9, (*page[3].quad[4:], *page[3].quad[:4]))
    assert blocks(page) == READ


def test_columns_of_characters_go_from_right_to_left() -> None:
    # The corners start at the frame's upper right: a column's text runs down.
    columns = [
        TextLine(t, 0.9, (x + 0.05, 0.1, x + 0.05, y, x, y, x, 0.1))
        for t, x, y in [("床前明月光", 0.7, 0.6), ("疑是地上霜", 0.63, 0.6), ("李白", 0.3, 0.35)]
    ]
    assert blocks(columns) == ["床前明月光 疑是地上霜", "李白"]


def test_a_note_along_the_margin_comes_after_the_page() -> None:
    note = TextLine("note", 0.9, (0.01, 0.6, 0.01, 0.2, 0.03, 0.2, 0.03, 0.6))  # runs up
    assert blocks([note, *PAGE]) == [*READ, "note"]


def test_pieces_of_one_row_and_short_tall_ones_go_from_left_to_right() -> None:
    row = [
        line("1", 0.1, 0.1, 0.11, 0.15),
        line("Total", 0.2, 0.1, 0.4, 0.15),
        line("19.99", 0.7, 0.11, 0.8, 0.16),
    ]
    assert blocks(row) == ["1 Total 19.99"]


def test_an_evenly_spaced_list_is_one_block() -> None:
    prices = [line(f"{i}.99", 0.8, 0.1 + 0.07 * i, 0.9, 0.14 + 0.07 * i) for i in range(5)]
    assert blocks(prices) == ["0.99 1.99 2.99 3.99 4.99"]


unit = st.floats(0, 1, width=32)
quads = st.tuples(*[unit] * 8)
boxes = st.tuples(*[unit] * 4).map(lambda b: (b[0], b[1], b[2], b[1], b[2], b[3], b[0], b[3]))
lines = st.lists(st.builds(TextLine, st.text(max_size=3), unit, quads | boxes), max_size=14)


@given(lines, st.randoms(use_true_random=False))
def test_any_lines_are_kept_and_numbered_whatever_their_order(
    found: list[TextLine], rng: random.Random
) -> None:
    ordered = reading_order(found)
    assert ordered == reading_order(rng.sample(found, len(found)))
    assert sorted((i.quad, i.text) for i in ordered) == sorted((i.quad, i.text) for i in found)
    numbers = [item.block for item in ordered]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(len(set(numbers))))
