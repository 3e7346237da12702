"""The main job with captions asked in batches, by the commands a person types."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from batch_server import BatchServer, serve_batches
from openai_server import MODEL
from test_pipeline_endpoint import QUICKSTART, photos

from fusion_pipeline.cli import main
from fusion_pipeline.config import load_config
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import read_lease
from fusion_pipeline.engine.chain import Chain
from fusion_pipeline.engine.shard import Step
from fusion_pipeline.pipeline import build_pipeline

KEY = "sk-test-51c7d9e0a2b84f63"
Fusion = Callable[..., tuple[int, str]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    monkeypatch.setenv("BATCH_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", f"{KEY}-of-another")
    with serve_batches(BatchServer(KEY)) as running:
        yield running


def settings(server: BatchServer, tmp_path: Path, **more: object) -> list[str]:
    folder = tmp_path / "photos"
    if not folder.exists():  # written again, they would be another source
        photos(folder)
    batch = {"url": server.url, "model": MODEL, "key_env": "BATCH_KEY"}
    prices = {"input": 1.25, "output": 5}
    return [
        f"run={tmp_path / 'run'}",
        "source.webdataset=null",
        f"source.folder={folder}",
        "experts=[nanodet]",
        "select.shard_size=2",
        f"caption.engine={json.dumps({'batch': {**batch, 'prices': prices, **more}})}",
    ]


@pytest.fixture
def fusion(
    server: BatchServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Fusion:
    """`fusion …` with the config; its exit status and all that it says. The key is never said."""

    def call(command: str, *options: str, **more: object) -> tuple[int, str]:
        arguments = [*command.split(), str(QUICKSTART), *settings(server, tmp_path, **more)]
        monkeypatch.setattr(sys, "argv", ["fusion", *arguments, *options])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = "".join(capfd.readouterr())
        assert KEY not in said
        return code, " ".join(said.split())

    return call


def test_from_pictures_to_an_export(server: BatchServer, fusion: Fusion, tmp_path: Path) -> None:
    code, said = fusion("run", "--no-ray")
    assert code == 0
    assert "3 shards wait for batches. `fusion meta submit`" in said
    code, said = fusion("meta status")
    assert (code, "requests to be sent 5" in said) == (0, True)

    code, said = fusion("meta submit", key_env="OTHER_KEY", max_requests=3)
    assert (code, "refused access (HTTP 401): check the key" in said) == (1, True)
    code, said = fusion("meta submit", max_requests=3)
    assert (code, "requests in" in said) == (0, True)
    assert sorted(len(batch.lines) for batch in server.batches) == [2, 3]
    code, said = fusion("meta submit")
    assert (code, said) == (0, "0 requests in 0 files sent")

    code, said = fusion("meta collect")  # nothing is answered yet
    assert (code, "validating 2" in said) == (0, True)
    server.work()
    found = json.loads(fusion("meta status", "--json")[1])
    assert found["files"] == {"completed, not collected": 2}
    code, said = fusion("meta collect")
    assert code == 0
    assert "outcomes stop 5" in said
    assert f"dollars so far {server.bill:.2f}" in said
    assert "shards that wait 0" in said

    code, said = fusion("run", "--no-ray")
    assert (code, "wait" in said) == (0, False)
    exported = json.loads((tmp_path / "run" / "export" / "llava.json").read_text())
    captions = [row["conversations"][1]["value"] for row in exported]
    assert len(captions) == 5
    assert all(caption.startswith("A hand-painted sign") for caption in captions)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    assert max(server.worked.values()) == 1


def test_what_is_answered_is_exported_the_rest_waits(
    server: BatchServer, fusion: Fusion, tmp_path: Path
) -> None:
    fusion("run", "--no-ray")
    budget = {"budget_dollars": 0.03, "image_tokens": 3000}
    code, said = fusion("meta submit", **budget)
    assert (code, "are left out: the budget" in said) == (0, True)
    server.work()
    assert fusion("meta collect", **budget)[0] == 0
    code, said = fusion("run", "--no-ray", **budget)
    assert (code, "shards wait for batches" in said) == (0, True), said
    exported = json.loads((tmp_path / "run" / "export" / "llava.json").read_text())
    assert 0 < len(exported) < 5


def test_files_are_written_run_elsewhere_and_taken_in(
    server: BatchServer, fusion: Fusion, tmp_path: Path
) -> None:
    """No key, no network."""
    terms = {"key_env": "NO_SUCH_KEY", "url": "http://127.0.0.1:9/v1"}
    fusion("run", "--no-ray", **terms)
    code, said = fusion("meta submit", "--files-only", **terms)
    assert (code, "5 requests in 1 files written" in said) == (0, True)
    (file,) = (tmp_path / "run" / "selected").rglob("requests.jsonl")
    assert str(file) in said
    out = tmp_path / "out.jsonl"
    lines = map(json.loads, file.read_text().splitlines())
    choices = [{"message": {"content": "A red barn."}, "finish_reason": "stop"}]
    with out.open("w") as results:
        for line in lines:
            response = {"status_code": 200, "request_id": "vllm", "body": {"choices": choices}}
            answer = {"id": "vllm", "custom_id": line["custom_id"], "response": response}
            results.write(json.dumps({**answer, "error": None}) + "\n")
    code, said = fusion("meta collect", "--results", str(out), **terms)
    assert (code, "results: answered 5" in said) == (0, True)
    dataset = Dataset.open(tmp_path / "run" / "selected")
    rows = [row for _, table in dataset.iterate(f"captions/{MODEL}") for row in table.to_pylist()]
    assert [row["caption"] for row in rows] == ["A red barn."] * 5
    assert server.uploads == 0


def test_what_can_be_had_is_committed_and_what_is_to_be_changed_is_said(
    server: BatchServer, fusion: Fusion, tmp_path: Path
) -> None:
    """One file can't be read; the requests of the other batch are refused by the model."""
    fusion("run", "--no-ray")
    server.faults = {"unsupported": 1.0}
    fusion("meta submit", max_requests=3)
    server.work()
    server.refusals = {server.batches[0].error or "": 500}
    code, said = fusion("meta collect", max_requests=3)
    assert (code, "answered HTTP 500" in said) == (1, True)
    assert "2 requests have failed, unsupported_parameter: set `token_parameter: " in said
    dataset = Dataset.open(tmp_path / "run" / "selected")
    assert sum(table.num_rows for _, table in dataset.iterate(f"captions/{MODEL}")) > 0
    server.code = "too_many_tasks"
    server.refusals = {}
    fusion("meta collect", max_requests=3)
    code, said = fusion("meta submit", "--retry-failed", max_requests=3)
    assert (code, "2 batches were refused as a whole: too_many_tasks (submit" in said) == (0, True)


