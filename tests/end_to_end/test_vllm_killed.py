"""`fusion run` with a vLLM of its own, on demo data; its server and its driver are killed."""

import json
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from fusion_pipeline.config import load_config
from fusion_pipeline.demo import make_demo_data
from fusion_pipeline.fuse.journal import Journal
from fusion_pipeline.pipeline import build_pipeline
from tests.jobs import QUICKSTART
from tests.killing import family_of, finish, start
from tests.serving import SERVE, VLLM, make_tiny_model

IN_FLIGHT = 16


class Requests:
    """What the middleware of all servers wrote down."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()]

    def begun(self) -> Counter[str]:
        return Counter(line[1] for line in self.lines() if line[0] == "begin")

    def answered(self) -> int:
        return sum(line[0] == "end" for line in self.lines())

    def wait_for(self, answers: int) -> None:
        """Until there are so many, and others are asked for."""
        deadline = time.monotonic() + 240
        while self.answered() < answers or self.begun().total() - self.answered() < IN_FLIGHT // 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def keepers(model: Path) -> list[psutil.Process]:
    """They are no children of the run."""
    lines = ((p, " ".join(p.info["cmdline"] or ())) for p in psutil.process_iter(["cmdline"]))
    return [process for process, line in lines if "keeper.py" in line and str(model) in line]


@pytest.mark.xdist_group("vllm")
@pytest.mark.timeout(900)
def test_kills_of_server_and_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_demo_data(tmp_path / "demo", seed=0)
    model = make_tiny_model(tmp_path / "tiny-llava-next")
    (tmp_path / "requests").touch()
    requests = Requests(tmp_path / "requests")
    monkeypatch.setenv("REQUEST_LOG", str(requests.log))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "fuse"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    engine = {
        "model": str(model),
        "device": "cpu",
        "command": str(VLLM),
        "max_tokens": 60,
        "concurrency": IN_FLIGHT,
        "serve": {**SERVE, "middleware": "count_requests.count"},
    }
    settings = [
        f"run={tmp_path / 'run'}",
        f"source.webdataset={tmp_path / 'demo' / 'shards'}",
        "select.shard_size=10",
        "experts=[efficientnet-lite2]",
        f"caption.engine={json.dumps({'vllm': engine})}",
    ]
    command = ["-m", "fusion_pipeline", "run", str(QUICKSTART), *settings]
    finish(start([*command, "--until", "prompts/engine-v1"]))

    driver = start(command)
    requests.wait_for(answers=15)
    (server,) = (child for keeper in keepers(model) for child in keeper.children())
    server.kill()
    requests.wait_for(answers=40)  # another one answers
    # Ray's agents notice late that their node is gone, and do no work.
    family = [p for p, line in family_of(driver) if "agent" not in line.lower()]
    for keeper in keepers(model):
        family += [keeper, *keeper.children(recursive=True)]
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, "outlived their driver"
    before = requests.answered()
    finish(start(command), timeout=400)

    pipeline = build_pipeline(load_config(QUICKSTART, settings))
    table = pipeline.export.captions
    samples = sum(found.num_rows for _, found in pipeline.selected.iterate("samples"))
    outcomes = [row for _, found in pipeline.selected.iterate(table) for row in found.to_pylist()]
    assert len(outcomes) == samples > before, "all was done before the driver was killed"
    ends = Counter((row["status"], row["reason"]) for row in outcomes)
    # Random weights say nothing at all now and then.
    assert ends.keys() <= {("ok", None), ("failed", "empty_answer")}
    assert ends["ok", None] > 0.95 * samples
    begun = requests.begun()
    assert len(begun) == samples
    repeated = begun.total() - samples
    assert 0 < repeated <= 2 * IN_FLIGHT, "more than what was in flight at the kills"
    journal = Journal(pipeline.selected, table)
    journal.start()
    assert journal.spent.completion_tokens >= samples
