"""Making sources, and ingesting them shard by shard without a run."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.engine.stage import ShardContents
from fusion_pipeline.engine.watch import Watch
from fusion_pipeline.ingest.source import Ingest


def tar_of(members: Iterable[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def ingest_of(place: Path, out: Path, kind: str, **limits: int) -> Ingest:
    settings = {"shard_size": 500, "max_shard_bytes": 2**28, "max_image_bytes": 2**20, **limits}
    dataset = Dataset.create(out)
    return Ingest(dataset, kind, str(place), max_pixels=10**6, **settings)  # type: ignore[arg-type]


def plan_of(ingest: Ingest) -> str:
    """Digest of the plan, which is made and committed. Raises SourceError."""
    digest = ingest.plan_digest()
    with hold_lease(ingest.dataset.storage, "test") as token:
        rows = ingest.make_plan(digest, token)
    assert ingest.plan(digest) == rows
    return digest


def contents_of(ingest: Ingest) -> list[ShardContents]:
    digest = plan_of(ingest)
    make = ingest.open_source(digest)
    return [make(shard, Watch()) for shard in range(len(ingest.plan(digest) or ()))]


def source_rows(shards: Iterable[ShardContents]) -> list[dict[str, Any]]:
    return [row for shard in shards for row in shard.sources.to_pylist()]


def sample_rows(shards: Iterable[ShardContents]) -> list[dict[str, Any]]:
    return [row for shard in shards for row in shard.samples.to_pylist()]
