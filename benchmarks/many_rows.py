"""Does the driver hold O(shards)? 100,000 tiny samples: ingest, filter and a trivial embedder.

    python -m benchmarks.many_rows [--rows 100000]

Each run is a process of its own, whose memory is told. Targets: from a tenth of the rows to all of
them the driver grows by less than 300 MB, and time grows in proportion; with a tenth of the work
left a restart knows what is pending within 5 s, on S3 (a local server) within 15 s, from the start
of the process.
"""

import argparse
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from rich.console import Console

from benchmarks.plain_stage import PlainStage
from benchmarks.result import finish
from fusion_pipeline.dataset.fingerprints import fingerprint
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.dataset.schemas import SAMPLES
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.engine.chain import Chain
from fusion_pipeline.engine.ray_pool import RayOptions, run_on_ray, start_ray, stop_ray
from fusion_pipeline.engine.run import Fuse, RunLog, drive
from fusion_pipeline.engine.shard import Step
from fusion_pipeline.engine.stage import ShardBlock
from fusion_pipeline.ingest.filters import Resolution
from fusion_pipeline.ingest.source import Ingest

DIMENSIONS = 64
TAR_ROWS = 10_000
GROWTH_MB, RESTART_S, RESTART_S3_S, LINEAR = 300, 5, 15, 1.3


@dataclass(frozen=True)
class Trivial(PlainStage):
    """Random numbers by the hash of the image: the shape of an embedding, no model."""

    name = "embeddings"
    reads = ("resolution",)
    columns = (pa.field("embedding", pa.binary(2 * DIMENSIONS)),)

    def work(self, block: ShardBlock) -> pa.Table:
        seeds = [int.from_bytes(hashlib.sha256(image).digest()[:8]) for image in block.images]
        rows = [np.random.default_rng(s).random(DIMENSIONS).astype(np.float16) for s in seeds]
        n = len(block)
        return pa.table(
            {"key": block.keys, "status": ["ok"] * n, "reason": pa.nulls(n, pa.string()),
             "embedding": pa.array([row.tobytes() for row in rows], pa.binary(2 * DIMENSIONS))}
        )  # fmt: skip


def make_source(folder: Path, rows: int) -> None:
    """Tars of 8 x 8 pictures, no two alike."""
    folder.mkdir(parents=True)
    for start in range(0, rows, TAR_ROWS):
        with tarfile.open(folder / f"{start:08d}.tar", "w") as tar:
            for row in range(start, min(start + TAR_ROWS, rows)):
                sink = io.BytesIO()
                pixels = np.frombuffer(hashlib.sha512(b"%d" % row).digest() * 3, np.uint8)
                Image.fromarray(pixels.reshape(8, 8, 3)).save(sink, "PNG")
                for name, data in (("png", sink.getvalue()), ("txt", b"picture %d" % row)):
                    info = tarfile.TarInfo(f"{row:08d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def chain_of(root: str, source: str) -> tuple[Chain, list[int], Ingest]:
    dataset = Dataset.create(root)
    ingest = Ingest(dataset, "webdataset", source, 500, 2**28, 2**26, 10**8)
    digest = ingest.plan_digest()
    rows = ingest.plan(digest)
    if rows is None:
        with hold_lease(dataset.storage, "plan") as token:
            rows = ingest.make_plan(digest, token)
    made = {SAMPLES: fingerprint(ingest.name, ingest.version, ingest.settings(), {})}
    steps = [Step(ingest, made[SAMPLES], {})]
    for stage in (Resolution(1), Trivial()):
        reads = {name: made[name] for name in (SAMPLES, *stage.reads)}
        made[stage.name] = fingerprint(stage.name, stage.version, stage.settings(), reads)
        steps.append(Step(stage, made[stage.name], reads))
    return Chain.resolve(dataset, steps, digest), rows, ingest


def run(root: str, source: str) -> dict[str, float]:
    """The driver: everything that is missing."""
    chain, rows, _ = chain_of(root, source)
    pending = chain.pending(range(len(rows)))
    start_ray(RayOptions(cpus=2))
    try:
        with hold_lease(chain.dataset.storage, "benchmark") as token:
            chain = chain.under(token, "benchmark")
            chain.describe()
            with RunLog(chain.dataset.storage, "benchmark") as log:
                started = time.perf_counter()
                drive(chain, pending, run_on_ray, log, Fuse(), Console(quiet=True))
                seconds = time.perf_counter() - started
    finally:
        stop_ray()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rows": sum(rows), "shards": len(rows), "seconds": seconds, "driver MB": peak}


def find_pending(root: str, source: str) -> dict[str, float]:
    chain, rows, _ = chain_of(root, source)
    pending = chain.pending(range(len(rows)))
    return {"pending": sum(map(len, pending.values()))}


def in_process(what: str, *places: str, **environment: str) -> dict[str, float]:
    """A function of this module, in a process of its own; with the seconds that it took in all."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.many_rows", "--do", what, *places],
        env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "process s": time.perf_counter() - started}


def drop_a_tenth(storage: Storage) -> None:
    """Of each table, and its shards: as if the run had been killed at nine tenths."""
    for place in ("tables/embeddings", "tables/resolution", "tables/samples"):
        files = [path for path in storage.files(place) if path.endswith(".parquet")]
        for path in files[-(len(files) // 10) :]:
            storage.delete(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--do", nargs=3, metavar=("WHAT", "ROOT", "SOURCE"))
    options = parser.parse_args()
    if options.do:
        what, root, source = options.do
        print(json.dumps({"run": run, "pending": find_pending}[what](root, source)))
        return
    with tempfile.TemporaryDirectory() as folder:
        _compare(Path(folder), options.rows)


def _compare(folder: Path, rows: int) -> None:
    from tests.faulty_s3 import s3_server

    make_source(folder / "few", rows // 10)
    make_source(folder / "many", rows)
    few = in_process("run", f"{folder}/data-few", f"{folder}/few")
    many = in_process("run", f"{folder}/data", f"{folder}/many")
    storage = Storage(folder / "data")
    drop_a_tenth(storage)
    local = in_process("pending", f"{folder}/data", f"{folder}/many")
    with s3_server() as server:
        server.make_bucket("bench")
        os.environ.update(server.environment)
        for target, source in (("data", storage), ("many", Storage(folder / "many"))):
            remote = Storage(f"s3://bench/{target}")
            for path in source.files(""):
                remote.put(path, source.read(path))
        on_s3 = in_process("pending", "s3://bench/data", "s3://bench/many")
    growth = many["driver MB"] - few["driver MB"]
    linear = many["seconds"] / few["seconds"] / (many["rows"] / few["rows"])
    ok = (
        growth < GROWTH_MB
        and linear <= LINEAR
        and local["process s"] <= RESTART_S
        and on_s3["process s"] <= RESTART_S3_S
    )
    details = {
        "seconds in proportion to rows": linear,
        "restart, s": local["process s"],
        "restart on S3, s": on_s3["process s"],
        "pending found": [local["pending"], on_s3["pending"]],
    }
    print(json.dumps(details))
    finish("many-rows", growth, "MB of driver growth", GROWTH_MB, ok, [few, many], details)


if __name__ == "__main__":
    from benchmarks import many_rows  # under its own name: the stage travels by it

    many_rows.main()
