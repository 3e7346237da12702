"""Rules that leave samples out before anything costly looks at them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardBlock, Worker


@dataclass(frozen=True)
class Resolution:
    """Drops images whose short edge is too short (448 px in the paper, section 3.1)."""

    min_short_edge: int
    resources: Resources = CPU_WORKER

    name = "resolution"
    version = 1
    reads: tuple[str, ...] = ()
    columns: Sequence[pa.Field] = (pa.field("short_edge", pa.int32()),)

    def settings(self) -> Mapping[str, Any]:
        return {"min_short_edge": self.min_short_edge}

    def revision(self) -> None:
        return None

    def open(self) -> Worker:
        return self._filter

    def _filter(self, block: ShardBlock) -> pa.Table:
        sizes = zip(
            block.column("samples", "width"), block.column("samples", "height"), strict=True
        )
        outcomes = [self._judge(min(size)) for size in sizes]
        return build_table(block.keys, outcomes, self.columns)

    def _judge(self, short_edge: int) -> Outcome:
        values = {"short_edge": short_edge}
        if short_edge < self.min_short_edge:
            reason = f"short_edge: {short_edge} px, at least {self.min_short_edge}"
            return NotOk("filtered", reason, values)
        return Ok(values)
