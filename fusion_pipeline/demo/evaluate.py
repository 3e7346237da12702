"""How well a run over demo data did, against its truth file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

from fusion_pipeline.dataset.evidence import Box, text_from
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.schemas import typed
from fusion_pipeline.select.dedup import greedy
from fusion_pipeline.select.embed import read_embeddings
from fusion_pipeline.select.neighbours import neighbour_pairs, unit_rows

Row = dict[str, Any]


@dataclass(frozen=True)
class Truth:
    """Rows of `truth.json` by their WebDataset key."""

    rows: dict[str, Row]

    @classmethod
    def read(cls, path: Path) -> "Truth":
        return cls({row["name"]: row for row in json.loads(path.read_text())["rows"]})

    def by_sample(self, pool: Dataset) -> dict[str, Row]:
        """Truth of each sample key; of equal bytes, the first row's."""
        found: dict[str, Row] = {}
        for _, sources in pool.iterate("sources"):
            for source in sources.to_pylist():
                if source["key"] and source["status"] == "ok":
                    found.setdefault(source["key"], self.rows[source["source_id"]])
        return found


def wrong_statuses(pool: Dataset, truth: Truth) -> list[str]:
    """Rows whose status or reason, at ingest or at the resolution filter, is not the expected."""
    seen: set[str] = set()
    wrong = []
    resolution = {
        row["key"]: row["status"]
        for _, table in pool.iterate("resolution")
        for row in table.to_pylist()
    }
    for _, sources in pool.iterate("sources"):
        for row in sources.to_pylist():
            name = row["source_id"]
            if name in seen:
                wrong.append(f"{name}: more than one row")
            seen.add(name)
            expected = truth.rows[name]["expected"]
            got = (row["status"], typed(row["reason"]) or None, resolution.get(row["key"]))
            if got != (expected["ingest"], expected["reason"], expected["resolution"]):
                wrong.append(f"{name}: expected {expected}, got {got}")
    return wrong + [f"{name}: no row" for name in truth.rows.keys() - seen]


@dataclass
class CopyScore:
    """Near-exact copies: the confirmed rule."""

    found: dict[str, int] = field(default_factory=dict)
    """Planted copies of which at most one of copy and source is left, by kind."""
    missed: list[str] = field(default_factory=list)
    """Planted copies that are left beside their source."""
    merged: list[str] = field(default_factory=list)
    """Rows dropped as a copy of something else."""


def score_copies(pool: Dataset, truth: Truth) -> CopyScore:
    samples = truth.by_sample(pool)
    key_of = {
        row["source_id"]: row["key"]
        for _, sources in pool.iterate("sources")
        for row in sources.to_pylist()
    }
    score = CopyScore()
    dropped: set[str] = set()
    for row in _selection(pool):
        if row["reason"] in ("near_exact_copy", "exact_copy"):
            dropped.add(row["key"])
            own, kept = samples[row["key"]], samples[row["same_as"]]
            if own["content"] != kept["content"]:
                score.merged.append(f"{own['name']} ({own['kind']}) as {kept['name']}")
    for key, row in samples.items():
        kind = row["copy_kind"]
        if not kind or kind.startswith(("semantic", "exact")):
            continue
        if dropped & {key, key_of[row["copy_of"]]}:
            score.found[kind] = score.found.get(kind, 0) + 1
        else:
            score.missed.append(f"{row['name']} ({kind}, {row['kind']}) of {row['copy_of']}")
    return score


def _selection(pool: Dataset) -> Iterator[Row]:
    for _, table in pool.iterate("selection"):
        yield from (row for row in table.to_pylist() if row["same_as"])


@dataclass
class TextScore:
    """Rendered lines of 12 to 64 px against what the OCR expert read."""

    lines: int = 0
    read: int = 0
    """Lines with a character error of at most 5 %."""
    missed: list[str] = field(default_factory=list)


def score_text(selected: Dataset, pool: Dataset, truth: Truth, table: str) -> TextScore:
    samples = truth.by_sample(pool)
    score = TextScore()
    for _, found in selected.iterate(table):
        for row in found.to_pylist():
            planted = samples[row["key"]]
            width, height = planted["upright_size"]
            lines = [
                (line.text, _scaled(line.box, width, height)) for line in text_from(row["text"])
            ]
            for line in planted["texts"]:
                if not 12 <= line["px"] <= 64:
                    continue
                score.lines += 1
                got = _read_at(line["box"], lines)
                if Levenshtein.normalized_distance(_plain(line["text"]), _plain(got)) <= 0.05:
                    score.read += 1
                else:
                    score.missed.append(f"{line['px']} px {line['text']!r} read as {got!r}")
    return score


def _scaled(box: Box, width: int, height: int) -> Box:
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def _plain(text: str) -> str:
    """Without white space: where a word ends is layout, and no character."""
    return "".join(text.split())


def _read_at(box: Sequence[float], lines: Sequence[tuple[str, Box]]) -> str:
    """What was read where a line stands: the pieces on its height, from left to right."""
    x1, y1, x2, y2 = box
    pieces = []
    for text, (left, top, right, bottom) in lines:
        shared_height = min(y2, bottom) - max(y1, top)
        shared_width = min(x2, right) - max(x1, left)
        if shared_height > 0.5 * min(y2 - y1, bottom - top) and shared_width > 0.5 * (right - left):
            pieces.append((left, text))
    return " ".join(text for _, text in sorted(pieces))


@dataclass(frozen=True)
class SemanticScore:
    """The semantic rule alone, over every sample: greedy at one threshold, all pairs compared."""

    threshold: float
    dropped: int
    right: int
    """Dropped for a kept row of the same content."""
    redundant: int
    """Samples beyond the first of each content: what a perfect rule drops."""
    wrong: Sequence[tuple[str, str, float]]
    """(dropped sample, kept sample, cosine) of other content."""

    @property
    def precision(self) -> float:
        return self.right / self.dropped if self.dropped else 1.0

    @property
    def recall(self) -> float:
        return self.right / self.redundant if self.redundant else 1.0


def score_semantic(pool: Dataset, truth: Truth, thresholds: Sequence[float]) -> list[SemanticScore]:
    samples = truth.by_sample(pool)
    keys, vectors = _embeddings(pool)
    contents = [samples[key]["content"] for key in keys]
    redundant = len(contents) - len(set(contents))
    unit = unit_rows(vectors)
    order = np.lexsort((np.array(keys),))
    scores = []
    for threshold in thresholds:
        one = np.zeros(len(keys), np.int32)
        pairs, _ = neighbour_pairs(unit, one, unit[:1], threshold, probes=1)
        by = greedy(len(keys), pairs, order)
        drops = [(int(i), int(by[i])) for i in np.flatnonzero(by >= 0)]
        wrong = [
            (keys[i], keys[j], float(unit[i] @ unit[j]))
            for i, j in drops
            if contents[i] != contents[j]
        ]
        scores.append(
            SemanticScore(threshold, len(drops), len(drops) - len(wrong), redundant, wrong)
        )
    return scores


def _embeddings(pool: Dataset) -> tuple[list[str], npt.NDArray[np.float16]]:
    keys: list[str] = []
    rows: list[npt.NDArray[np.float16]] = []
    for _, table in pool.iterate("embeddings"):
        vectors = read_embeddings(table)
        for i, row in enumerate(table.select(["key", "status"]).to_pylist()):
            if row["status"] == "ok" and row["key"] not in keys:
                keys.append(row["key"])
                rows.append(vectors[i])
    return keys, np.stack(rows)
