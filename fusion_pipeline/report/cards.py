"""Sample cards: one sample with its picture, all its hints, its prompt and its caption."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fusion_pipeline.dataset.evidence import LOOK, MERGED_OBJECTS, Tag, tags_from, text_from
from fusion_pipeline.dataset.images import DecodeError
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.schemas import SAMPLES
from fusion_pipeline.dataset.tables import NoTableError
from fusion_pipeline.prompts.hints import Hints
from fusion_pipeline.report.agreement import finders
from fusion_pipeline.report.draw import Draw
from fusion_pipeline.report.pictures import Mark, Picture, marks_of, read_picture

LONG_SIDE = 640
"""Pixels of a card's picture."""


@dataclass(frozen=True)
class Card:
    key: str
    picture: Picture | None
    width: int
    """Pixels of the original, upright."""
    height: int
    format: str
    marks: tuple[Mark, ...]
    hints: Hints
    scores: tuple[tuple[str, tuple[Tag, ...]], ...]
    """By expert: scores of the whole image, the highest ones."""
    look: Mapping[str, Any]
    """What was measured; empty without."""
    alt_texts: tuple[str, ...]
    urls: tuple[str, ...]
    input_rows: int
    caption: str | None
    outcome: str
    """Why there is no caption: status and reason; empty when there is one."""
    finish: str | None
    prompt: str | None


def make_cards(
    pool: Dataset,
    selected: Dataset,
    prompts: str,
    captions: str,
    count: int,
    seed: int,
    colours: Mapping[str, str] | None = None,
    evidence: Sequence[str] = (),
) -> list[Card]:
    """Cards of up to `count` samples, drawn by key hash and spread over the clusters. `colours`:
    see `colours_of`; `evidence`: tables of which lines without text, scores and looks are shown.

    One shard's tables are in memory at a time; pictures are read one by one.
    """
    draw = Draw(count, seed)
    for key, cluster in _clusters_of_selected(pool, selected):
        draw.add(cluster, key)
    keys = draw.keys()
    found: dict[str, Card] = {}
    for shard, samples in selected.iterate(SAMPLES) if keys else ():
        here = set(keys).intersection(samples["key"].to_pylist())
        if here:
            names = ("hints", prompts, captions, MERGED_OBJECTS)
            tables = [_read(selected, name, shard) for name in names]
            more = {name: _read(selected, name, shard) for name in evidence}
            for key in sorted(here):
                rows = [_row(table, key) for table in (samples, *tables)]
                said = {name: _row(table, key) for name, table in more.items()}
                found[key] = _card(selected, shard, colours or {}, said, *rows)
    return [found[key] for key in keys]


_MOST_UNREAD = 120
"""Lines a card."""
_MOST_SCORES = 3
"""Of each expert."""
MANY = "several"
_HUES = 5


def colours_of(evidence: Sequence[str]) -> dict[str, str]:
    """CSS class of the boxes of each detector, by name, and of those that several found. Empty for
    one detector. After five they repeat."""
    names = [table.partition("/")[2] for table in evidence if table.startswith("objects/")]
    detectors = [name for name in names if f"objects/{name}" != MERGED_OBJECTS]
    if len(detectors) < 2:
        return {}
    classes = {name: f"found-{number % _HUES + 1}" for number, name in enumerate(detectors)}
    return classes | {MANY: "found-many"}


def _colour(experts: Sequence[str], colours: Mapping[str, str]) -> str:
    found = [colours[name] for name in experts if name in colours]
    return colours[MANY] if len(found) > 1 else "".join(found)


def _clusters_of_selected(pool: Dataset, selected: Dataset) -> Iterator[tuple[str, str]]:
    """(key, cluster) of each selected sample. Both datasets have one order: they are walked side
    by side, so that no map of all keys is held. A sample the pool no longer has gets no cluster."""
    chosen = (
        (row["key"], str(row["cluster"]))
        for _, table in pool.iterate("selection")
        for row in table.filter(pc.equal(table["status"], "ok"))
        .select(["key", "cluster"])
        .to_pylist()
    )
    for _, samples in selected.iterate(SAMPLES):
        for key in samples["key"].to_pylist():
            yield key, next((cluster for other, cluster in chosen if other == key), "")


def _read(dataset: Dataset, table: str, shard: int) -> pa.Table | None:
    try:
        return dataset.read_table(table, shard)[0]
    except (FileNotFoundError, NoTableError):
        return None  # its step has not run for this shard yet


def _row(table: pa.Table | None, key: str) -> dict[str, Any]:
    found = [] if table is None else table.filter(pc.equal(table["key"], key)).to_pylist()
    # The funnel counts a row that is lost; a card must not fail for it.
    return found[0] if found else {"status": "missing", "reason": None}


def _card(
    dataset: Dataset,
    shard: int,
    colours: Mapping[str, str],
    said: Mapping[str, dict[str, Any]],
    sample: dict[str, Any],
    hints: dict[str, Any],
    prompt: dict[str, Any],
    caption: dict[str, Any],
    objects: dict[str, Any],
) -> Card:
    chosen = Hints.from_json(hints["hints"]) if hints["status"] == "ok" else Hints()
    try:
        picture = read_picture(dataset, shard, sample, LONG_SIDE)
    except DecodeError:
        picture = None
    styles = {
        place: _colour(experts, colours)
        for place, experts in finders(objects.get("objects")).items()
    }
    lines = [line for row in said.values() for line in text_from(row.get("text"))]
    unread = [line for line in lines if line.unread][:_MOST_UNREAD]
    size = (picture.width, picture.height) if picture else (0, 0)
    return Card(
        key=sample["key"],
        picture=picture,
        width=sample["width"],
        height=sample["height"],
        format=sample["format"],
        marks=tuple(marks_of(chosen, *size, styles, unread)) if picture else (),
        hints=chosen,
        scores=tuple(
            (name.partition("/")[2], tuple(tags_from(row["scores"])[:_MOST_SCORES]))
            for name, row in said.items()
            if row.get("scores")
        ),
        look=said[LOOK] if said.get(LOOK, {}).get("status") == "ok" else {},
        alt_texts=tuple(sample["alt_texts"]),
        urls=tuple(sample["urls"]),
        input_rows=len(sample["row_ids"]),
        caption=caption.get("caption"),
        outcome="" if caption["status"] == "ok" else _outcome(caption),
        finish=caption.get("finish"),
        prompt=prompt.get("prompt"),
    )


def _outcome(row: dict[str, Any]) -> str:
    return f"{row['status']}: {row['reason']}" if row["reason"] else str(row["status"])
