"""Two engines' captions of the same samples, side by side: numbers, and one page to look at.

The page keeps the report's rules: one file without scripts, links and requests; all text from
outside is escaped; pictures are small JPEGs made by the safe decoder.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fusion_pipeline.dataset.images import DecodeError
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.errors import FusionError
from fusion_pipeline.prompts.hints import HintConfig, Hints
from fusion_pipeline.report.compare_blocks import make_blocks
from fusion_pipeline.report.compare_measures import (
    MISSING,
    Comparison,
    Row,
    Side,
    outcome_of,
)
from fusion_pipeline.report.compare_tables import CAPTIONS, PairTables
from fusion_pipeline.report.compare_words import Piece, mark_differences
from fusion_pipeline.report.draw import Draw
from fusion_pipeline.report.html import environment
from fusion_pipeline.report.pictures import Picture, read_picture

if TYPE_CHECKING:
    from fusion_pipeline.pipeline import Pipeline

CARDS = 24
"""Samples that are shown."""
EXTREMES = 12
"""Samples shown beyond those: where the captions differ most, and where there is only one."""
LONG_SIDE = 480
"""Pixels of a shown picture."""


class CompareError(FusionError):
    """There are no two such tables; the message says which there are."""


@dataclass(frozen=True)
class Told:
    """What one engine made of a shown sample."""

    caption: str | None
    pieces: Sequence[Piece]
    outcome: str
    """Why there is no caption: status and reason, with its detail; empty when there is one."""
    violations: Sequence[str]
    finish: str | None


@dataclass(frozen=True)
class Card:
    key: str
    picture: Picture | None
    width: int
    """Pixels of the original, upright."""
    height: int
    format: str
    hints: Hints
    alt_texts: Sequence[str]
    sides: tuple[Told, Told]


@dataclass
class Shown:
    """The samples that a page shows, by key; chosen while the numbers are counted."""

    drawn: Draw
    single: Draw
    furthest: list[tuple[float, str]] = field(default_factory=list)
    """A heap: the least of those that differ most comes first."""

    def add(self, key: str, apart: float | None, a: Row, b: Row) -> None:
        if apart is not None:
            self.drawn.add("", key)
        elif "ok" in (a["status"], b["status"]):  # each side and reason gets its turn
            self.single.add(f"{outcome_of(a)}\0{outcome_of(b)}", key)
        if apart:
            heapq.heappush(self.furthest, (apart, key))
            if len(self.furthest) > EXTREMES:
                heapq.heappop(self.furthest)

    @property
    def lists(self) -> dict[str, list[str]]:
        furthest = [key for _, key in sorted(self.furthest, key=lambda pair: (-pair[0], pair[1]))]
        return {"drawn": self.drawn.keys(), "furthest": furthest, "single": self.single.keys()}


@dataclass(frozen=True)
class Compare:
    dataset: Dataset
    a: str
    """Name of an engine: its captions lie in `captions/<a>`."""
    b: str
    evidence: tuple[str, ...]
    """Tables of the experts."""
    hints: HintConfig
    """Whose threshold says which recognised lines a caption is expected to say."""
    seed: int = 0

    @classmethod
    def of(cls, pipeline: "Pipeline", a: str, b: str) -> "Compare":
        """Raises DatasetError without a selected dataset, CompareError without the tables."""
        dataset, config = Dataset.open(pipeline.selected.storage.url), pipeline.config
        _check_names(dataset, a, b)
        return cls(dataset, a, b, pipeline.evidence, config.hints, config.report.seed)

    def run(self, cards: int = CARDS) -> tuple[Comparison, dict[str, list[Card]]]:
        """Numbers over all samples, and the cards of those to show.

        One shard's tables are in memory at a time; only shown rows are kept. Two passes: the
        second one reads images and texts of the shown rows alone.
        """
        tables = PairTables(self.dataset, (self.a, self.b), self.evidence)
        comparison = Comparison(Side(self.a), Side(self.b))
        shown = Shown(Draw(cards, self.seed), Draw(EXTREMES, self.seed))
        for shard in tables.shards:
            self._count(tables, shard, comparison, shown)
        lists = shown.lists
        made = dict(_make_cards(tables, {key for keys in lists.values() for key in keys}))
        return comparison, {name: [made[key] for key in keys] for name, keys in lists.items()}

    def _count(self, tables: PairTables, shard: int, comparison: Comparison, shown: Shown) -> None:
        samples, captions = tables.samples(shard), tables.captions(shard)
        comparison.other_inputs += tables.have_other_inputs(shard)
        known = tables.known(shard, samples, self.hints)
        for sample in samples:
            a, b = (rows.pop(sample["key"], MISSING) for rows in captions)
            apart = comparison.add(a, b)
            if apart is not None:
                comparison.add_evidence(a, b, known[sample["key"]])
            shown.add(sample["key"], apart, a, b)
        comparison.strangers += sum(map(len, captions))


def write_page(
    comparison: Comparison, cards: Mapping[str, Sequence[Card]], title: str, out: str
) -> None:
    """Write the page to a path or address; it appears whole or not at all."""
    content = {
        "comparison": comparison,
        "title": title,
        "blocks": make_blocks(comparison),
        "cards": cards,
    }
    page = environment().get_template("compare.html.jinja").render(content)
    folder, _, name = out.rpartition("/")
    Storage(folder or ("/" if out.startswith("/") else ".")).put(name, page.encode())


def default_page(run: str, a: str, b: str) -> str:
    return f"{run.rstrip('/')}/compare-{a}-{b}.html"


def _check_names(dataset: Dataset, a: str, b: str) -> None:
    tables = (name for name in dataset.table_names() if name.startswith(CAPTIONS))
    names = [name for name in tables if dataset.shards_of(name)]
    there = [name.removeprefix(CAPTIONS) for name in names]
    for name in (a, b):
        if name not in there:
            listed = ", ".join(there) or "none yet: `fusion run` makes them"
            raise CompareError(
                f"{dataset.storage.url}: there are no captions of an engine {name!r}; engines "
                f"with captions: {listed}"
            )
    if a == b:
        raise CompareError(f"{a!r} would be compared with itself; engines: {', '.join(there)}")


def _make_cards(tables: PairTables, keys: set[str]) -> Iterator[tuple[str, Card]]:
    for shard in tables.shards if keys else ():
        here = [sample for sample in tables.samples(shard) if sample["key"] in keys]
        if here:
            hints, (a, b) = tables.hints(shard), tables.captions(shard)
            for sample in here:
                key = sample["key"]
                rows = (a.get(key, MISSING), b.get(key, MISSING))
                yield key, _card(tables, shard, sample, hints.get(key, Hints()), rows)


def _card(tables: PairTables, shard: int, sample: Row, hints: Hints, rows: tuple[Row, Row]) -> Card:
    try:
        picture = read_picture(tables.dataset, shard, sample, LONG_SIDE)
    except DecodeError:
        picture = None  # the page says so
    captions = [row.get("caption") for row in rows]
    pieces: Sequence[Sequence[Piece]] = [[(text or "", False)] for text in captions]
    if captions[0] is not None and captions[1] is not None:
        pieces = mark_differences(captions[0], captions[1])
    one, two = (_told(row, part) for row, part in zip(rows, pieces, strict=True))
    return Card(
        key=sample["key"],
        picture=picture,
        width=sample["width"],
        height=sample["height"],
        format=sample["format"],
        hints=hints,
        alt_texts=tuple(sample["alt_texts"]),
        sides=(one, two),
    )


def _told(row: Row, pieces: Sequence[Piece]) -> Told:
    why = f"{row['status']}: {row['reason']}" if row["reason"] else str(row["status"])
    return Told(
        caption=row.get("caption"),
        pieces=pieces,
        outcome="" if row["status"] == "ok" else why,
        violations=tuple(row.get("violations") or ()),
        finish=row.get("finish"),
    )
