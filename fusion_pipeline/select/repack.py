"""Repack: the rows that are ok in `selection` -> the selected dataset, densely packed."""

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fusion_pipeline.dataset.artifacts import inputs_of
from fusion_pipeline.dataset.images import ImageInfo
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.samples import Limits, Sample, cut, pack_samples
from fusion_pipeline.dataset.schemas import SOURCES_SCHEMA
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardContents, ShardMaker
from fusion_pipeline.errors import FusionError
from fusion_pipeline.select.selection import SELECTION

PLAN = "artifacts/repack_plan.parquet"
_SELECTION = b"fusion_pipeline.selection"
_MAX_SHARD_BYTES = 256 * 2**20

_PLAN_SCHEMA = pa.schema(
    [
        pa.field("rows", pa.int64()),
        pa.field("members", pa.list_(pa.struct([("shard", pa.int64()), ("row", pa.int64())]))),
    ]
)
"""Row number = shard number; `members` are places in the pool, in (shard, row) order."""


class StaleSelectionError(FusionError):
    """The pool's selection is no longer the one that was packed."""


@dataclass(frozen=True)
class Repack:
    pool: Dataset
    dataset: Dataset
    """Where the plan lies and the shards go."""
    shard_size: int
    resources: Resources = CPU_WORKER

    name = "repack"
    version = 1

    def settings(self) -> Mapping[str, Any]:
        return {"shard_size": self.shard_size}

    def plan(self) -> list[int]:
        """Rows of each shard; the plan is committed at the first call.

        Raises StaleSelectionError when the selection changed since.
        """
        current = inputs_of(self.pool, (SELECTION,))[SELECTION]
        try:
            stored = pq.read_table(io.BytesIO(self.dataset.storage.read(PLAN)))
        except FileNotFoundError:
            stored = self._make_plan(current)
        if stored.schema.metadata[_SELECTION].decode() != current:
            raise StaleSelectionError(
                f"{self.dataset.storage.url}: the pool's selection changed since this dataset was "
                "packed. Run again with --overwrite to pack it anew, or choose a new `run` folder."
            )
        rows: list[int] = stored["rows"].to_pylist()
        return rows

    def _make_plan(self, selection: str) -> pa.Table:
        places: list[dict[str, int]] = []
        sizes: list[int] = []
        for shard, table in self.pool.iterate(SELECTION):
            samples, _ = self.pool.read_table("samples", shard)
            chosen = pc.indices_nonzero(pc.equal(table["status"], "ok"))
            places += [{"shard": shard, "row": row} for row in chosen.to_pylist()]
            sizes += samples["image_bytes"].take(chosen).to_pylist()
        parts = cut(sizes, Limits(self.shard_size, _MAX_SHARD_BYTES))
        plan = [{"rows": len(p), "members": places[p.start : p.stop]} for p in parts]
        table = pa.Table.from_pylist(plan, schema=_PLAN_SCHEMA)
        table = table.replace_schema_metadata({_SELECTION: selection.encode()})
        sink = io.BytesIO()
        pq.write_table(table, sink)
        self.dataset.storage.put(PLAN, sink.getvalue())
        return table

    def open_source(self) -> ShardMaker:
        members = pq.read_table(io.BytesIO(self.dataset.storage.read(PLAN)))["members"]

        def make(shard: int) -> ShardContents:
            samples = list(self._samples(members[shard].as_py()))
            tar, table = pack_samples(samples)
            sources = [_source_row(sample) for sample in samples]
            return ShardContents(tar, table, pa.Table.from_pylist(sources, schema=SOURCES_SCHEMA))

        return make

    def _samples(self, members: list[dict[str, int]]) -> Iterator[Sample]:
        tables: dict[int, pa.Table] = {}
        for member in members:
            shard = member["shard"]
            if shard not in tables:
                tables = {shard: self.pool.read_table("samples", shard)[0]}  # members are in order
            row = tables[shard].slice(member["row"], 1).to_pylist()[0]
            image = self.pool.read_image(shard, row["image_offset"], row["image_bytes"])
            texts = {n: row[n] for n in ("row_ids", "alt_texts", "urls")}
            yield Sample(row["key"], image, ImageInfo.from_row(row), **texts)


def _source_row(sample: Sample) -> dict[str, Any]:
    row_id = hashlib.sha256(f"pool\0{sample.key}".encode()).hexdigest()[:32]
    return {
        "row_id": row_id,
        "key": sample.key,
        "status": "ok",
        "reason": None,
        "source": "pool",
        "source_id": sample.key,
        "url": sample.urls[0] if sample.urls else None,
    }
