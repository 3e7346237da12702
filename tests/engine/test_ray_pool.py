"""On Ray: hostile images cost one row each, silence ends, and the numbers reach Prometheus."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.engine.errors import StageError, StalledError
from fusion_pipeline.engine.guard import Incident, Limits
from fusion_pipeline.engine.ray_pool import RayOptions, run_on_ray, run_task, start_ray, stop_ray
from fusion_pipeline.engine.shard import ShardResult
from fusion_pipeline.engine.stage import Resources
from tests.engine.test_guard import LIMITS, Deadly, rows_of
from tests.killing import REPOSITORY
from tests.toy import files_of, run_toy, toy_steps

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("ray")]

SHARDS = range(6)
STAGE = Deadly(kills=((1, "segfault"), (2, "hang"), (4, "eat_memory")))


def metrics() -> str:
    import ray

    (node,) = ray.nodes()
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def drive(root: str) -> None:
    """Run in a process of its own, which prints what it saw."""
    start_ray(RayOptions(cpus=2))

    def run(chain: object, shards: object) -> object:
        return run_on_ray(chain, shards, LIMITS)  # type: ignore[arg-type]

    found = run_toy(root, SHARDS, toy_steps(first=STAGE), run)  # type: ignore[arg-type]
    with pytest.raises(StageError, match="asks for 3 CPUs; the largest node has 2"):
        run_task(Resources(cpus=3), print)
    deadline = time.monotonic() + 60
    while "fusion_processes_lost" not in (text := metrics()) and time.monotonic() < deadline:
        time.sleep(1)  # exported at intervals
    stop_ray()
    results = [r for r in found if isinstance(r, ShardResult)]
    incidents = [r.verdict for r in found if isinstance(r, Incident)]
    print(json.dumps({"results": len(results), "incidents": incidents, "metrics": text}))


def test_three_hostile_images(tmp_path: Path) -> None:
    code = f"from tests.engine.test_ray_pool import drive; drive({str(tmp_path / 'ray')!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    reasons = [row["reason"] for row in rows_of(tmp_path / "ray", "a", 1)]
    assert reasons == [
        None, "killed_worker: SIGSEGV", "killed_worker: silent", None,
        "killed_worker: memory", None,
    ]  # fmt: skip
    assert seen["results"] == len(SHARDS) * 4
    assert seen["incidents"].count("condemned") == 3
    for name in ("fusion_rows", "fusion_shards", "fusion_shard_seconds", "fusion_processes_lost"):
        assert name in seen["metrics"]

    run_toy(tmp_path / "plain", SHARDS, toy_steps(first=Deadly()))
    on_ray, plain = files_of(tmp_path / "ray"), files_of(tmp_path / "plain")
    assert {n for n in plain if on_ray[n] != plain[n]} == {
        Dataset.open(tmp_path / "ray").version(table).path(1) for table in ("a", "b", "nested/c")
    }  # the other shards: the same bytes


def frozen_run(root: str, may_reconnect: bool) -> None:
    """Run in a process of its own. After the first results all actors freeze, which is how it looks
    when Ray has lost their tasks."""
    start_ray(RayOptions(cpus=2))
    told: list[str] = []

    def reconnect(why: str) -> None:
        told.append(why)
        stop_ray()
        start_ray(RayOptions(cpus=2))

    def run(chain: object, shards: object) -> object:
        limits = Limits(stall_s=4, start_s=8)
        results = run_on_ray(chain, shards, limits, reconnect if may_reconnect else None)  # type: ignore[arg-type]
        for number, result in enumerate(results):
            if number == 3:
                for process in psutil.Process().children(recursive=True):
                    if "ray::MapWorker" in " ".join(process.cmdline()):
                        os.kill(process.pid, signal.SIGSTOP)
            yield result

    try:
        run_toy(root, range(30), toy_steps(pause=0.05), run)  # type: ignore[arg-type]
    except StalledError as error:
        told.append(f"ended: {error}")
    finally:
        stop_ray()
    print(json.dumps(told))


@pytest.mark.parametrize("may_reconnect", [True, False])
def test_silence(tmp_path: Path, may_reconnect: bool) -> None:
    code = (
        "from tests.engine.test_ray_pool import frozen_run; "
        f"frozen_run({str(tmp_path / 'ray')!r}, {may_reconnect})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout.splitlines()[-1])
    assert "no step of any shard was finished" in said
    if may_reconnect:
        run_toy(tmp_path / "plain", range(30), toy_steps())
        assert files_of(tmp_path / "ray") == files_of(tmp_path / "plain")
    else:
        assert said.startswith("ended: ")
