"""A cheap chain of three stages over made-up images, for tests of the engine.

python -m tests.toy FOLDER [--workers N] [--shards N] [--pause SECONDS]   runs it on Ray
"""

import argparse
import hashlib
import io
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from PIL import Image

from fusion_pipeline.dataset.fingerprints import Fingerprint, fingerprint
from fusion_pipeline.dataset.images import inspect
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.dataset.samples import Sample, pack_samples, sample_key
from fusion_pipeline.dataset.schemas import SAMPLES, SOURCES_SCHEMA
from fusion_pipeline.dataset.storage import TEMPORARY_FILES
from fusion_pipeline.engine.chain import Chain, Replace, run_in_process
from fusion_pipeline.engine.shard import Redo, ShardResult, Step
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardBlock, ShardContents
from fusion_pipeline.engine.watch import Watch

ROWS = 6


def png(shard: int, row: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), (shard % 256, row, 77)).save(sink, "PNG")
    return sink.getvalue()


@dataclass(frozen=True)
class ToySource:
    pause: float = 0.0
    resources: Resources = CPU_WORKER
    name = "toy-source"
    version = 1
    plan_name = "toy_plan"

    def settings(self) -> dict[str, object]:
        return {"rows": ROWS}

    def plan_digest(self) -> str:
        return ""

    def plan(self, digest: str) -> list[int]:
        return []

    def make_plan(self, digest: str, token: str) -> list[int]:
        return []

    def open_source(self, digest: str) -> Callable[[int, Watch], ShardContents]:
        return self.make

    def make(self, shard: int, watch: Watch) -> ShardContents:
        time.sleep(self.pause)
        samples, sources = [], []
        for row in range(ROWS):
            image = png(shard, row)
            sample = Sample(sample_key(image), image, inspect(image))
            sample.add_row(f"{shard}-{row}", f"text {row}", None)
            samples.append(sample)
            name = f"{shard}-{row}"
            origin = {"row_id": name, "source": "toy", "source_id": name}
            sources.append({"key": sample.key, "status": "ok", "reason": None, **origin})
        tar, table = pack_samples(samples)
        return ShardContents(tar, table, pa.Table.from_pylist(sources, schema=SOURCES_SCHEMA))


@dataclass(frozen=True)
class ToyStage:
    """Hashes what it reads; every fifth row fails, unless `healed`."""

    name: str
    reads: tuple[str, ...] = ()
    pause: float = 0.0
    version: int = 1
    setting: int = 0
    healed_by: str | None = None
    """A file; while it is missing, some rows fail."""
    resources: Resources = CPU_WORKER
    columns: Sequence[pa.Field] = (pa.field("value", pa.string()),)

    def settings(self) -> dict[str, object]:
        return {"setting": self.setting}

    def revision(self) -> None:
        return None

    def open(self) -> Callable[[ShardBlock], pa.Table]:
        return self.work

    def work(self, block: ShardBlock) -> pa.Table:
        time.sleep(self.pause)
        upstream = [block.column(name, "value") for name in self.reads]
        outcomes: list[Outcome] = []
        for i, (key, image) in enumerate(zip(block.keys, block.images, strict=True)):
            text = f"{self.name} {self.setting} {[u[i] for u in upstream]}".encode()
            digest = hashlib.sha256(text + image).hexdigest()
            sick = self.healed_by is not None and not Path(self.healed_by).exists()
            if sick and int(key[:2], 16) % 5 == 0:
                outcomes.append(NotOk("failed", "sick: on purpose"))
            else:
                outcomes.append(Ok({"value": digest}))
        return build_table(block.keys, outcomes, self.columns)


def toy_steps(
    pause: float = 0.0, first: ToyStage | None = None, source: ToySource | None = None
) -> tuple[Step, ...]:
    stages = [
        first or ToyStage("a", pause=pause),
        ToyStage("b", ("a",), pause),
        ToyStage("nested/c", ("a", "b"), pause),
    ]
    return steps_of(source or ToySource(pause), stages)


