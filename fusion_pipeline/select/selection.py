"""The global step that decides: exact copies, near-exact copies, semantic duplicates, budget.

Result: the shard-aligned table `selection`; a row that is ok there goes into the selected dataset.
All rows' embeddings are in one memory here, twice (4 x d bytes a row: 5 GB a million rows).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fusion_pipeline.dataset.artifacts import Artifact, write_artifact
from fusion_pipeline.dataset.images import RGB, DecodeError, decode
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.dataset.schemas import UPSTREAM
from fusion_pipeline.engine.shard import Place, commit
from fusion_pipeline.engine.stage import CPU_WORKER
from fusion_pipeline.select.clusters import read_centroids
from fusion_pipeline.select.copies import CopyRule, is_near_exact
from fusion_pipeline.select.dedup import greedy, semdedup
from fusion_pipeline.select.embed import read_embeddings
from fusion_pipeline.select.neighbours import neighbour_pairs
from fusion_pipeline.select.representatives import choose

SELECTION = "selection"
_DECODE_EDGE = 600
"""Short edge of the decode that the pixel check gets: more than its working size."""
_CACHED_IMAGES = 64
_MAX_CACHED_PIXELS = 4_000_000
"""Of one decoded image: 64 of them stay under 800 MB."""

Int64 = npt.NDArray[np.int64]


@dataclass
class _Rows:
    """The rows of all shards that may be selected, in (shard, row) order."""

    shard: list[int] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    key: list[str] = field(default_factory=list)
    area: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    cluster: list[int] = field(default_factory=list)
    embeddings: list[npt.NDArray[np.float16]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True)
class Selection:
    propose: float
    probes: int
    copy_rule: CopyRule
    duplicates: Literal["greedy", "semdedup", "off"]
    threshold: float
    per_cluster: int

    name = SELECTION
    version = 1
    resources = CPU_WORKER
    reads: tuple[str, ...] = ("samples", "embeddings", "clusters")
    columns: Sequence[pa.Field] = (
        pa.field("cluster", pa.int32()),
        pa.field("same_as", pa.string()),  # key of the kept row that this one was dropped for
        pa.field("similarity", pa.float32()),  # cosine to that row
    )

    def settings(self) -> Mapping[str, Any]:
        return {
            "propose": self.propose,
            "probes": self.probes,
            "copy_rule": vars(self.copy_rule),
            "duplicates": self.duplicates,
            "threshold": self.threshold,
            "per_cluster": self.per_cluster,
        }

    def run(
        self, dataset: Dataset, artifact: Artifact, inputs: Mapping[str, str], token: str
    ) -> None:
        """Decide for every row and commit a table a shard, show it to readers, then write the
        artifact that marks the end."""
        rows, skipped = _read_rows(dataset)
        outcomes = _decide(self, dataset, rows)
        by_shard: dict[int, dict[int, Outcome]] = defaultdict(dict)
        for i, outcome in enumerate(outcomes):
            by_shard[rows.shard[i]][rows.row[i]] = outcome
        version = dataset.next_version(SELECTION, artifact.made_by, inputs)
        place = Place(dataset, {SELECTION: version}, token)
        read = {name: dataset.footers(name) for name in self.reads}
        for shard in read["clusters"]:
            samples, _ = dataset.read_table("samples", shard)
            decided = by_shard[shard] | skipped.get(shard, {})
            ordered = [decided[row] for row in range(samples.num_rows)]
            table = build_table(samples["key"].to_pylist(), ordered, self.columns)
            digests = {name: footers[shard].digest for name, footers in read.items()}
            commit(place, table, SELECTION, shard, digests, None)
        dataset.describe_table(version, token)
        totals = pa.table(
            {"rows": [len(rows)], "selected": [sum(isinstance(o, Ok) for o in outcomes)]}
        )
        write_artifact(dataset, artifact, inputs, totals, token)


def _read_rows(dataset: Dataset) -> tuple[_Rows, dict[int, dict[int, Outcome]]]:
    rows = _Rows()
    skipped: dict[int, dict[int, Outcome]] = {}
    for shard, clusters in dataset.iterate("clusters"):
        samples, _ = dataset.read_table("samples", shard)
        embeddings = read_embeddings(dataset.read_table("embeddings", shard)[0])
        left: dict[int, Outcome] = {}
        columns = zip(samples.to_pylist(), clusters.to_pylist(), strict=True)
        for i, (sample, cluster) in enumerate(columns):
            if cluster["status"] != "ok":
                reason = cluster["reason"] or ""
                inherited = reason.startswith(UPSTREAM)
                left[i] = NotOk("filtered", reason if inherited else f"{UPSTREAM}clusters")
                continue
            rows.shard.append(shard)
            rows.row.append(i)
            rows.key.append(sample["key"])
            rows.area.append(sample["width"] * sample["height"])
            rows.offset.append(sample["image_offset"])
            rows.size.append(sample["image_bytes"])
            rows.cluster.append(cluster["cluster"])
            rows.embeddings.append(embeddings[i])
        skipped[shard] = left
    return rows, skipped


def _decide(config: Selection, dataset: Dataset, rows: _Rows) -> list[Outcome]:
    """One outcome a row. The order of preference is total: more pixels, more bytes, key, place."""
    n = len(rows)
    if n == 0:
        return []
    place = np.arange(n)
    order = np.lexsort((place, np.array(rows.key), -np.array(rows.size), -np.array(rows.area)))
    cluster = np.array(rows.cluster, np.int32)
    vectors = np.stack(rows.embeddings)
    rows.embeddings = list(vectors)  # views: what was read can go
    centroids = read_centroids(dataset)
    dropped_by = np.full(n, -1, np.int64)
    reason = np.full(n, "", dtype=object)

    def drop(found: Int64, subset: Int64, why: str) -> None:
        hit = found >= 0
        dropped_by[subset[hit]] = subset[found[hit]]
        reason[subset[hit]] = why

    first = {rows.key[i]: int(i) for i in order[::-1]}
    same = np.array([first[key] if first[key] != i else -1 for i, key in enumerate(rows.key)])
    drop(same, place, "exact_copy")

    left = np.flatnonzero(dropped_by < 0)
    sub_order = _within(order, left, n)
    pairs, cosines = neighbour_pairs(
        vectors[left], cluster[left], centroids, config.propose, config.probes
    )
    check = _PixelCheck(dataset, rows, left, config.copy_rule)
    drop(confirmed_copies(len(left), pairs, cosines, sub_order, check), left, "near_exact_copy")

    left = np.flatnonzero(dropped_by < 0)
    drop(_semantic(config, vectors[left], cluster[left], centroids, _within(order, left, n)),
         left, "semantic_duplicate")  # fmt: skip

    chosen = choose(cluster, order, dropped_by < 0, config.per_cluster)
    reason[(dropped_by < 0) & ~chosen] = "over_budget"
    return [
        _outcome(rows, int(cluster[i]), str(reason[i]), int(dropped_by[i]), i) for i in range(n)
    ]


def _outcome(rows: _Rows, cluster: int, reason: str, by: int, i: int) -> Outcome:
    values: dict[str, Any] = {"cluster": cluster}
    if by >= 0:
        own, kept = (rows.embeddings[row].astype(np.float32) for row in (i, by))
        values |= {"same_as": rows.key[by], "similarity": float(own @ kept)}
    return NotOk("filtered", reason, values) if reason else Ok(values)


def _within(order: Int64, subset: Int64, n: int) -> Int64:
    """The order of a subset of the rows, as indices into the subset."""
    index = np.full(n, -1, np.int64)
    index[subset] = np.arange(len(subset))
    found = index[order]
    return found[found >= 0]


class _PixelCheck:
    """Decodes and compares two rows; images are kept for the next pairs, a few at a time."""

    def __init__(self, dataset: Dataset, rows: _Rows, subset: Int64, rule: CopyRule) -> None:
        self._rule = rule

        @lru_cache(maxsize=_CACHED_IMAGES)
        def pixels(i: int) -> RGB | None:
            row = int(subset[i])
            data = dataset.read_image(rows.shard[row], rows.offset[row], rows.size[row])
            try:
                image = decode(data, min_short_edge=_DECODE_EDGE)
            except DecodeError:
                return None  # decoded at ingest; if it can't be now, it is no confirmed copy
            scale = (_MAX_CACHED_PIXELS / (image.shape[0] * image.shape[1])) ** 0.5
            if scale >= 1:
                return image
            smaller: RGB = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            return smaller

        self._pixels = pixels

    def __call__(self, a: int, b: int) -> bool:
        first, second = self._pixels(a), self._pixels(b)
        if first is None or second is None:
            return False
        return is_near_exact(first, second, self._rule).confirmed


def confirmed_copies(
    n: int,
    pairs: Int64,
    cosines: npt.NDArray[np.float64],
    order: Int64,
    check: Callable[[int, int], bool],
) -> Int64:
    """Near-exact copies: dropped_by int64[n], -1 for a kept row.

    Keeps what `dedup.greedy` keeps over the pairs that `check` confirms, but checks only pairs
    that can still decide something, the most similar of a row first. A row is dropped only for a
    kept row it was confirmed against: chains of crops are not followed (docs/decisions/003).
    """
    rank = np.empty(n, np.int64)
    rank[order] = np.arange(n)
    proposed: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for (i, j), cosine in zip(pairs.tolist(), cosines.tolist(), strict=True):
        low, high = (i, j) if rank[i] > rank[j] else (j, i)
        proposed[low].append((-cosine, high))
    dropped_by = np.full(n, -1, np.int64)
    for row in order.tolist():
        for _, other in sorted(proposed[row]):
            if dropped_by[other] < 0 and check(row, other):
                dropped_by[row] = other
                break
    return dropped_by


def _semantic(
    config: Selection,
    vectors: npt.NDArray[np.float16],
    cluster: npt.NDArray[np.int32],
    centroids: npt.NDArray[np.float32],
    order: Int64,
) -> Int64:
    if config.duplicates == "off":
        return np.full(len(vectors), -1, np.int64)
    if config.duplicates == "greedy":
        pairs, _ = neighbour_pairs(vectors, cluster, centroids, config.threshold, probes=1)
        return greedy(len(vectors), pairs, order)
    dropped_by = np.full(len(vectors), -1, np.int64)
    for number in np.unique(cluster):
        members = np.flatnonzero(cluster == number)
        found = semdedup(vectors[members], centroids[number], 1 - config.threshold)
        hit = found >= 0
        dropped_by[members[hit]] = members[found[hit]]
    return dropped_by
