"""What is counted of two tables of captions: row by row, in memory that does not grow with them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusion_pipeline.dataset.schemas import typed
from fusion_pipeline.report.compare_words import (
    Letters,
    count_sentences,
    difference,
    quotations,
    words,
)

Row = dict[str, Any]
"""Of a table of captions."""


@dataclass
class Spread:
    """Whole numbers, one a caption: each different one is held once."""

    counts: Counter[int] = field(default_factory=Counter)

    @property
    def mean(self) -> float:
        return sum(n * times for n, times in self.counts.items()) / max(self.counts.total(), 1)

    def quantile(self, share: float) -> int:
        """The smallest number that this share of the captions does not exceed."""
        seen = 0
        for number in sorted(self.counts):
            seen += self.counts[number]
            if seen >= share * self.counts.total():
                return number
        return 0

    def as_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "median": self.quantile(0.5), "p95": self.quantile(0.95)}


@dataclass
class CaptionStats:
    """Of one engine's captions, over some of its ok rows."""

    captions: int = 0
    characters: Spread = field(default_factory=Spread)
    words: Spread = field(default_factory=Spread)
    sentences: Spread = field(default_factory=Spread)
    finish: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    """Captions whose broken rules are known; an older table does not know them."""
    faulty: int = 0
    """Captions that break at least one rule."""
    broken: Counter[str] = field(default_factory=Counter)
    """Captions by the rules that they break."""
    repairs: int = 0
    """How often a caption was asked for again."""
    _distinct: float = 0.0

    def add(self, row: Row) -> None:
        caption, said = row["caption"], words(row["caption"])
        self.captions += 1
        self.characters.counts[len(caption)] += 1
        self.words.counts[len(said)] += 1
        self.sentences.counts[count_sentences(caption)] += 1
        self._distinct += len(set(said)) / max(len(said), 1)
        self.finish[row.get("finish") or "unknown"] += 1
        broken = row.get("violations")
        if broken is not None:
            self.checked += 1
            self.faulty += bool(broken)
            self.broken.update(set(broken))
        self.repairs += row.get("repairs") or 0

    @property
    def distinct_words(self) -> float:
        """Mean over the captions of the share of a caption's words that are different ones."""
        return self._distinct / max(self.captions, 1)

    @property
    def cut(self) -> int:
        """Captions cut off at the token limit."""
        return self.finish["length"]

    def as_dict(self) -> dict[str, Any]:
        per_rule = {
            rule: 1000 * n / max(self.checked, 1) for rule, n in sorted(self.broken.items())
        }
        return {
            "captions": self.captions,
            "characters": self.characters.as_dict(),
            "words": self.words.as_dict(),
            "sentences": self.sentences.as_dict(),
            "distinct_words": self.distinct_words,
            "finish": dict(self.finish.most_common()),
            "cut_by_length": self.cut / max(self.captions, 1),
            "checked": self.checked,
            "faulty": self.faulty,
            "violations_per_1000": per_rule,
            "repairs": self.repairs,
        }


@dataclass(frozen=True)
class Known:
    """The evidence of one sample, as captions are held against it."""

    lines: Sequence[str]
    """Recognised lines above the threshold of the hints."""
    texts: Sequence[str]
    """All texts that a quotation may be from: lines of any score in reading order, joined; alt
    texts; labels of tags and objects."""


@dataclass
class Faithfulness:
    lines: int = 0
    lines_said: int = 0
    quotes: int = 0
    quotes_unknown: int = 0
    """Quotations that no evidence holds."""

    def add(self, caption: str, lines: Iterable[Letters], texts: Sequence[Letters]) -> None:
        said = Letters.of(caption)
        for line in lines:
            self.lines += 1
            self.lines_said += said.holds(line)
        for quote in filter(lambda letters: letters.text, map(Letters.of, quotations(caption))):
            self.quotes += 1
            self.quotes_unknown += not any(text.holds(quote) for text in texts)

    def as_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "share_of_lines_said": self.lines_said / self.lines if self.lines else None,
            "share_of_quotes_unknown": self.quotes_unknown / self.quotes if self.quotes else None,
        }


@dataclass
class Side:
    """One of the two engines."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    """Rows by `ok`, or status and reason: `failed: timeout`."""
    own: CaptionStats = field(default_factory=CaptionStats)
    """Over all rows for which it has a caption."""
    shared: CaptionStats = field(default_factory=CaptionStats)
    """Over the rows for which both have one."""
    faith: Faithfulness = field(default_factory=Faithfulness)
    """Over these, too."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "rows": dict(self.outcomes.most_common()),
            "own": self.own.as_dict(),
            "shared": self.shared.as_dict(),
            "faithfulness": self.faith.as_dict(),
        }


@dataclass
class Comparison:
    a: Side
    b: Side
    samples: int = 0
    both: int = 0
    identical: int = 0
    differences: Spread = field(default_factory=Spread)
    """Of the words of two captions, in thousandths."""
    other_inputs: int = 0
    """Shards in which the two tables were made from different evidence or samples."""
    strangers: int = 0
    """Rows of either table whose sample is no longer there."""

    def add(self, a: Row, b: Row) -> float | None:
        """Count a sample; the difference of its captions, if there are two."""
        self.samples += 1
        for side, row in ((self.a, a), (self.b, b)):
            side.outcomes[outcome_of(row)] += 1
            if row["status"] == "ok":
                side.own.add(row)
        if not a["status"] == b["status"] == "ok":
            return None
        self.both += 1
        self.a.shared.add(a)
        self.b.shared.add(b)
        self.identical += a["caption"] == b["caption"]
        apart = difference(a["caption"], b["caption"])
        self.differences.counts[round(1000 * apart)] += 1
        return apart

    def add_evidence(self, a: Row, b: Row, known: Known) -> None:
        """Of a sample with two captions."""
        lines = [line for line in map(Letters.of, known.lines) if line.text]
        texts = [Letters.of(text) for text in known.texts]
        self.a.faith.add(a["caption"], lines, texts)
        self.b.faith.add(b["caption"], lines, texts)

    def as_dict(self) -> dict[str, Any]:
        thousandths = self.differences.as_dict()
        return {
            "samples": self.samples,
            "both": self.both,
            "identical": self.identical,
            "word_difference": {name: value / 1000 for name, value in thousandths.items()},
            "shards_with_other_inputs": self.other_inputs,
            "rows_without_sample": self.strangers,
            "a": self.a.as_dict(),
            "b": self.b.as_dict(),
        }


MISSING: Row = {"status": "missing", "reason": "not captioned yet"}
"""Stands for the row of a table that is not there for a shard."""


def outcome_of(row: Row) -> str:
    """The reason without its detail: `failed: http_500`."""
    reason = typed(row["reason"])
    return f"{row['status']}: {reason}" if reason else str(row["status"])
