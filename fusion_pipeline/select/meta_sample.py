"""The global step that draws the rows to caption: the paper's meta set, 100K of the 1M selected.

Result: the shard-aligned table `meta_sample`; a row that is ok there is captioned. The draw hangs
on the keys and the seed alone, not on the order of the rows or on how they lie in shards.
Memory: about 70 bytes a row (hash, cluster and stratum, and their order).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fusion_pipeline.dataset.artifacts import Artifact, read_artifact, read_plan, write_artifact
from fusion_pipeline.dataset.evidence import EvidenceKind
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.dataset.schemas import SAMPLES, UPSTREAM
from fusion_pipeline.engine.shard import Place, commit
from fusion_pipeline.engine.stage import CPU_WORKER
from fusion_pipeline.errors import FusionError
from fusion_pipeline.select.repack import PLAN, Repack
from fusion_pipeline.select.selection import SELECTION

META_SAMPLE = "meta_sample"

Int64 = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


class RepackedSinceError(FusionError):
    """The pool's selection is no longer the one that the selected dataset was packed from."""

    def __init__(self, pool: Dataset) -> None:
        super().__init__(
            f"{pool.storage.url}: the selection changed since the selected dataset was packed from "
            "it. Nothing was changed. Run again with --refresh to pack it anew."
        )


class NoPromptsYetError(FusionError):
    """Shards that may be drawn from have no prompts yet."""

    def __init__(self, dataset: Dataset, missing: int, planned: int) -> None:
        super().__init__(
            f"{dataset.storage.url}: {missing:,} of {planned:,} shards have no prompts yet; a draw "
            "from the others would be no sample of all. Nothing was drawn. Run `fusion meta "
            "sample` first (it makes all prompts), then --limit; for a trial in a folder of its "
            "own caption.sample=null."
        )


def key_hashes(keys: Sequence[str], seed: int) -> Hashes:
    """uint64[n, 2]: the first 16 bytes of the sha256 of seed and key, in their order."""
    digests = (hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:16] for key in keys)
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2)


