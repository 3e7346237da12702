"""Captions by an endpoint, on Ray: several shards at a time, and kills cost what was in flight."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusion_pipeline.config import load_config
from fusion_pipeline.fuse.journal import Journal
from fusion_pipeline.pipeline import build_pipeline
from tests.fuse.api_server import COMPLETION_TOKENS, MODEL, PROMPT_TOKENS, ApiServer, serve_api
from tests.jobs import QUICKSTART
from tests.killing import finish, start

SAMPLES, SHARD, IN_FLIGHT = 72, 9, 12
PRICES = {"input": 2.0, "output": 8.0}


def settings(server: ApiServer, folder: Path) -> list[str]:
    endpoint = {"url": server.url, "model": MODEL, "key_env": None, "concurrency": IN_FLIGHT}
    endpoint |= {"prices": PRICES, "budget_dollars": 5}
    return [
        f"run={folder / 'run'}",
        "source.webdataset=null",
        f"source.folder={folder / 'photos'}",
        f"select.shard_size={SHARD}",
        "select.clusters=2",
        "select.per_cluster=100",
        "select.duplicates.rule=off",
        "experts=[efficientnet-lite2]",
        f"caption.engine={json.dumps({'endpoint': endpoint})}",
    ]


@pytest.fixture
def server(tmp_path: Path) -> ApiServer:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(SAMPLES):  # no two alike: none is dropped as a copy
        patches = np.random.default_rng(number).integers(0, 256, (5, 5, 3), np.uint8)
        image = Image.fromarray(patches).resize((270, 260), Image.Resampling.NEAREST)
        image.save(photos / f"{number:02d}.png")
        (photos / f"{number:02d}.txt").write_text(f"sample {number}")  # is in the prompt
    return ApiServer(latency_s=0.8)


def test_kills_cost_what_was_in_flight(server: ApiServer, tmp_path: Path) -> None:
    moments = random.Random(4)
    with serve_api(server):
        command = ["-m", "fusion_pipeline", "run", str(QUICKSTART), *settings(server, tmp_path)]
        seen_at_kills = []
        for _ in range(2):
            driver, before = start(command), server.seen.total()
            while server.seen.total() < before + IN_FLIGHT:
                assert driver.poll() is None, driver.communicate()[0].decode()
                time.sleep(0.02)
            time.sleep(moments.uniform(0.0, 1.0))
            driver.kill()
            driver.wait()
            seen_at_kills.append(server.seen.total())
        finish(start(command), timeout=250)
    assert seen_at_kills[-1] < SAMPLES - 10, "it was done before the second kill"
    pipeline = build_pipeline(load_config(QUICKSTART, settings(server, tmp_path)))
    outcomes = [
        row
        for _, table in pipeline.selected.iterate(pipeline.export.captions)
        for row in table.to_pylist()
    ]
    samples = sum(table.num_rows for _, table in pipeline.selected.iterate("samples"))
    assert samples > SAMPLES - 10
    assert [row["status"] for row in outcomes] == ["ok"] * samples
    assert len({row["caption"] for row in outcomes}) == samples == len(server.seen)
    repeated = sum(count - 1 for count in server.seen.values())
    assert repeated <= 2 * IN_FLIGHT, "more than what was in flight at the two kills"
    assert server.most_in_flight > SHARD, "one shard at a time"

    journal = Journal(pipeline.selected, pipeline.export.captions)
    journal.start()
    price = (PRICES["input"] * PROMPT_TOKENS + PRICES["output"] * COMPLETION_TOKENS) / 1e6
    assert journal.spent.dollars >= server.charged.total() * price - 1e-9
    assert journal.spent.requests <= len(server.seen) + 2 * IN_FLIGHT
