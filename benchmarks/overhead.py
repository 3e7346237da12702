"""What the house costs: the perceive chain on Ray against the best bare loop over the same models.

    python -m benchmarks.overhead [--images 500] [--runs 3] [--tagger-only]

Bare loop: two processes of one thread each (faster here than one process of two threads) take
shards from a shared queue, read the tar, decode once a model, run the model, drop the result. Ours:
the same models as stages on Ray, with tables committed. Start-up (Ray, processes, loading) is left
out of both; runs alternate.
"""

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.result import finish
from experts import SHIPPED, load_expert
from experts.base import Context, Hardware
from fusion_pipeline.config import load_config
from fusion_pipeline.dataset.images import decode
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.demo import make_demo_data
from fusion_pipeline.engine.chain import Chain
from fusion_pipeline.engine.ray_pool import RayOptions, run_on_ray, start_ray, stop_ray
from fusion_pipeline.engine.shard import ShardResult, Step
from fusion_pipeline.engine.stage import Stage
from fusion_pipeline.perceive.stage import Perceive
from fusion_pipeline.pipeline import build_pipeline
from fusion_pipeline.runner import Options, Runner

CORES = 2
CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def make_pool(folder: Path, images: int) -> Dataset:
    """Demo data of as many seeds as it takes, ingested."""
    seeds = -(-images // 180)
    for seed in range(seeds):
        make_demo_data(folder / f"demo-{seed}", 100 + seed)
        shutil.copytree(folder / f"demo-{seed}" / "shards", folder / "all" / f"{seed}")
    overrides = [f"run={folder}/run", f"source.webdataset={folder}/all"]
    pipeline = build_pipeline(load_config(CONFIG, overrides))
    options = Options(until="ingest", in_process=True)
    Runner(pipeline, options, Console(quiet=True)).run()
    return pipeline.pool


def bare_worker(
    pool: Dataset, experts: Sequence[str], shards: Any, ready: Barrier, done: Any
) -> None:
    models = [load_expert(name)(load_expert(name).Config(), Hardware()) for name in experts]
    for model in models:  # the first call allocates
        model([decode(next(iter(pool.read_images(0).values())))], [Context(1, 1)])
    ready.wait()
    while (shard := shards.get()) is not None:
        for image in pool.read_images(shard).values():
            for model in models:
                model([decode(image, min_short_edge=model.min_short_edge)], [Context(1, 1)])
    done.put(time.perf_counter())


def run_bare(pool: Dataset, experts: Sequence[str]) -> float:
    """Seconds from the last process ready to the last one done."""
    context = multiprocessing.get_context("spawn")
    shards, done = context.Queue(), context.Queue()
    for shard in [*pool.shards(), *[None] * CORES]:
        shards.put(shard)
    ready = context.Barrier(CORES + 1)
    arguments = (pool, experts, shards, ready, done)
    workers = [context.Process(target=bare_worker, args=arguments) for _ in range(CORES)]
    for worker in workers:
        worker.start()
    ready.wait()
    started = time.perf_counter()
    ended = max(done.get() for _ in workers)
    for worker in workers:
        worker.join()
    return float(ended - started)


def stages_of(experts: Sequence[str]) -> list[Stage]:
    return [Perceive(name, load_expert(name).Config()) for name in experts]


def run_ours(pool: Dataset, stages: Sequence[Stage]) -> float:
    """Seconds from the first shard begun to the last table committed."""
    with hold_lease(pool.storage, "benchmark") as token:
        for stage in stages:
            pool.drop_table(stage.name, token)
    samples = build_pipeline(load_config(CONFIG, [f"run={Path(pool.storage.root).parent}"]))
    made_by = samples.phases[0].steps[0].made_by  # type: ignore[union-attr]
    steps = tuple(
        Step(stage, made_by, dict.fromkeys(("samples", *stage.reads), made_by)) for stage in stages
    )
    begun, ended = float("inf"), 0.0
    start_ray(RayOptions(cpus=CORES))
    try:
        with hold_lease(pool.storage, "benchmark") as token:
            chain = Chain.resolve(pool, steps).under(token)
            chain.describe()
            for result in run_on_ray(chain, pool.shards()):
                assert isinstance(result, ShardResult), result
                ended = time.perf_counter()
                begun = min(begun, ended - result.seconds)
    finally:
        stop_ray()
    return ended - begun


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tagger-only", action="store_true")
    options = parser.parse_args()
    experts = ["efficientnet-lite2"] if options.tagger_only else list(SHIPPED)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pool = make_pool(Path(folder), options.images)
        images = sum(table.num_rows for _, table in pool.iterate("samples"))
        for run in range(options.runs):
            bare, ours = run_bare(pool, experts), run_ours(pool, stages_of(experts))
            rows.append(
                {
                    "run": run,
                    "images": images,
                    "bare images/s": images / bare,
                    "ours images/s": images / ours,
                    "ratio": bare / ours,
                }
            )
    ratio = statistics.median(float(row["ratio"]) for row in rows)
    name = "overhead-tagger" if options.tagger_only else "overhead"
    target = 0.75 if options.tagger_only else 0.85
    finish(name, ratio, "ours / bare loop", target, ratio >= target, rows, {"experts": experts})


if __name__ == "__main__":
    main()
