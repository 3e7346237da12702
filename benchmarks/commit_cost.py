"""What a shard costs apart from its work: an empty stage over 2,000 shards of one row.

    python -m benchmarks.commit_cost [--shards 2000] [--runs 3]

On Ray with one worker, so that seconds a shard are not hidden by parallel work, and in the plain
loop. Start-up is left out: time runs from the first result to the last. Flat: the last quarter
takes no longer a shard than the second (the first still warms caches).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.plain_stage import PlainStage
from benchmarks.result import finish
from fusion_pipeline.dataset.fingerprints import fingerprint
from fusion_pipeline.dataset.layout import Dataset, TableVersion
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.dataset.schemas import SAMPLES, SAMPLES_SCHEMA
from fusion_pipeline.dataset.tables import encode_table
from fusion_pipeline.engine.chain import Chain, run_in_process
from fusion_pipeline.engine.ray_pool import RayOptions, run_on_ray, start_ray, stop_ray
from fusion_pipeline.engine.shard import Step
from fusion_pipeline.engine.stage import ShardBlock

TARGET_MS = 20.0
SAMPLES_MADE_BY = fingerprint("one row", 1, {}, {})


@dataclass(frozen=True)
class Empty(PlainStage):
    """Does nothing; its table has a status and no columns."""

    name: str

    def work(self, block: ShardBlock) -> pa.Table:
        rows = len(block)
        return pa.table({"key": block.keys, "status": ["ok"] * rows, "reason": [None] * rows})


def make_shards(root: Path, shards: int) -> Dataset:
    """`samples` tables of one row; an empty stage asks for no image, so there are no tars."""
    dataset = Dataset.create(root)
    version = TableVersion.of(SAMPLES, SAMPLES_MADE_BY)
    blank = {field.name: [None] for field in SAMPLES_SCHEMA}
    for shard in range(shards):
        row = {**blank, "key": [f"{shard:032x}"], "status": ["ok"]}
        table = pa.table(row, schema=SAMPLES_SCHEMA)
        data, _ = encode_table(table, SAMPLES, shard, SAMPLES_MADE_BY, {})
        dataset.storage.put(version.path(shard), data)
    with hold_lease(dataset.storage, "benchmark") as token:
        dataset.describe_table(version, token)
    return dataset


def measure(
    dataset: Dataset, name: str, run: Callable[[Chain, Sequence[int]], Iterable[object]]
) -> dict[str, Any]:
    made_by = fingerprint(name, 1, {}, {SAMPLES: SAMPLES_MADE_BY})
    step = Step(Empty(name), made_by, {SAMPLES: SAMPLES_MADE_BY})
    shards = dataset.shards()
    with hold_lease(dataset.storage, "benchmark") as token:
        chain = Chain.resolve(dataset, (step,)).under(token, "benchmark")
        chain.describe()
        at = [time.perf_counter() for _ in run(chain, shards)]
    quarter = len(at) // 4

    def per_shard(first: int, last: int) -> float:
        return 1000 * (at[last] - at[first]) / (last - first)

    return {
        "shards": len(at),
        "ms a shard": per_shard(0, len(at) - 1),
        "second quarter": per_shard(quarter, 2 * quarter),
        "last quarter": per_shard(len(at) - 1 - quarter, len(at) - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_shards(Path(folder) / "data", options.shards)
        for number in range(options.runs):
            loop = measure(dataset, f"loop-{number}", run_in_process)
            rows.append({"by": "plain loop", **loop})
            start_ray(RayOptions(cpus=1))
            try:
                rows.append({"by": "Ray", **measure(dataset, f"ray-{number}", run_on_ray)})
            finally:
                stop_ray()
    on_ray = [row for row in rows if row["by"] == "Ray"]
    cost = statistics.median(row["ms a shard"] for row in on_ray)
    slope = statistics.median(row["last quarter"] / row["second quarter"] for row in on_ray)
    ok = cost <= TARGET_MS and slope <= 1.2
    finish("commit-cost", cost, "ms a shard on Ray", TARGET_MS, ok, rows, {"slope": slope})


if __name__ == "__main__":
    from benchmarks import commit_cost  # under its own name: the stage travels by it

    commit_cost.main()
