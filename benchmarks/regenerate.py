"""100,000 captions by an endpoint that answers at once, with the driver killed (-9) twice.

    python -m benchmarks.regenerate [--rows 100000]

Pictures are tiny: this is the house around the requests, not images or a model. Looked at: one
outcome a row, no request twice but those in flight at a kill, the memory of the process that asks.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pyarrow as pa
from rich.console import Console

from benchmarks.many_rows import make_source
from benchmarks.plain_stage import PlainStage
from benchmarks.result import finish
from fusion_pipeline.dataset.fingerprints import fingerprint
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.dataset.schemas import SAMPLES
from fusion_pipeline.engine.chain import Chain
from fusion_pipeline.engine.ray_pool import RayOptions, run_on_ray, start_ray, stop_ray
from fusion_pipeline.engine.run import Fuse, RunLog, drive
from fusion_pipeline.engine.shard import Step
from fusion_pipeline.engine.stage import Resources, ShardBlock
from fusion_pipeline.fuse.endpoint import Endpoint, EndpointConfig
from fusion_pipeline.fuse.engines import Engine
from fusion_pipeline.fuse.journal import Journal
from fusion_pipeline.fuse.stage import Caption
from fusion_pipeline.ingest.source import Ingest

CAPTIONS = "captions/null"
IN_FLIGHT = 128
GROWTH_MB = 100


@dataclass(frozen=True)
class Prompts(PlainStage):
    """Names the sample, so that the server can count."""

    name = "prompts/null"
    columns = (pa.field("prompt", pa.string()),)

    def work(self, block: ShardBlock) -> pa.Table:
        texts = [alt_texts[0] for alt_texts in block.column(SAMPLES, "alt_texts")]
        prompts = [text.replace("picture", "Describe it.\nsample") for text in texts]
        n = len(block)
        return pa.table(
            {"key": block.keys, "status": ["ok"] * n, "reason": pa.nulls(n, pa.string()),
             "prompt": prompts}
        )  # fmt: skip


def chain_of(root: str, source: str, url: str) -> tuple[Chain, int]:
    dataset = Dataset.create(root)
    ingest = Ingest(dataset, "webdataset", source, 500, 2**28, 2**26, 10**8)
    digest = ingest.plan_digest()
    rows = ingest.plan(digest)
    if rows is None:
        with hold_lease(dataset.storage, "plan") as token:
            rows = ingest.make_plan(digest, token)
    config = EndpointConfig(url=url, model="captioner-7b", key_env=None, concurrency=IN_FLIGHT)
    journal = Journal(dataset, CAPTIONS)
    make, asked = partial(Endpoint, config, journal), config.fingerprint_fields()
    hosted = Resources(workers=1, is_free=False, lanes=4)
    engine = Engine(make, 1, asked, journal, resources=hosted)
    captions = Caption("null", engine, (), Prompts.name)
    made = {SAMPLES: fingerprint(ingest.name, ingest.version, ingest.settings(), {})}
    steps = [Step(ingest, made[SAMPLES], {})]
    for stage in (Prompts(), captions):
        reads = {name: made[name] for name in (SAMPLES, *stage.reads)}
        made[stage.name] = fingerprint(stage.name, stage.version, stage.settings(), reads)
        steps.append(Step(stage, made[stage.name], reads))
    return Chain.resolve(dataset, steps, digest), len(rows)


def run(root: str, source: str, url: str) -> None:
    """The driver: everything that is missing."""
    chain, shards = chain_of(root, source, url)
    pending = chain.pending(range(shards))
    start_ray(RayOptions(cpus=2))
    try:
        with hold_lease(chain.dataset.storage, "benchmark") as token:
            chain = chain.under(token, "benchmark")
            chain.describe()
            with RunLog(chain.dataset.storage, "benchmark") as log:
                drive(chain, pending, run_on_ray, log, Fuse(), Console(quiet=True))
    finally:
        stop_ray()


class Memory(threading.Thread):
    """The largest worker below a driver, sample by sample, MB."""

    def __init__(self, driver: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float]] = []
        self._driver = driver
        self.start()

    def run(self) -> None:
        while self._driver.poll() is None:
            self.samples.append((time.monotonic(), max(_workers(self._driver.pid), default=0.0)))
            time.sleep(1.0)


def _workers(pid: int) -> Iterator[float]:
    try:
        for process in psutil.Process(pid).children(recursive=True):
            if "ray::MapWorker" in " ".join(process.cmdline()):
                yield process.memory_info().rss / 2**20
    except psutil.NoSuchProcess:
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--drive", nargs=3, metavar=("ROOT", "SOURCE", "URL"))
    options = parser.parse_args()
    if options.drive:
        run(*options.drive)
        return
    from tests.fuse.api_server import ApiServer, serve_api

    with tempfile.TemporaryDirectory() as folder, serve_api(ApiServer()) as server:
        root, source = f"{folder}/data", f"{folder}/source"
        make_source(Path(source), options.rows)
        command = [sys.executable, "-m", "benchmarks.regenerate", "--drive", root, source]
        rows, memory = [], []
        for stop_at in (options.rows // 3, options.rows // 3, None):
            begun, before = time.monotonic(), server.seen.total()
            driver = subprocess.Popen([*command, server.url], env={**os.environ})
            watched = Memory(driver)
            while driver.poll() is None:
                if stop_at is not None and server.seen.total() - before >= stop_at:
                    break
                time.sleep(0.02)
            if stop_at is not None:
                family = psutil.Process(driver.pid).children(recursive=True)
                driver.kill()
                psutil.wait_procs(family, timeout=30)  # orphans go on asking for a moment
            driver.wait()
            asked = server.seen.total() - before
            memory.append([mb for _, mb in watched.samples if mb])
            seconds = time.monotonic() - begun
            rows.append(
                {
                    "ended by": "kill -9" if stop_at else "itself",
                    "requests": asked,
                    "seconds": seconds,
                    "requests/s": asked / seconds,
                    "worker MB, early": _median(memory[-1][len(memory[-1]) // 4 :][:5]),
                    "worker MB, late": _median(memory[-1][-5:]),
                }
            )
        dataset = Dataset.open(root)
        outcomes = [row for _, t in dataset.iterate(CAPTIONS) for row in t["status"].to_pylist()]
    repeated = server.seen.total() - len(server.seen)
    growth = max(float(row["worker MB, late"]) - float(row["worker MB, early"]) for row in rows)
    is_whole = outcomes == ["ok"] * options.rows and len(server.seen) == options.rows
    ok = is_whole and repeated <= 2 * IN_FLIGHT and growth < GROWTH_MB
    details = {"outcomes": len(outcomes), "asked twice": repeated, "growth MB": growth}
    finish("regenerate", options.rows, "rows", options.rows, ok, rows, details)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


if __name__ == "__main__":
    from benchmarks import regenerate  # under its own name: stages travel to other processes by it

    regenerate.main()
