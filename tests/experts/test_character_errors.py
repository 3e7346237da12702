"""Share of wrong characters on rendered lines of 12 to 64 px, by script and turn of the page.

The bounds are twice the highest share of a single seed and band among the seeds 1 to 8, which this
test's seed is not one of: 1.5 % Latin, 0.8 % Chinese (all seeds together 0.6 % and 0.5 %; a long
line that is missed counts much). Lines that are not found, or recorded as unread, are wrong in all
their characters.
"""

from random import Random

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

from experts.base import Hardware
from experts.ocr.rapidocr import RapidOcr, RapidOcrConfig
from tests.experts.pages import between, page, rows, same

SEED = 61_093
PAGES = 12
"""Of a script and a band; 8 lines each."""
BANDS = ((0, 0), (0, 10), (10, 20), (20, 30))
"""Degrees."""
BOUNDS = {"Latn": 0.03, "Hani": 0.016}


def errors(ocr: RapidOcr, rng: Random, script: str, low: int, high: int) -> tuple[int, int, int]:
    """Lines, characters, wrong characters."""
    lines = characters = wrong = 0
    for _ in range(PAGES):
        drawn = page(rng, script, between(rng, low, high))
        height, width = drawn.image.shape[:2]
        [found] = ocr([drawn.image], [])
        quads = [np.reshape(line.quad, (4, 2)) * (width, height) for line in found]
        read = drawn.texts([(quad, line.text) for quad, line in zip(quads, found, strict=True)])
        for truth, text in zip(drawn.lines, read, strict=True):
            lines += 1
            characters += len(same(truth.line.text))
            wrong += Levenshtein.distance(same(truth.line.text), same(text))
    return lines, characters, wrong


def test_few_characters_are_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    ocr = RapidOcr(RapidOcrConfig(), Hardware())
    table: list[tuple[object, ...]] = [
        ("script", "turned", "lines", "characters", "wrong", "bound")
    ]
    missed = []
    for script, bound in BOUNDS.items():
        rng = Random(f"{SEED}{script}")
        for low, high in BANDS:
            lines, characters, wrong = errors(ocr, rng, script, low, high)
            share = wrong / characters
            table.append(
                (script, f"{low}-{high}°", lines, characters, f"{share:.2%}", f"{bound:.2%}")
            )
            missed += [(script, low, high, share)] if share > bound else []
    with capsys.disabled():
        print(rows(table))
    assert sum(int(str(row[2])) for row in table[1:]) >= 300
    assert not missed