def draw(hashes: Hashes, stratum: Int64, size: int) -> npt.NDArray[np.bool_]:
    """Of each stratum as many rows as `allocate` gives it, those with the smallest hashes: bool[n].

    hashes: uint64[n, 2]; stratum: int64[n], any numbers. min(size, n) rows are drawn.
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0], stratum))
    _, first, rows = np.unique(stratum[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(first, rows)
    drawn = np.zeros(len(order), np.bool_)
    drawn[order[place < np.repeat(allocate(rows, size), rows)]] = True
    return drawn


def allocate(rows: Int64, size: int) -> Int64:
    """How many rows to draw of each stratum, given how many each has (int64[s], at least 1).

    In proportion, rounded by the largest remainder, but none gets less than one row: those whose
    share is less than one get one, and the others share the rest. When there are more strata than
    rows to draw, the largest get one each. The sum is min(size, all rows).
    """
    size = min(size, int(rows.sum()))
    given = np.zeros(len(rows), np.int64)
    largest = np.argsort(-rows, kind="stable")
    if size <= len(rows):
        given[largest[:size]] = 1
        return given
    sharing = np.ones(len(rows), np.bool_)
    while (small := sharing & (size * rows < rows[sharing].sum())).any():
        given[small] = 1
        sharing &= ~small
        size -= int(small.sum())
    total = int(rows[sharing].sum())
    shares, remainders = np.divmod(size * rows, total)
    given[sharing] = shares[sharing]
    left = size - int(shares[sharing].sum())
    by_remainder = largest[np.argsort(-remainders[largest], kind="stable")]
    given[by_remainder[sharing[by_remainder]][:left]] += 1
    return given


@dataclass(frozen=True)
class Drawn:
    """What a draw came to."""

    drawn: int
    eligible: int
    """Rows that were ok up to their prompts."""
    size: int
    """Rows that were asked for."""

    def __str__(self) -> str:
        if self.size > self.eligible:
            return f"all {self.eligible:,} rows are drawn: there are no {self.size:,}"
        return f"{self.drawn:,} of {self.eligible:,} rows are drawn"


@dataclass(frozen=True)
class MetaSample:
    size: int
    seed: int
    by: Literal["plain", "strata"]
    repack: Repack
    """By whose plan the rows are found in the pool, where their clusters are."""
    prompts: str
    """The table of prompts: rows that are ok there may be drawn."""
    evidence: tuple[str, ...]
    """Tables of the experts."""

    name = META_SAMPLE
    version = 2
    resources = CPU_WORKER
    columns: Sequence[pa.Field] = (
        pa.field("cluster", pa.int32()),  # of the pool's selection
        pa.field("has_text", pa.bool_()),  # a text expert read a line; null without such an expert
    )

    @property
    def reads(self) -> tuple[str, ...]:
        return (SAMPLES, *self._text, self.prompts)

    @property
    def _text(self) -> tuple[str, ...]:
        kind = f"{EvidenceKind.TEXT.value}/"
        return tuple(table for table in self.evidence if table.startswith(kind))

    def settings(self) -> Mapping[str, Any]:
        return {"size": self.size, "seed": self.seed, "by": self.by}

    def run(
        self, dataset: Dataset, artifact: Artifact, inputs: Mapping[str, str], token: str
    ) -> None:
        """Draw and commit a table a shard, show it to readers, then write the artifact that marks
        the end. Raises RepackedSinceError, NoPromptsYetError."""
        members = _members(self.repack, dataset)
        read = {name: dataset.footers(name) for name in self.reads}
        shards = list(read[self.prompts])
        if len(shards) < len(members):
            raise NoPromptsYetError(dataset, len(members) - len(shards), len(members))
        parts = list(self._strata(dataset, shards, _clusters_of(self.repack.pool, members)))
        hashes, cluster, text = (np.concatenate(column) for column in zip(*parts, strict=True))
        stratum = np.zeros(len(cluster), np.int64)
        if self.by == "strata":
            stratum = cluster * np.int64(2) + (text == 1)
        drawn = draw(hashes, stratum, self.size)
        version = dataset.next_version(META_SAMPLE, artifact.made_by, inputs)
        place = Place(dataset, {META_SAMPLE: version}, token)
        start = 0
        for shard, (_, clusters, texts) in zip(shards, parts, strict=True):
            part = drawn[start : (start := start + len(clusters))]
            table = self._table(dataset, shard, part, clusters, texts)
            digests = {name: footers[shard].digest for name, footers in read.items()}
            commit(place, table, META_SAMPLE, shard, digests, None)
        dataset.describe_table(version, token)
        totals = {"drawn": [int(drawn.sum())], "eligible": [len(drawn)], "size": [self.size]}
        write_artifact(dataset, artifact, inputs, pa.table(totals), token)

    def _strata(
        self,
        dataset: Dataset,
        shards: Sequence[int],
        clusters_of: Callable[[int], npt.NDArray[np.int32]],
    ) -> Iterator[tuple[Hashes, npt.NDArray[np.int32], npt.NDArray[np.int8]]]:
        """Of each shard's rows that may be drawn: hash, cluster, and 1 with text, 0 without, -1
        when nobody looked for any."""
        for shard in shards:
            prompts, _ = dataset.read_table(self.prompts, shard)
            live = pc.equal(prompts["status"], "ok").to_numpy(zero_copy_only=False)
            keys = prompts.filter(pa.array(live))["key"].to_pylist()
            text = np.full(len(live), 0 if self._text else -1, np.int8)
            for name in self._text:
                lines = dataset.read_table(name, shard)[0][EvidenceKind.TEXT.value]
                read = [any(line["text"] for line in cell or ()) for cell in lines.to_pylist()]
                text |= np.array(read, np.int8)
            yield key_hashes(keys, self.seed), clusters_of(shard)[live], text[live]

    def _table(
        self,
        dataset: Dataset,
        shard: int,
        drawn: npt.NDArray[np.bool_],
        clusters: npt.NDArray[np.int32],
        texts: npt.NDArray[np.int8],
    ) -> pa.Table:
        """All rows of the shard; the arrays are of those that might be drawn."""
        prompts, _ = dataset.read_table(self.prompts, shard)
        eligible = zip(drawn.tolist(), clusters.tolist(), texts.tolist(), strict=True)
        outcomes: list[Outcome] = []
        columns = (prompts["status"].to_pylist(), prompts["reason"].to_pylist())
        for status, reason in zip(*columns, strict=True):
            if status != "ok":
                inherited = reason is not None and reason.startswith(UPSTREAM)
                why = reason if inherited else f"{UPSTREAM}{self.prompts}"
                outcomes.append(NotOk("filtered", why))
                continue
            is_drawn, cluster, text = next(eligible)
            values = {"cluster": cluster, "has_text": None if text < 0 else bool(text)}
            outcomes.append(Ok(values) if is_drawn else NotOk("filtered", "not_drawn", values))
        return build_table(prompts["key"].to_pylist(), outcomes, self.columns)


def _members(repack: Repack, dataset: Dataset) -> pa.ChunkedArray:
    """Of each planned shard the places in the pool. Raises RepackedSinceError."""
    try:
        return read_plan(dataset, PLAN, repack.plan_digest())["members"]
    except FileNotFoundError:
        raise RepackedSinceError(repack.pool) from None


def _clusters_of(pool: Dataset, members: pa.ChunkedArray) -> Callable[[int], npt.NDArray[np.int32]]:
    """Gives the clusters of a packed shard's rows, int32[n], from the pool: by the plan, which
    knows their places. These are in the pool's order, so two of its shards are enough to keep."""

    @lru_cache(maxsize=2)
    def in_pool(shard: int) -> npt.NDArray[np.int32]:
        column = pool.read_table(SELECTION, shard)[0]["cluster"]
        found: npt.NDArray[np.int32] = pc.fill_null(column, -1).to_numpy()
        return found

    def of(shard: int) -> npt.NDArray[np.int32]:
        places = members[shard].as_py()
        return np.array([in_pool(place["shard"])[place["row"]] for place in places], np.int32)

    return of


def read_drawn(dataset: Dataset) -> Drawn:
    """Raises NoTableError."""
    (totals,) = read_artifact(dataset, META_SAMPLE).to_pylist()
    return Drawn(**totals)


def drawn_strata(dataset: Dataset) -> dict[bool | None, tuple[int, int]]:
    """By `has_text` the number of rows that are drawn, and of the clusters that they are of."""
    rows: Counter[bool | None] = Counter()
    clusters: dict[bool | None, set[int]] = {}
    for _, table in dataset.iterate(META_SAMPLE):
        live = table.filter(pc.equal(table["status"], "ok"))
        for cluster, text in zip(
            *(live[n].to_pylist() for n in ("cluster", "has_text")), strict=True
        ):
            rows[text] += 1
            clusters.setdefault(text, set()).add(cluster)
    return {text: (rows[text], len(clusters[text])) for text in rows}
