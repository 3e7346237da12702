"""The main job with a caption engine behind a socket instead of the composer."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai_server import CAPTION, MODEL, OpenAIServer, Reply, completion, serve
from PIL import Image
from rich.console import Console

from fusion_pipeline.config import load_config
from fusion_pipeline.dataset.accounting import count_table
from fusion_pipeline.pipeline import Pipeline, build_pipeline
from fusion_pipeline.runner import Options, Runner

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
KEY = "sk-test-8d1f4c2b9a7e6350"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("CAPTION_KEY", KEY)
    with serve(KEY) as running:
        yield running


def photos(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(5):
        image = Image.effect_noise((300, 280), 40 + 20 * i).convert("RGB")
        image.paste((40 * i, 90, 200 - 30 * i), (0, 0, 150, 280))
        image.save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text(f"A barn, picture {i}")
    return folder


def pipeline_of(server: OpenAIServer, tmp_path: Path, *overrides: str) -> Pipeline:
    endpoint = {"url": server.url, "model": MODEL, "key_env": "CAPTION_KEY"}
    endpoint |= {"max_retries": 0, "prices": {"input": 5, "output": 20}}
    settings = [
        f"run={tmp_path / 'run'}",
        "source.webdataset=null",
        f"source.folder={photos(tmp_path / 'photos')}",
        "experts=[nanodet]",
        f"caption.engine={json.dumps({'endpoint': endpoint})}",
        *overrides,
    ]
    return build_pipeline(load_config(QUICKSTART, settings))


def test_captions_of_a_model_behind_a_socket(server: OpenAIServer, tmp_path: Path) -> None:
    pipeline = pipeline_of(server, tmp_path)
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

    said = " ".join(log.getvalue().split())
    assert "captions 5, ended by: stop 5" in said
    assert "rules broken none" in said
    assert "dollars 0.01 this run, 0.04 so far; 7,290 a million" in said

    exported = json.loads((tmp_path / "run" / "export" / "llava.json").read_text())
    assert [row["conversations"][1]["value"] for row in exported] == [CAPTION] * 5
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert KEY not in log.getvalue()


def test_a_caption_that_breaks_rules_is_asked_for_once_more(
    server: OpenAIServer, tmp_path: Path
) -> None:
    pipeline = pipeline_of(server, tmp_path, "caption.repair=true")
    wrong, worse = "The image shows a barn.", "The image probably shows a barn."
    server.script(
        Reply(body=completion(wrong)),
        *[Reply(body=completion(CAPTION))] * 4,
        Reply(body=completion(CAPTION)),
    )
    Runner(pipeline, Options(in_process=True), Console(file=io.StringIO())).run()
    (captions,) = [table for _, table in pipeline.selected.iterate(pipeline.export.captions)]
    assert captions["caption"].to_pylist() == [CAPTION] * 5
    assert captions["violations"].to_pylist() == [[]] * 5
    assert sorted(captions["repairs"].to_pylist()) == [0, 0, 0, 0, 1]
    (again,) = [request for request in server.requests if len(request.messages) > 1]
    assert [message.role for message in again.messages] == ["user", "assistant", "user"]
    assert again.messages[1].content == wrong
    assert '"The image shows"' in str(again.messages[2].content)

    server.always = Reply(body=completion(worse))  # an answer that is no better changes nothing
    server.script(*[Reply(body=completion(wrong))] * 5)
    options = Options(in_process=True, overwrite=True)
    pipeline = pipeline_of(server, tmp_path, "caption.repair=true", "caption.max_words=191")
    Runner(pipeline, options, Console(file=io.StringIO())).run()
    (captions,) = [table for _, table in pipeline.selected.iterate(pipeline.export.captions)]
    assert captions["caption"].to_pylist() == [wrong] * 5
    assert captions["violations"].to_pylist() == [["opening"]] * 5
    assert captions["repairs"].to_pylist() == [1] * 5
