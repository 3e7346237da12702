"""Captions that are asked for again, by an SQL expression; and what the pending ones would cost."""

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from openai_server import CAPTION, MODEL, OpenAIServer, Reply, completion, serve
from rich.console import Console
from test_pipeline_endpoint import KEY, photos

from fusion_pipeline.captioning import ask_again, estimate
from fusion_pipeline.cli import main
from fusion_pipeline.config import load_config
from fusion_pipeline.dataset.tables import encode_table
from fusion_pipeline.engine.again import Again, WhereError
from fusion_pipeline.engine.chain import Replace
from fusion_pipeline.engine.shard import Redo
from fusion_pipeline.fuse.endpoint import TURN_TOKENS
from fusion_pipeline.pipeline import Pipeline, build_pipeline
from tests.jobs import QUICKSTART, run
from tests.killing import killed_at

CUT = Reply(body=completion("A red barn stands left of a", "length"))
PRICES = {"input": 5.0, "output": 20.0}
WHERE = "finish = 'length' or status = 'failed'"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("CAPTION_KEY", KEY)
    with serve(KEY) as running:
        yield running


def pipeline_of(server: OpenAIServer, folder: Path, *overrides: str) -> Pipeline:
    """Five pictures in shards of two, asked for one at a time: in order."""
    endpoint = {"url": server.url, "model": MODEL, "key_env": "CAPTION_KEY", "concurrency": 1}
    endpoint |= {"max_retries": 0, "prices": PRICES}
    engines = {"strong": {"endpoint": endpoint}, "baseline": {"composer": {}}}
    settings = [
        f"run={folder / 'run'}",
        "source.webdataset=null",
        f"source.folder={photos(folder / 'photos')}",
        "select.shard_size=2",
        "experts=[efficientnet-lite2]",
        f"caption.engines={json.dumps(engines)}",
        "caption.engine=strong",
        "runner.max_failure_rate=1",
        *overrides,
    ]
    return build_pipeline(load_config(QUICKSTART, settings))


def rows_of(pipeline: Pipeline) -> list[dict[str, object]]:
    parts = pipeline.selected.iterate(pipeline.export.captions)
    return [row for _, part in parts for row in part.to_pylist()]


def file_of(pipeline: Pipeline, shard: int) -> Path:
    version = pipeline.selected.version(pipeline.export.captions)
    return Path(pipeline.selected.storage.full(version.path(shard)))


def asked(server: OpenAIServer) -> Counter[str]:
    """Requests since the last call, by picture."""
    found = Counter(re.findall(r"picture \d", request.prompt)[0] for request in server.requests)
    server.requests.clear()
    return found


def test_what_is_chosen_is_asked_again_and_all_else_stays(
    server: OpenAIServer, tmp_path: Path
) -> None:
    """What the model had answered before is not given again."""
    pipeline = pipeline_of(server, tmp_path)
    server.script(CUT, Reply(500, b"{}"), Reply(), Reply(), CUT)
    run(pipeline, until=pipeline.export.captions)
    first = rows_of(pipeline)
    assert [row["finish"] or row["reason"] for row in first] == [
        "length", "http_500", "stop", "stop", "length",
    ]  # fmt: skip
    order = list(asked(server))
    untouched = file_of(pipeline, 1)
    before = untouched.stat().st_mtime_ns, untouched.read_bytes()

    server.always = Reply(body=completion("Another one."))
    said = run(pipeline, where=WHERE)
    assert "rows of 2 shards are asked for again" in said
    assert asked(server) == Counter([order[0], order[1], order[4]])
    second = rows_of(pipeline)
    assert [row["caption"] for row in second] == [
        "Another one.", "Another one.", CAPTION, CAPTION, "Another one.",
    ]  # fmt: skip
    assert second[2:4] == first[2:4]
    assert (untouched.stat().st_mtime_ns, untouched.read_bytes()) == before

    run(pipeline, where=f"key = '{first[0]['key']}'")  # one row of a shard
    assert asked(server) == Counter([order[0]])
    assert "0 shards" in run(pipeline, where=WHERE)
    assert not asked(server)
    assert Again.of(pipeline.selected, pipeline.export.captions) is None
    run(pipeline, until=pipeline.export.captions)
    assert not asked(server), "a plain run asks nothing again"


