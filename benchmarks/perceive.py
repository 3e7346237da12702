"""The perceive chain against the bare loop over the same models, and what a second expert costs.

    python -m benchmarks.perceive [--images 500] [--runs 3]

Two ratios, each of runs in turn. `chain`: tagging, detection, text recognition and the merging of
what they say, images a second, over the best bare loop (`benchmarks.overhead`), which merges
nothing. `two`: the detector and the same detector once more under another name, over the detector
alone; half would be free of charge.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.overhead import make_pool, run_bare, run_ours, stages_of
from benchmarks.result import finish
from experts import SHIPPED, load_expert
from fusion_pipeline.dataset.evidence import EvidenceKind
from fusion_pipeline.engine.stage import Stage
from fusion_pipeline.perceive.merge_stages import MergeObjects, MergeTags
from fusion_pipeline.perceive.stage import Perceive

DETECTOR = "nanodet"
CHAIN, TWO = 0.9, 0.47


def whole_chain() -> list[Stage]:
    experts = stages_of(SHIPPED)
    tags, objects = (
        tuple(stage.name for stage in experts if stage.name.startswith(kind))
        for kind in (EvidenceKind.TAGS, EvidenceKind.OBJECTS)
    )
    return [*experts, MergeTags(tags), MergeObjects(objects, has_tags=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    one = stages_of([DETECTOR])
    twin: Stage = Perceive(DETECTOR, load_expert(DETECTOR).Config(), label=f"{DETECTOR}-2")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pool = make_pool(Path(folder), options.images)
        images = sum(table.num_rows for _, table in pool.iterate("samples"))
        for run in range(options.runs):
            seconds = {
                "bare": run_bare(pool, SHIPPED),
                "chain": run_ours(pool, whole_chain()),
                "one": run_ours(pool, one),
                "two": run_ours(pool, [*one, twin]),
            }
            rates = {f"{name} images/s": images / s for name, s in seconds.items()}
            chain, two = seconds["bare"] / seconds["chain"], seconds["one"] / seconds["two"]
            rows.append({"run": run, "images": images, **rates, "chain": chain, "two": two})
    chain, two = (statistics.median(float(row[name]) for row in rows) for name in ("chain", "two"))
    is_ok = chain >= CHAIN and two >= TWO
    finish(
        "perceive",
        chain,
        "chain / bare loop",
        CHAIN,
        is_ok,
        rows,
        {"two": two, "two at least": TWO},
    )


if __name__ == "__main__":
    main()
