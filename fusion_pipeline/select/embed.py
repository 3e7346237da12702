"""Image embeddings: what clustering and de-duplication compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from experts.base import Hardware, file_revision
from experts.tagging.efficientnet_lite2 import MIN_SHORT_EDGE, WEIGHTS, EfficientNetLite2
from fusion_pipeline.dataset.images import DecodeError, decode
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardBlock, Worker

DIMENSIONS = 1280


@dataclass(frozen=True)
class Embed:
    """Unit-norm EfficientNet-Lite2 features, stored as float16 [1280] in fixed-size binary."""

    resources: Resources = CPU_WORKER

    name = "embeddings"
    version = 1
    reads: tuple[str, ...] = ("resolution",)
    columns: Sequence[pa.Field] = (pa.field("embedding", pa.binary(2 * DIMENSIONS)),)

    def settings(self) -> Mapping[str, Any]:
        return {"model": "efficientnet-lite2", "min_short_edge": MIN_SHORT_EDGE}

    def revision(self) -> str:
        return file_revision(WEIGHTS)

    def open(self) -> Worker:
        model = EfficientNetLite2(Hardware(self.resources.threads))

        def work(block: ShardBlock) -> pa.Table:
            outcomes = []
            for image in block.images:
                block.tick()
                outcomes.append(_embed(model, image))
            return build_table(block.keys, outcomes, self.columns)

        return work


def _embed(model: EfficientNetLite2, image: bytes) -> Outcome:
    try:
        pixels = decode(image, min_short_edge=MIN_SHORT_EDGE)
    except DecodeError as error:
        return NotOk("failed", str(error)[:200])
    row = model.embed([pixels])[0]
    norm = float(np.linalg.norm(row))
    if not np.isfinite(norm) or norm == 0:
        return NotOk("failed", "no_direction: the embedding is zero or not finite")
    return Ok({"embedding": (row / norm).astype(np.float16).tobytes()})


def read_embeddings(table: pa.Table) -> npt.NDArray[np.float16]:
    """float16 [n, d] of a table's rows; a view of the column's buffer, rows not ok are zeros."""
    column = table["embedding"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    width = column.type.byte_width // 2
    flat = np.frombuffer(
        column.buffers()[1], np.float16, count=(column.offset + len(column)) * width
    )
    return flat.reshape(-1, width)[column.offset :]