def test_versions_are_looked_up_under_the_lease(
    server: BatchServer, fusion: Fusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fusion("run", "--no-ray")
    storage, resolve = Dataset.open(tmp_path / "run" / "selected").storage, Chain.resolve
    held = []

    def watched(dataset: Dataset, steps: Sequence[Step]) -> Chain:
        held.append(read_lease(storage) is not None)
        return resolve(dataset, steps)

    monkeypatch.setattr(Chain, "resolve", watched)
    assert fusion("meta cancel")[0] == 0
    assert held == [True]


def test_cancel(server: BatchServer, fusion: Fusion) -> None:
    fusion("run", "--no-ray")
    fusion("meta submit")
    assert "1 cancelled" in fusion("meta cancel")[1]
    server.work()
    assert "cancelled" in fusion("meta collect")[1] or server.batches[0].status == "cancelled"
    assert "3 requests in 1 files sent" in fusion("meta submit")[1]


def test_what_failed_is_asked_for_once_more(
    server: BatchServer, fusion: Fusion, tmp_path: Path
) -> None:
    fusion("run", "--no-ray")
    server.faults = {"http_400": 0.6}
    fusion("meta submit")
    server.work()
    fusion("meta collect")
    (failed,) = re.findall(r"http_400 (\d)", fusion("meta status")[1])
    server.faults = {}
    assert "0 requests in 0 files sent" in fusion("meta submit")[1]
    assert f"{failed} requests in 1 files sent" in fusion("meta submit", "--retry-failed")[1]
    server.work()
    assert "outcomes stop 5" in fusion("meta collect")[1]
    fusion("run", "--no-ray")
    exported = json.loads((tmp_path / "run" / "export" / "llava.json").read_text())
    assert len(exported) == 5
    assert sum(server.worked.values()) == 5 + int(failed)


def test_nothing_is_paid_for_a_table_that_can_not_be_made(
    server: BatchServer, fusion: Fusion
) -> None:
    fusion("run", "--no-ray")
    code, said = fusion("meta submit", max_tokens=100)
    assert (code, "max_tokens" in said) == (1, True)
    assert server.uploads == 0


def test_captions_are_those_of_an_endpoint(server: BatchServer, tmp_path: Path) -> None:
    """Their table is made of the same: what one began the other may end."""
    batch = build_pipeline(load_config(QUICKSTART, settings(server, tmp_path)))
    engine = {"endpoint": {"url": server.url, "model": MODEL}}
    other = [*settings(server, tmp_path)[:-1], f"caption.engine={json.dumps(engine)}"]
    endpoint = build_pipeline(load_config(QUICKSTART, other))
    steps = [pipeline.phases[-1].steps[-1] for pipeline in (batch, endpoint)]  # type: ignore[union-attr]
    assert steps[0].table == steps[1].table
    assert steps[0].made_by.hash == steps[1].made_by.hash


@pytest.mark.parametrize("command", ["submit", "status", "collect", "cancel"])
def test_each_command_has_help_with_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fusion", "meta", command, "--help"])
    with pytest.raises(SystemExit):
        main()
    assert f"Example: fusion meta {command} configs/" in capsys.readouterr().out


def test_another_engine_has_no_batches(fusion: Fusion, tmp_path: Path) -> None:
    code, said = fusion("meta submit", "caption.engine=composer")
    assert (code, "caption.engine is not asked in batches" in said) == (1, True)
