"""A stage without settings and model; whoever derives from it says its name and does the work."""

from collections.abc import Mapping, Sequence

import pyarrow as pa

from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardBlock, Worker


class PlainStage:
    name: str
    version = 1
    reads: tuple[str, ...] = ()
    columns: Sequence[pa.Field] = ()
    resources: Resources = CPU_WORKER

    def settings(self) -> Mapping[str, object]:
        return {}

    def revision(self) -> None:
        return None

    def open(self) -> Worker:
        return self.work

    def work(self, block: ShardBlock) -> pa.Table:
        raise NotImplementedError
