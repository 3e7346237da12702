"""How long the captions are, and how they ended."""

import math
from collections import Counter
from dataclasses import dataclass

from fusion_pipeline.dataset.layout import Dataset

MAX_BINS = 24


@dataclass(frozen=True)
class Bin:
    start: int
    """Words: a caption of `start` to `end` - 1 words is counted here."""
    end: int
    captions: int


@dataclass(frozen=True)
class CaptionLengths:
    captions: int
    mean_words: float
    mean_chars: float
    median_words: int
    longest: int
    """Words."""
    bins: tuple[Bin, ...]
    finish: tuple[tuple[str, int], ...]
    """Rows by finish (stop, length, blocked), most rows first."""


def measure_captions(dataset: Dataset, table: str) -> CaptionLengths:
    """Lengths of all captions of a table; words are what white space separates."""
    words: Counter[int] = Counter()
    finish: Counter[str] = Counter()
    chars = 0
    for _, captions in dataset.iterate(table):
        for row in captions.select(["status", "caption", "finish"]).to_pylist():
            if row["finish"] is not None:
                finish[row["finish"]] += 1
            if row["status"] == "ok":
                words[len(row["caption"].split())] += 1
                chars += len(row["caption"])
    n = words.total()
    return CaptionLengths(
        captions=n,
        mean_words=sum(length * count for length, count in words.items()) / max(n, 1),
        mean_chars=chars / max(n, 1),
        median_words=_median(words),
        longest=max(words, default=0),
        bins=_bins(words),
        finish=tuple(sorted(finish.items(), key=lambda item: (-item[1], item[0]))),
    )


def _median(words: Counter[int]) -> int:
    """The lower median."""
    seen = 0
    for length in sorted(words):
        seen += words[length]
        if 2 * seen >= words.total():
            return length
    return 0


def _bins(words: Counter[int]) -> tuple[Bin, ...]:
    """From 0 to the longest, in steps that are easy to read: 1, 2, 5, 10, 20, 50, ..."""
    if not words:
        return ()
    step = nice_step(max(words) + 1, MAX_BINS)
    counts: Counter[int] = Counter()
    for length, count in words.items():
        counts[length // step] += count
    return tuple(Bin(i * step, (i + 1) * step, counts[i]) for i in range(max(counts) + 1))


def nice_step(reach: int, most: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... of which at most `most` steps cover `reach`."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if math.ceil(reach / (factor * power)) <= most:
                return factor * power
        power *= 10
