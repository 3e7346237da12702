"""Pages of rendered lines in fonts that come with matplotlib, or with these tests."""

import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import matplotlib

from benchmarks.rendered_lines import Line, Look, Page, draw_page, length_of
from tests.experts.line_texts import VISIBLE

MATPLOTLIB = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
HERE = Path(__file__).parent / "fonts"
EUROPEAN = [MATPLOTLIB / f"{name}.ttf" for name in (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold",
    "DejaVuSerif-Italic", "DejaVuSansMono", "STIXGeneral", "STIXGeneralBol",
)]  # fmt: skip
SANS = [MATPLOTLIB / "DejaVuSans.ttf", MATPLOTLIB / "DejaVuSans-Bold.ttf"]
CHINESE = [HERE / f"{name}.otf" for name in (
    "NotoSansCJKsc", "NotoSansCJKsc-Bold", "NotoSerifCJKsc",
)]  # fmt: skip
FONTS = {
    "Latn": EUROPEAN, "Cyrl": EUROPEAN, "Grek": EUROPEAN, "Hani": CHINESE, "Jpan": CHINESE,
    "Hang": CHINESE, "Arab": SANS, "Hebr": SANS, "Thai": [HERE / "NotoSansThai.ttf"],
    "Deva": [HERE / "NotoSansDevanagari.ttf"],
}  # fmt: skip
INKS = [
    ((255, 255, 255), (0, 0, 0)),
    ((20, 30, 60), (240, 235, 220)),
    ((200, 40, 40), (255, 255, 255)),
    ((235, 225, 200), (60, 40, 30)),
    ((120, 160, 140), (10, 10, 10)),
]
"""Colours of ground and ink."""
LONGEST = 820
"""Pixels of a line: a page fits the detector's 960 pixels, also when it is turned a little."""


def page(rng: Random, script: str, angle: float, count: int = 8, column: bool = False) -> Page:
    """Lines of 12 to 64 px, all sizes as likely (on a logarithmic scale), on one page."""
    lines = [_line(rng, script, column) for _ in range(count)]
    ground, ink = rng.choice(INKS)
    return draw_page(lines, Look(angle, ground=ground, ink=ink, jpeg=rng.choice([None, 75])), rng)


def _line(rng: Random, script: str, column: bool) -> Line:
    font = rng.choice(FONTS[script])
    px = round(math.exp(rng.uniform(math.log(12), math.log(64))))
    while True:
        drawn = Line(rng.choice(VISIBLE[script]), font, px, script, column=column)
        if length_of(drawn) <= LONGEST:
            return drawn


def between(rng: Random, low: float, high: float) -> float:
    """An angle between two, clockwise as often as not."""
    return rng.choice([-1, 1]) * rng.uniform(low, high)


def same(text: str) -> str:
    """Without white space: where a word ends is layout, and no character."""
    return "".join(text.split())


def rows(table: Sequence[Sequence[object]]) -> str:
    """Columns of text, one below the other."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*table, strict=True)]
    lines = (
        "  ".join(f"{cell!s:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in table
    )
    return "\n" + "\n".join(lines)
