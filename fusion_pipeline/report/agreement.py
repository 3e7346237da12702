"""Which experts stand behind the same evidence: counts over the merged tables, and by sample."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

from fusion_pipeline.dataset.evidence import MERGED_OBJECTS, MERGED_TAGS, Box
from fusion_pipeline.dataset.layout import Dataset


@dataclass(frozen=True)
class Agreement:
    """Of one kind of evidence."""

    kind: str
    items: int
    """Merged tags or objects at or above the threshold of hints."""
    experts: tuple[str, ...]
    """Who stands behind any; taggers stand behind objects that their tags support."""
    together: Mapping[tuple[str, str], int]
    """Items that two experts both stand behind, by their names in order; of one and itself, all."""

    def of(self, a: str, b: str) -> int:
        return self.together.get((min(a, b), max(a, b)), 0)


def count_agreement(
    dataset: Dataset, evidence: Sequence[str], thresholds: Mapping[str, float]
) -> list[Agreement]:
    """One for each merged table among `evidence`. `thresholds`: by kind; scores in 0..1."""
    found = []
    for table in (MERGED_OBJECTS, MERGED_TAGS):
        if table in evidence:
            kind = table.partition("/")[0]
            found.append(_count(dataset, table, kind, thresholds[kind]))
    return found


def _count(dataset: Dataset, table: str, kind: str, threshold: float) -> Agreement:
    together: Counter[tuple[str, str]] = Counter()
    items = 0
    for _, rows in dataset.iterate(table):
        for cell in rows[kind].to_pylist():
            for item in cell or ():
                if round(item["score"], 4) >= threshold:
                    items += 1
                    together.update(combinations_with_replacement(sorted(item["experts"]), 2))
    experts = tuple(sorted({a for a, b in together if a == b}))
    return Agreement(kind, items, experts, together)


def finders(cell: Sequence[Mapping[str, Any]] | None) -> dict[tuple[str, Box], tuple[str, ...]]:
    """Who stands behind each object of a cell of `objects/merged`, by its label and its box as
    hints round it."""
    return {(item["label"], _rounded(item["box"])): tuple(item["experts"]) for item in cell or ()}


def _rounded(box: Sequence[float]) -> Box:
    x1, y1, x2, y2 = (round(min(max(value, 0.0), 1.0), 3) for value in box)
    return x1, y1, x2, y2
