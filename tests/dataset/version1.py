"""A finished run as fusion 0.1 left it, in format version 1: made of one of today, file by file."""

import io
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq

from fusion_pipeline.dataset.artifacts import inputs_of
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.pipeline import Pipeline
from fusion_pipeline.select.selection import SELECTION


def put_back(pipeline: Pipeline) -> None:
    """Both datasets of a run, to version 1. Its source must still be there."""
    listing = pipeline.phases[0].source.plan_digest()  # type: ignore[union-attr]
    chosen = inputs_of(pipeline.pool, [SELECTION])[SELECTION]
    put_back_dataset(pipeline.pool, {"fusion_pipeline.listing": listing + 32 * "0"})
    put_back_dataset(pipeline.selected, {"fusion_pipeline.selection": chosen})


def put_back_dataset(dataset: Dataset, plan: dict[str, str]) -> None:
    """`plan`: what the schema of its plan says of what it was made from. Version 1 had

    shards/00000/00000012.tar
    tables/<name>/00000/00000012.parquet
    tables/<name>/table.json         {"fingerprint": ..., "fields": {...}}
    artifacts/<name>_plan.parquet
    runs/<run>/shards.jsonl          lines without the name of the run
    leases/<token>.ended             of leases that were taken over; lease.json only while one holds
    """
    root = Path(dataset.storage.root)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = str(path.relative_to(root))
        if name.startswith(".tmp/") or name == "lease.json":
            path.unlink()
        elif match := re.fullmatch(r"(.*)/v-[-0-9a-f]+(/\d{5}/\d{8}\.(parquet|tar))", name):
            to = root / (match[1] + match[2])
            to.parent.mkdir(exist_ok=True)
            path.rename(to)
        elif name.endswith("/table.json"):
            found = json.loads(path.read_text())
            old = {"fingerprint": found["fingerprint"], "fields": found["fields"]}
            path.write_text(json.dumps(old, indent=1))
        elif name.endswith("/artifact.json"):
            path.unlink()
        elif match := re.fullmatch(r"artifacts/(\w+_plan)/.*", name):
            sink = io.BytesIO()
            pq.write_table(pq.read_table(path).replace_schema_metadata(plan), sink)
            (root / f"artifacts/{match[1]}.parquet").write_bytes(sink.getvalue())
            path.unlink()
        elif match := re.fullmatch(r"artifacts/(\w+)/.*", name):
            path.rename(root / f"artifacts/{match[1]}.parquet")
        elif match := re.fullmatch(r"runs/([^/]+)/shards-00000\.jsonl", name):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines:
                del line["run"]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (root / f"runs/{match[1]}/shards.jsonl").write_text(text)
            path.unlink()
    for folder in [*root.rglob("v-*"), *root.glob("artifacts/*")]:
        if folder.is_dir():
            shutil.rmtree(folder)  # empty now
    (root / "leases").mkdir(exist_ok=True)
    (root / "leases" / "0123456789abcdef.ended").touch()
    (root / ".tmp").mkdir(exist_ok=True)
    (root / ".tmp" / "0123456789abcdef0123456789abcdef").write_bytes(b"half a tar")
    (root / "dataset.json").write_text('{"format_version": 1}')
