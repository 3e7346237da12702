"""The main job with a caption engine behind a socket instead of the composer."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai_server import CAPTION, MODEL, OpenAIServer, Reply, serve
from PIL import Image
from rich.console import Console

from fusion_pipeline.config import load_config
from fusion_pipeline.dataset.accounting import count_table
from fusion_pipeline.pipeline import build_pipeline
from fusion_pipeline.runner import Options, Runner

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
KEY = "sk-test-8d1f4c2b9a7e6350"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("CAPTION_KEY", KEY)
    with serve(KEY) as running:
        yield running


def photos(folder: Path) -> Path:
    folder.mkdir()
    for i in range(5):
        image = Image.effect_noise((300, 280), 40 + 20 * i).convert("RGB")
        image.paste((40 * i, 90, 200 - 30 * i), (0, 0, 150, 280))
        image.save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def test_captions_of_a_model_behind_a_socket(server: OpenAIServer, tmp_path: Path) -> None:
    endpoint = {"url": server.url, "model": MODEL, "key_env": "CAPTION_KEY"}
    endpoint |= {"max_retries": 0}
    overrides = [
        f"run={tmp_path / 'run'}",
        "source.webdataset=null",
        f"source.folder={photos(tmp_path / 'photos')}",
        "experts=[nanodet]",
        f"caption.engine={json.dumps({'endpoint': endpoint})}",
    ]
    pipeline = build_pipeline(load_config(QUICKSTART, overrides))
    server.script(Reply(500, b"{}"))  # one sample fails, the others don't
    log = io.StringIO()
    Runner(pipeline, Options(in_process=True), Console(file=log)).run()

    table = pipeline.export.captions
    assert table == f"captions/{MODEL.split('/')[-1].lower()}"
    captions = count_table(pipeline.selected, table)
    assert (captions.rows, captions.ok, captions.total("failed")) == (5, 4, 1)
    assert captions.by_status["failed:http_500"] == 1
    Runner(pipeline, Options(in_process=True, retry_failed=True), Console(file=log)).run()
    assert count_table(pipeline.selected, table).ok == 5

    exported = json.loads((tmp_path / "run" / "export" / "llava.json").read_text())
    assert [row["conversations"][1]["value"] for row in exported] == [CAPTION] * 5
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert KEY not in log.getvalue()
