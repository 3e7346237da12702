"""Ingest: a source's rows -> shards of decodable samples, every input row accounted for."""

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_pipeline.dataset.fingerprints import canonical_json
from fusion_pipeline.dataset.images import DecodeError, inspect
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.samples import Limits, Sample, pack_samples, sample_key
from fusion_pipeline.dataset.schemas import SOURCES_SCHEMA
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardContents, ShardMaker
from fusion_pipeline.ingest.folder import is_input, plan_folder, read_folder_rows
from fusion_pipeline.ingest.rows import (
    PLAN_SCHEMA,
    InputRow,
    PlannedShard,
    SourceChangedError,
    SourceError,
    storable,
)
from fusion_pipeline.ingest.webdataset import is_tar, plan_tars, read_tar_rows

PLAN = "artifacts/ingest_plan.parquet"
_LISTING = b"fusion_pipeline.listing"


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

    def settings(self) -> Mapping[str, Any]:
        return {
            "shard_size": self.shard_size,
            "max_shard_bytes": self.max_shard_bytes,
            "max_image_bytes": self.max_image_bytes,
            "max_pixels": self.max_pixels,
        }

    def plan(self) -> list[PlannedShard]:
        """The committed plan; made and committed at the first call. O(shards) rows.

        Raises SourceError, and SourceChangedError when the source is not the one that was planned.
        """
        source = Storage(self.place)
        listing = self._listing(source)
        try:
            stored = self._stored()
        except FileNotFoundError:
            return self._make_plan(source, listing)
        if stored.schema.metadata[_LISTING].decode() != listing:
            raise SourceChangedError(
                f"source.{self.kind}: the files under {source.url} changed since this dataset was "
                "planned (names or sizes), or the source's settings. Choose a new `run` folder, "
                "or run again with --overwrite to ingest anew."
            )
        return [_planned(row) for row in stored.to_pylist()]

    def _stored(self) -> pa.Table:
        return pq.read_table(io.BytesIO(self.dataset.storage.read(PLAN)))

    def _make_plan(self, source: Storage, listing: str) -> list[PlannedShard]:
        limits = Limits(self.shard_size, self.max_shard_bytes)
        plan = list({"webdataset": plan_tars, "folder": plan_folder}[self.kind](source, limits))
        table = pa.Table.from_pylist([asdict(shard) for shard in plan], schema=PLAN_SCHEMA)
        sink = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({_LISTING: listing.encode()}), sink)
        self.dataset.storage.put(PLAN, sink.getvalue())
        return plan

    def _listing(self, source: Storage) -> str:
        """Digest of all that the plan is made of: settings, and the files' names and sizes."""
        is_used = {"webdataset": is_tar, "folder": is_input}
        files = source.files("")
        if not files:
            raise SourceError(
                f"source.{self.kind}: nothing found at {source.url}. Check the path, or make demo "
                "data with `fusion demo-data DIR`."
            )
        odd = next((name for name in files if storable(name) != name), None)
        if odd is not None:
            raise SourceError(
                f"source.{self.kind}: a file name is not UTF-8: {storable(odd)}. Rename this file."
            )
        used = [name for name in files if is_used[self.kind](name)]
        names = [[name, source.size(name)] for name in used]
        planned = {"kind": self.kind, "settings": self.settings(), "files": names}
        return hashlib.sha256(canonical_json(planned).encode()).hexdigest()

    def open_source(self) -> ShardMaker:
        plan = [_planned(row) for row in self._stored().to_pylist()]
        source = Storage(self.place)
        read = {"webdataset": read_tar_rows, "folder": read_folder_rows}[self.kind]

        def make(shard: int) -> ShardContents:
            return self._pack(read(source, plan[shard]))

        return make

    def _pack(self, rows: Iterator[InputRow]) -> ShardContents:
        samples: dict[str, Sample] = {}
        outcomes = [self._take(row, samples) for row in rows]
        tar, table = pack_samples(list(samples.values()))
        sources = pa.Table.from_pylist(outcomes, schema=SOURCES_SCHEMA)
        return ShardContents(tar, table, sources)

    def _take(self, row: InputRow, samples: dict[str, Sample]) -> dict[str, Any]:
        """Turn one input row into (part of) a sample, or into a reason why not."""
        key = sample_key(row.image) if row.image is not None else None
        reason = self._add(row, key, samples)
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