def test_killed_at_any_write_no_row_is_asked_again_twice(
    server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model answers as before, so the tables can't tell what is done. Only what was in flight,
    one request, may be asked for once more."""
    pipeline = pipeline_of(server, tmp_path)
    server.always = CUT
    run(pipeline, until=pipeline.export.captions)
    run(pipeline, where=WHERE)  # the same request has been made, and finished, before
    asked(server)
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    for crash_at in range(200):
        is_over = not killed_at(crash_at, monkeypatch, lambda: run(pipeline, where=WHERE))
        open_request = Again.of(pipeline.selected, pipeline.export.captions)
        if open_request is not None:
            run(pipeline, where=WHERE)
        times = asked(server)
        assert len(times) == 5 or open_request is None
        assert times.total() <= 6, f"{times} after a crash at write {crash_at}"
        assert [row["finish"] for row in rows_of(pipeline)] == ["length"] * 5
        assert Again.of(pipeline.selected, pipeline.export.captions) is None
        if is_over:
            break
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "kept", tmp_path / "run")
    assert crash_at > 3 * 4  # intent, end, table, mark of each shard


@pytest.mark.parametrize("what", ["retry_failed", "refresh"])
def test_a_retry_and_a_refresh_killed_at_any_write_pay_no_row_twice(
    what: str, server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables that they replace are there, those of the refresh without a failed row."""
    monkeypatch.setattr("fusion_pipeline.fuse.journal._SEGMENT_S", 0.0)
    pipeline = pipeline_of(server, tmp_path)
    server.always = Reply(500, b"{}") if what == "retry_failed" else CUT
    run(pipeline, until=pipeline.export.captions)
    if what == "refresh":
        renew_prompts(pipeline)
    server.always = Reply()
    asked(server)
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    for crash_at in range(200):
        work = partial(run, pipeline, only=pipeline.export.captions, **{what: True})
        is_over = not killed_at(crash_at, monkeypatch, work)
        work()
        times = asked(server)
        assert len(times) == 5
        assert times.total() <= 6, f"{times} after a crash at write {crash_at}"
        assert [row["finish"] for row in rows_of(pipeline)] == ["stop"] * 5
        if is_over:
            break
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "kept", tmp_path / "run")
    assert crash_at > 3 * 3  # intent, end, table of each shard


def renew_prompts(pipeline: Pipeline) -> None:
    """Other prompts in place, as after rows that were retried: the captions are stale."""
    dataset = pipeline.selected
    version = dataset.version(pipeline.export.prompts)
    for shard in dataset.shards():
        table, footer = dataset.read_table(version, shard)
        prompts = pa.array([f"{prompt} Please." for prompt in table["prompt"].to_pylist()])
        table = table.set_column(table.column_names.index("prompt"), "prompt", prompts)
        data, _ = encode_table(table, version.name, shard, version.made_by, footer.inputs)
        dataset.storage.put(version.path(shard), data)


def test_another_request_takes_the_place_of_an_open_one(
    server: OpenAIServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of(server, tmp_path)
    server.always = CUT
    run(pipeline, until=pipeline.export.captions)
    marks = tmp_path / "run" / "selected" / "runs" / "again"
    for crash_at in range(100):
        assert killed_at(crash_at, monkeypatch, lambda: run(pipeline, where=WHERE))
        if len(list(marks.rglob("0000*"))) == 1:
            break
    asked(server)
    run(pipeline, where="status = 'ok'")
    assert len(asked(server)) == 5, "nothing of the other request counts"
    assert not list(marks.rglob("*.json"))


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("finsh = 'length'", "no such column: finsh"),
        ("caption like", 'near ")": syntax error'),
        ("no_such_function(caption)", "no such function: no_such_function"),
        ("1); drop table rows; --", "one statement at a time"),
        ("count(*) > 3", "misuse of aggregate"),
    ],
)
def test_a_wrong_expression_is_refused_before_anything_runs(
    where: str, why: str, server: OpenAIServer, tmp_path: Path
) -> None:
    pipeline = pipeline_of(server, tmp_path)
    columns = "columns: key, status, reason, caption, finish, violations, repairs"
    with pytest.raises(WhereError) as raised:
        run(pipeline, where=where)
    message = str(raised.value)
    assert message.startswith(f"--where {where!r}: ")
    assert why in message
    assert message.endswith(columns)
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


