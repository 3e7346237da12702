"""Captions by vLLM: our share of what vLLM's own benchmark gets out of the same server.

    python -m benchmarks.speed_of_light [--samples 500] [--runs 3] [--model FOLDER] [--serve JSON]

One server, kept up by the engine's own code; requests of one image size and one answer length.
Ours: the captions step on Ray, from its first shard begun to its last table committed. Theirs:
`vllm bench serve` with the same images and prompts and as many requests in flight. Runs alternate;
nothing is kept by the server from one to the next. Theirs has each answer streamed, token by token,
which ours does not ask for: on a few cores that alone is a difference. Without --model a tiny
LLaVA-NeXT with random weights is served on the CPU, from `.venv-serve` (`make .venv-serve/.done`).
"""

import argparse
import base64
import json
import statistics
import subprocess
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks.result import finish
from fusion_pipeline.config import load_config
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.engine.run import read_run_log
from fusion_pipeline.fuse.journal import spent_on
from fusion_pipeline.fuse.servers import LocalServers, first_healthy
from fusion_pipeline.fuse.vllm import VllmConfig, server_command
from fusion_pipeline.pipeline import Pipeline, build_pipeline
from fusion_pipeline.runner import Options, Runner
from tests.serving import SERVE, VLLM, make_tiny_model

TARGET = 0.90
EDGE = 336
TOKENS = 32
IN_FLIGHT = 64
CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def make_photos(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):  # no two alike: none is dropped as a copy
        patches = np.random.default_rng(number).integers(0, 256, (5, 5, 3), np.uint8)
        image = Image.fromarray(patches).resize((EDGE, EDGE), Image.Resampling.NEAREST)
        image.save(folder / f"{number:04d}.jpg", quality=90)
    return folder


def pipeline_of(folder: Path, photos: Path, url: str, model: str) -> Pipeline:
    endpoint = {
        "url": url,
        "model": model,
        "key_env": None,
        "concurrency": IN_FLIGHT,
        "max_tokens": TOKENS,
        "extra_body": {"ignore_eos": True},
        "timeout_s": 900,
    }
    settings = [
        f"run={folder / 'run'}",
        "source.webdataset=null",
        f"source.folder={photos}",
        "select.clusters=2",
        "select.per_cluster=100000",
        "select.shard_size=50",
        "select.copies.propose=1",  # the pictures are much alike, and all are wanted
        "select.duplicates.rule=off",
        "experts=[efficientnet-lite2]",
        f"caption.engine={json.dumps({'endpoint': endpoint, 'name': 'vllm'})}",
    ]
    return build_pipeline(load_config(CONFIG, settings))


def run_ours(pipeline: Pipeline) -> float:
    """Seconds."""
    table = pipeline.export.captions
    storage = pipeline.selected.storage
    with hold_lease(storage, "benchmark") as token:
        if table in pipeline.selected.table_names():
            pipeline.selected.drop_table(table, token)
    known, answered = len(read_run_log(storage)), tokens_of(pipeline)
    Runner(pipeline, Options(only=table), Console(quiet=True)).run()
    lines: list[dict[str, Any]] = [
        line for line in read_run_log(storage)[known:] if line["step"] == table
    ]
    captioned = sum(line["worked"] - line["failed"] for line in lines)
    assert tokens_of(pipeline) - answered == TOKENS * captioned
    ends = [datetime.fromisoformat(line["at"]).timestamp() for line in lines]
    begins = [end - line["seconds"] for end, line in zip(ends, lines, strict=True)]
    assert sum(line["worked"] for line in lines) == samples_in(pipeline)
    # Random weights say nothing at all now and then, in as many tokens as else.
    assert {line["first_error"] for line in lines} <= {None, "empty_answer"}
    return float(max(ends) - min(begins))


def tokens_of(pipeline: Pipeline) -> int:
    """Of all answers so far."""
    return spent_on(pipeline.selected, pipeline.export.captions).completion_tokens


def samples_in(pipeline: Pipeline) -> int:
    return sum(table.num_rows for _, table in pipeline.selected.iterate("samples"))


def write_requests(pipeline: Pipeline, place: Path) -> None:
    """What `vllm bench serve` asks: image and prompt of each sample, in our order."""
    (prompts,) = [name for name in pipeline.selected.table_names() if name.startswith("prompts/")]
    with place.open("w") as out:
        for shard, table in pipeline.selected.iterate(prompts):
            images = pipeline.selected.read_images(shard)
            for row in table.to_pylist():
                data = base64.b64encode(images[row["key"]]).decode()
                image = {"url": f"data:image/jpeg;base64,{data}"}
                parts = [
                    {"type": "image_url", "image_url": image},
                    {"type": "text", "text": row["prompt"]},
                ]
                out.write(json.dumps({"content": parts}) + "\n")


def run_theirs(vllm: str, model: str, served: str, url: str, requests: Path, count: int) -> float:
    """Seconds."""
    found = requests.with_name("theirs.json")
    command = [vllm, "bench", "serve", "--backend", "openai-chat"]
    command += ["--base-url", url.removesuffix("/v1"), "--endpoint", "/v1/chat/completions"]
    command += ["--model", served, "--tokenizer", model, "--dataset-name", "custom_image"]
    command += ["--dataset-path", str(requests), "--disable-shuffle", "--no-oversample"]
    command += ["--num-prompts", str(count), "--max-concurrency", str(IN_FLIGHT)]
    command += ["--custom-output-len", str(TOKENS), "--ignore-eos", "--temperature", "0"]
    command += ["--save-result", "--result-filename", str(found), "--disable-tqdm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(found.read_text())
    assert result["completed"] == count, result["completed"]
    assert result["total_output_tokens"] == count * TOKENS
    return float(result["duration"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model")
    parser.add_argument("--command", default=str(VLLM))
    parser.add_argument("--serve", type=json.loads, default={})
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or str(make_tiny_model(folder / "tiny-llava-next"))
        # Else the second run would find the first one's prompts.
        serve = {"enable_prefix_caching": False, **({} if options.model else SERVE)}
        config = VllmConfig(
            model=model,
            device="gpu" if options.model else "cpu",
            command=options.command,
            serve={**serve, **options.serve},
        )
        servers = LocalServers(server_command(config), 1, 1 if options.model else 0)
        try:
            (url,) = first_healthy(servers, config.startup_minutes * 60)
            photos = make_photos(folder / "photos", options.samples)
            pipeline = pipeline_of(folder, photos, url, config.served_name)
            before = pipeline.step_names[pipeline.step_names.index(pipeline.export.captions) - 1]
            Runner(pipeline, Options(until=before, in_process=True), Console(quiet=True)).run()
            count, requests = samples_in(pipeline), folder / "requests.jsonl"
            write_requests(pipeline, requests)
            asked = (options.command, model, config.served_name, url, requests, count)
            run_ours(pipeline), run_theirs(*asked)  # the server's first requests are slow
            for run in range(options.runs):
                theirs, ours = run_theirs(*asked), run_ours(pipeline)
                rows.append(
                    {
                        "run": run,
                        "samples": count,
                        "theirs captions/s": count / theirs,
                        "ours captions/s": count / ours,
                        "ratio": theirs / ours,
                    }
                )
        finally:
            servers.stop()
    ratio = statistics.median(float(row["ratio"]) for row in rows)
    details = {"model": Path(model).name, "in flight": IN_FLIGHT, "answer tokens": TOKENS}
    finish("speed-of-light", ratio, "ours / vLLM's own", TARGET, ratio >= TARGET, rows, details)


if __name__ == "__main__":
    main()
