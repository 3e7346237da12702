"""Ingest: a source's rows -> shards of decodable samples, every input row accounted for."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa

from fusion_pipeline.dataset.artifacts import read_plan, write_plan
from fusion_pipeline.dataset.fingerprints import canonical_json, short_hash
from fusion_pipeline.dataset.images import DecodeError, inspect
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.samples import Limits, Sample, pack_samples, sample_key
from fusion_pipeline.dataset.schemas import SOURCES_SCHEMA
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardContents, ShardMaker
from fusion_pipeline.engine.watch import Watch
from fusion_pipeline.ingest.folder import is_input, plan_folder, read_folder_rows
from fusion_pipeline.ingest.rows import (
    PLAN_SCHEMA,
    InputRow,
    PlannedShard,
    SourceError,
    storable,
)
from fusion_pipeline.ingest.webdataset import is_tar, plan_tars, read_tar_rows

PLAN = "ingest_plan"


@dataclass(frozen=True)
class Ingest:
    """Source of the pool. Decodes every image once, whole: what is in a shard can be decoded."""

    dataset: Dataset
    """Where the plan lies and the shards go."""
    kind: Literal["webdataset", "folder"]
    place: str
    shard_size: int
    max_shard_bytes: int
    max_image_bytes: int
    max_pixels: int
    resources: Resources = CPU_WORKER

    name = "ingest"
    version = 1
    plan_name = PLAN

    def settings(self) -> Mapping[str, Any]:
        return {
            "shard_size": self.shard_size,
            "max_shard_bytes": self.max_shard_bytes,
            "max_image_bytes": self.max_image_bytes,
            "max_pixels": self.max_pixels,
        }

    def plan_digest(self) -> str:
        """Of the settings, and of the source's file names and sizes. Raises SourceError."""
        source = Storage(self.place)
        is_used = {"webdataset": is_tar, "folder": is_input}
        sizes = source.sizes("")
        if not sizes:
            raise SourceError(
                f"source.{self.kind}: nothing found at {source.url}. Check the path, or make demo "
                "data with `fusion demo-data DIR`."
            )
        odd = next((name for name in sizes if storable(name) != name), None)
        if odd is not None:
            raise SourceError(
                f"source.{self.kind}: a file name is not UTF-8: {storable(odd)}. Rename this file."
            )
        names = [[name, size] for name, size in sizes.items() if is_used[self.kind](name)]
        planned = {"kind": self.kind, "settings": self.settings(), "files": names}
        return short_hash(canonical_json(planned))

    def plan(self, digest: str) -> list[int] | None:
        try:
            return [shard.rows for shard in self._stored(digest)]
        except FileNotFoundError:
            return None

    def make_plan(self, digest: str, token: str) -> list[int]:
        source, limits = Storage(self.place), Limits(self.shard_size, self.max_shard_bytes)
        plan = list({"webdataset": plan_tars, "folder": plan_folder}[self.kind](source, limits))
        table = pa.Table.from_pylist([asdict(shard) for shard in plan], schema=PLAN_SCHEMA)
        write_plan(self.dataset, PLAN, digest, table, token)
        return [shard.rows for shard in plan]

    def _stored(self, digest: str) -> list[PlannedShard]:
        return [_planned(row) for row in read_plan(self.dataset, PLAN, digest).to_pylist()]

    def open_source(self, digest: str) -> ShardMaker:
        plan = self._stored(digest)
        source = Storage(self.place)
        read = {"webdataset": read_tar_rows, "folder": read_folder_rows}[self.kind]

        def make(shard: int, watch: Watch) -> ShardContents:
            return self._pack(read(source, plan[shard]), watch)

        return make

    def _pack(self, rows: Iterator[InputRow], watch: Watch) -> ShardContents:
        samples: dict[str, Sample] = {}
        outcomes = []
        for number, row in enumerate(rows):
            outcomes.append(self._take(row, watch.begin_row(number), samples))
            watch.end_row()  # the next one is still to be read
        tar, table = pack_samples(list(samples.values()))
        sources = pa.Table.from_pylist(outcomes, schema=SOURCES_SCHEMA)
        return ShardContents(tar, table, sources)

    def _take(
        self, row: InputRow, condemned: str | None, samples: dict[str, Sample]
    ) -> dict[str, Any]:
        """Turn one input row into (part of) a sample, or into a reason why not."""
        key = sample_key(row.image) if row.image is not None else None
        reason = condemned or self._add(row, key, samples)
        return {
            "row_id": row.row_id,
            "key": key,
            "status": "failed" if reason else "ok",
            "reason": reason,
            "source": row.source,
            "source_id": row.source_id,
            "url": row.url,
        }

    def _add(self, row: InputRow, key: str | None, samples: dict[str, Sample]) -> str | None:
        if row.damaged:
            return f"source_damaged: {row.damaged}"
        if row.image is None or key is None:
            return "no_image"
        if len(row.image) > self.max_image_bytes:
            return f"too_many_bytes: {len(row.image):,}, limit {self.max_image_bytes:,}"
        if key not in samples:
            try:
                info = inspect(row.image, self.max_pixels)
            except DecodeError as error:
                return str(error)[:200]
            samples[key] = Sample(key, row.image, info)
        samples[key].add_row(row.row_id, row.alt_text, row.url)
        return None


def _planned(row: dict[str, Any]) -> PlannedShard:
    files = tuple(tuple(names) for names in row["files"])
    return PlannedShard(**{**row, "files": files, "repeated": tuple(row["repeated"])})