def steps_of(work: ToySource, stages: Sequence[ToyStage]) -> tuple[Step, ...]:
    """The source and its stages with their lineage."""
    made: dict[str, Fingerprint] = {SAMPLES: fingerprint("toy", 1, work.settings(), {})}
    steps = [Step(work, made[SAMPLES], {})]
    for stage in stages:
        reads = {name: made[name] for name in (SAMPLES, *stage.reads)}
        made[stage.name] = fingerprint(stage.name, stage.version, stage.settings(), reads)
        steps.append(Step(stage, made[stage.name], reads))
    return tuple(steps)


def run_toy(
    root: Path | str,
    shards: Sequence[int],
    steps: tuple[Step, ...],
    run: Callable[..., Iterable[ShardResult]] = run_in_process,
    redo: Redo = Redo.MISSING,
    allowed: Replace = Replace.NOTHING,
) -> list[ShardResult]:
    dataset = Dataset.create(root)
    with hold_lease(dataset.storage, "toy") as token:
        dataset.clean_temporary()
        chain = Chain.resolve(dataset, steps, redo=redo).under(token)
        chain.outdated(allowed)
        chain.describe()
        pending = chain.pending(shards)
        if not pending:
            return []
        todo = sorted({shard for missing in pending.values() for shard in missing})
        results: Iterable[ShardResult] = run(chain.reduced(pending), todo)
        return list(results)


def path_of(dataset: Dataset, table: str, shard: int) -> Path:
    """Where a table of a local dataset lies."""
    return Path(dataset.storage.full(dataset.version(table).path(shard)))


def leave_half(root: Path, data: bytes = b"half", age_s: float = 3600) -> None:
    """What a kill in the middle of a write leaves behind."""
    file = root / TEMPORARY_FILES / uuid.uuid4().hex
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data[: len(data) // 2])
    written = time.time() - age_s
    os.utime(file, (written, written))


def files_of(root: Path) -> dict[str, bytes]:
    """Everything a reader sees: shards, tables, artifacts. No logs, lease or temporary files, and
    of the tables' descriptors not which run wrote them last."""
    kept = ("shards/", "tables/", "artifacts/")
    every = {str(p.relative_to(root)): p for p in sorted(root.rglob("*")) if p.is_file()}
    return seen_by_readers({n: p.read_bytes() for n, p in every.items() if n.startswith(kept)})


def seen_by_readers(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files, without what tells how often a table was replaced and which run wrote last; of
    each artifact the one that is pointed to."""
    told = {name: _told(name, data) for name, data in files.items()}
    there = {name: data for name, data in told.items() if data is not None}
    for name in files:
        if name.endswith("/artifact.json"):
            for stray in there.keys() & _strays(name, files):
                del there[stray]
    seen = {_GENERATION.sub(r"\1", name): data for name, data in there.items()}
    assert len(seen) == len(there), "two generations of one file"
    return seen


def _strays(pointer: str, files: Mapping[str, bytes]) -> set[str]:
    said = json.loads(files[pointer])
    number = f"-{said['generation']}" if said["generation"] else ""
    folder = pointer.removesuffix("artifact.json")
    current = f"{folder}v-{said['content']}{number}.parquet"
    return {name for name in files if name.startswith(folder)} - {pointer, current}


_GENERATION = re.compile(r"(/v-[0-9a-f]{8})-\d+(?=[/.])")


def _told(name: str, data: bytes) -> bytes | None:
    """What a file tells readers; None for the pointer of a table that was dropped."""
    if not name.endswith(("/table.json", "/artifact.json")):
        return data
    content = json.loads(data)
    if "folder" in content:
        content["folder"] = content["folder"][: len("v-12345678")]
    for about_run in ("holder", "generation"):
        content.pop(about_run, None)
    return None if "dropped" in content else json.dumps(content).encode()


def main() -> None:
    from fusion_pipeline.engine.ray_pool import RayOptions, run_on_ray, start_ray, stop_ray

    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--pause", type=float, default=0.0)
    options = parser.parse_args()
    start_ray(RayOptions(cpus=options.workers))
    run_toy(options.root, range(options.shards), toy_steps(options.pause), run_on_ray)  # type: ignore[arg-type]
    stop_ray()


if __name__ == "__main__":
    from tests import toy  # under its own name: stages travel to other processes by it

    toy.main()