def test_an_estimate_asks_nothing(server: OpenAIServer, tmp_path: Path) -> None:
    pipeline = pipeline_of(server, tmp_path)
    run(pipeline, until=pipeline.export.prompts)
    found = estimate(pipeline, Redo.MISSING, Replace.NOTHING, None)
    prompts = [row["prompt"] for _, part in pipeline.selected.iterate(pipeline.export.prompts)
               for row in part.to_pylist()]  # fmt: skip
    lengths = [len(prompt.encode()) for prompt in prompts]
    assert (found.rows, found.prompts, found.max_bytes) == (5, 5, max(lengths))
    bound = sum(lengths) + 5 * (TURN_TOKENS + 3000)
    assert found.most == pytest.approx((PRICES["input"] * bound + PRICES["output"] * 5 * 512) / 1e6)
    assert found.usual is None
    assert not server.requests

    run(pipeline, until=pipeline.export.captions, limit=2)
    assert asked(server).total() == 2
    left = estimate(pipeline, Redo.MISSING, Replace.NOTHING, None)
    one = (1234 * PRICES["input"] + 56 * PRICES["output"]) / 1e6  # what the server counts
    assert left.rows == 3
    assert left.usual == pytest.approx(3 * one)
    assert left.most is not None
    assert 3 * one < left.most
    assert estimate(pipeline, Redo.MISSING, Replace.NOTHING, 3).rows == 2
    again = ask_again(pipeline, "finish = 'stop'", None)
    assert estimate(pipeline, again, Replace.NOTHING, None).rows == 2
    assert not asked(server)

    server.script(Reply(500, b"{}"))
    run(pipeline, until=pipeline.export.captions)
    assert estimate(pipeline, Redo.MISSING, Replace.NOTHING, None).rows == 0
    assert estimate(pipeline, Redo.FAILED, Replace.NOTHING, None).rows == 1
    changed = pipeline_of(server, tmp_path, "caption.max_words=50")
    assert estimate(changed, Redo.STALE, Replace.CHANGED, None).rows == 5


@pytest.fixture
def fusion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fusion", *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return call


def test_the_command(server: OpenAIServer, tmp_path: Path, fusion) -> None:  # type: ignore[no-untyped-def]
    pipeline = pipeline_of(server, tmp_path, "caption.engine=composer")
    config = tmp_path / "job.yaml"
    config.write_text(pipeline.config.to_yaml())
    caption = ("caption", str(config), "--no-ray")

    code, _, err = fusion(*caption)
    assert (code, "captions/composer" in err) == (0, True)
    assert not (tmp_path / "run" / "export").exists()
    assert "Nothing to do" in fusion(*caption)[2]

    code, out, _ = fusion(*caption, "--engine", "strong", "--estimate")
    assert (code, out.splitlines()[0]) == (0, "captions/strong: 5 captions are pending")
    assert "at most: $" in out
    assert "usual: not known" in out
    assert not server.requests
    assert fusion(*caption, "--engine", "strong")[0] == 0
    assert len(server.requests) == 5
    assert {"captions/composer", "captions/strong"} <= set(pipeline.selected.table_names())

    assert fusion(*caption, "--engine", "strong", "--where", "repairs = 0", "--limit", "2")[0] == 0
    assert len(server.requests) == 7
    code, out, err = fusion(*caption, "--engine", "strong", "--where", "repairs =")
    assert (code, out) == (1, "")
    assert "error: --where 'repairs =': near \")\": syntax error; columns: key, status" in err
    code, _, err = fusion(*caption, "--engine", "weak")
    assert (code, "no engine is called 'weak'; known: strong, baseline" in err) == (1, True)
    code, _, err = fusion(*caption, "--where", "1", "--refresh")
    assert (code, "--where goes without --overwrite" in err) == (1, True)
    assert len(server.requests) == 7
    code, out, _ = fusion(*caption, "--engine", "baseline", "--estimate")
    assert (code, "no prices are set" in out) == (0, True)


def test_on_ray(tmp_path: Path, server: OpenAIServer) -> None:
    from fusion_pipeline.runner import Options, Runner

    pipeline = pipeline_of(server, tmp_path)
    run(pipeline, until=pipeline.export.captions)
    assert asked(server).total() == 5
    options = Options(where="violations = '[]'")
    Runner(pipeline, options, Console(quiet=True)).run()
    assert asked(server).total() == 5
    assert Again.of(pipeline.selected, pipeline.export.captions) is None
