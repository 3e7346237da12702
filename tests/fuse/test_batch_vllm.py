"""The same files, run by a real `vllm run-batch` on the CPU."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest
from batch_job import Job, outcomes_of

from fusion_pipeline.fuse.batch.desk import Desk
from fusion_pipeline.fuse.batch.plan import Plan
from tests.serving import SERVE, VLLM, make_tiny_model


@pytest.mark.xdist_group("vllm")
@pytest.mark.timeout(600)
def test_vllm_runs_the_files_unchanged(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    job = Job(tmp_path / "data", {"model": "tiny", "key_env": None, "max_tokens": 16})
    job.prepare(shards=2, rows=3)
    (entry,) = job.work(lambda desk, plan: desk.submit(plan, is_elsewhere=True)).entries
    books = job.plan().books
    file = books.dataset.storage.full(books.path(entry.name, "requests.jsonl"))

    flags = {f"--{name.replace('_', '-')}": str(value) for name, value in SERVE.items()}
    del flags["--enforce-eager"]
    options = [part for flag in flags.items() for part in flag] + ["--enforce-eager"]
    names = ["--model", str(model), "--served-model-name", "tiny"]
    command = [str(VLLM), "run-batch", "-i", file, "-o", "results.jsonl", *names, *options]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    def take(desk: Desk, plan: Plan) -> Counter[str]:
        return desk.take_files([tmp_path / "results.jsonl"])

    assert job.work(take) == {"answered": 6}
    job.collect()
    assert outcomes_of(job, "tiny") == {"length": 6}
