"""Repack: the rows that are ok in `selection` -> the selected dataset, densely packed."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fusion_pipeline.dataset.artifacts import inputs_of, read_plan, write_plan
from fusion_pipeline.dataset.fingerprints import canonical_json, short_hash
from fusion_pipeline.dataset.images import ImageInfo
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.samples import Limits, Sample, cut, pack_samples
from fusion_pipeline.dataset.schemas import SAMPLES, SOURCES_SCHEMA
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardContents, ShardMaker
from fusion_pipeline.engine.watch import Watch
from fusion_pipeline.select.selection import SELECTION

PLAN = "repack_plan"
_MAX_SHARD_BYTES = 256 * 2**20

_PLAN_SCHEMA = pa.schema(
    [
        pa.field("rows", pa.int64()),
        pa.field("members", pa.list_(pa.struct([("shard", pa.int64()), ("row", pa.int64())]))),
    ]
)
"""Row number = shard number; `members` are places in the pool, in (shard, row) order."""


@dataclass(frozen=True)
class Repack:
    pool: Dataset
    dataset: Dataset
    """Where the plan lies and the shards go."""
    shard_size: int
    resources: Resources = CPU_WORKER

    name = "repack"
    version = 1
    plan_name = PLAN

    def settings(self) -> Mapping[str, Any]:
        return {"shard_size": self.shard_size}

    def plan_digest(self) -> str:
        """Of the pool's selection, and of the settings."""
        chosen = inputs_of(self.pool, (SELECTION,))
        return short_hash(canonical_json({**chosen, **self.settings()}))

    def plan(self, digest: str) -> list[int] | None:
        try:
            rows: list[int] = read_plan(self.dataset, PLAN, digest)["rows"].to_pylist()
        except FileNotFoundError:
            return None
        return rows

    def make_plan(self, digest: str, token: str) -> list[int]:
        places: list[dict[str, int]] = []
        sizes: list[int] = []
        samples_version = self.pool.version(SAMPLES)
        for shard, table in self.pool.iterate(SELECTION):
            samples, _ = self.pool.read_table(samples_version, shard)
            chosen = pc.indices_nonzero(pc.equal(table["status"], "ok"))
            places += [{"shard": shard, "row": row} for row in chosen.to_pylist()]
            sizes += samples["image_bytes"].take(chosen).to_pylist()
        parts = cut(sizes, Limits(self.shard_size, _MAX_SHARD_BYTES))
        members = [places[part.start : part.stop] for part in parts]
        plan = pa.table({"rows": [len(part) for part in members], "members": members}, _PLAN_SCHEMA)
        write_plan(self.dataset, PLAN, digest, plan, token)
        return [len(part) for part in members]

    def open_source(self, digest: str) -> ShardMaker:
        members = read_plan(self.dataset, PLAN, digest)["members"]

        def make(shard: int, watch: Watch) -> ShardContents:
            samples = []
            for sample in self._samples(members[shard].as_py()):
                watch.tick()  # each may be a request to an object store
                samples.append(sample)
            tar, table = pack_samples(samples)
            sources = [_source_row(sample) for sample in samples]
            return ShardContents(tar, table, pa.Table.from_pylist(sources, schema=SOURCES_SCHEMA))

        return make

    def _samples(self, members: list[dict[str, int]]) -> Iterator[Sample]:
        version = self.pool.version(SAMPLES)
        tables: dict[int, pa.Table] = {}
        for member in members:
            shard = member["shard"]
            if shard not in tables:
                tables = {shard: self.pool.read_table(version, shard)[0]}  # members are in order
            row = tables[shard].slice(member["row"], 1).to_pylist()[0]
            image = self.pool.read_image(shard, row["image_offset"], row["image_bytes"], version)
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
