"""Captions by the Batch API, over a real socket: every sample gets one outcome whatever becomes of
the results, nothing is sent twice, and the budget holds."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_job import Job, hours, outcomes_of, prompt_of
from batch_server import (
    INPUT_PRICE,
    OUTPUT_PRICE,
    BatchServer,
    caption_of,
    serve_batches,
)

from fusion_pipeline.fuse.base import Captioned, Finish
from fusion_pipeline.fuse.batch.books import Asked
from fusion_pipeline.fuse.batch.client import BatchError
from fusion_pipeline.fuse.batch.desk import Desk
from fusion_pipeline.fuse.batch.plan import Plan
from fusion_pipeline.fuse.batch.results import MAX_LINE, Results, lines_in

FAULTS = {
    "lost": 0.03,
    "doubled": 0.03,
    "http_500": 0.03,
    "http_429": 0.03,
    "malformed": 0.02,
    "html": 0.02,
    "expired": 0.05,
    "http_400": 0.02,
    "blocked": 0.02,
}


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with serve_batches(BatchServer()) as running:
        yield running


def run_dry(job: Job, server: BatchServer) -> None:
    """Submit and collect until nothing is left to be sent."""
    for _ in range(8):
        job.submit()
        server.work()
        job.collect()
        server.work()  # what was late is there
        job.collect()
        hours(job, 2)  # and what is not, will not come
        job.collect()
        if not job.plan().shards():
            return
    raise AssertionError("there is always something left")


def test_three_thousand_requests_whatever_becomes_of_their_results(
    server: BatchServer, tmp_path: Path
) -> None:
    """Split by both limits; a quarter of the results is lost, doubled, expired, malformed, late."""
    server.faults, server.is_late = FAULTS, True
    server.max_requests, server.max_bytes = 400, 150_000
    job = Job.at(tmp_path, server, max_requests=400, max_file_mb=0.15).prepare(shards=31)
    sent = job.submit()
    asked = 31 * 98  # every 50th row has no prompt
    assert sum(entry.requests for entry in sent.entries) == asked
    assert server.problems == []
    sizes = [len(data) for data in server.uploaded]
    longest = max(len(line) for data in server.uploaded for line in data.split(b"\n")) + 1
    assert all(150_000 - longest < size <= 150_000 for size in sizes[:-1])  # filled up

    run_dry(job, server)
    rows = job.captions()
    assert len(rows) == 3100
    for (shard, row), got in rows.items():
        if row % 50 == 49:
            assert got["reason"] == "upstream:prompts/toy"
        elif got["status"] == "ok":
            assert got["caption"] == caption_of(prompt_of(shard, row))
    counts = outcomes_of(job)
    assert counts["stop"] > 0.9 * asked
    assert counts["blocked"] > 0
    assert counts["http_400"] > 0
    assert sum(counts.values()) == 3100
    assert max(server.sent.values()) == 3
    assert len(server.sent) == asked
    assert counts["batch_expired"] + counts["batch_error"] < 0.02 * asked
    books = job.plan().books.load()
    assert books.dollars == pytest.approx(server.bill)
    assert books.open() == []


def test_files_are_split_by_the_number_of_requests(server: BatchServer, tmp_path: Path) -> None:
    job = Job.at(tmp_path, server, max_requests=40).prepare(shards=1)
    job.submit()
    assert [len(batch.lines) for batch in server.batches] == [40, 40, 18]
    assert server.problems == []


def test_without_the_providers_count_what_is_lost_is_charged_in_full(
    server: BatchServer, tmp_path: Path
) -> None:
    server.faults, server.shows_usage = {"lost": 0.3, "html": 0.1}, False
    job = Job.at(tmp_path, server).prepare(shards=2)
    run_dry(job, server)
    spent = job.plan().books.load().dollars
    assert server.bill < spent
    assert outcomes_of(job)["stop"] > 150


def test_an_answer_that_comes_twice_is_paid_twice(server: BatchServer, tmp_path: Path) -> None:
    server.faults, server.shows_usage = {"doubled": 0.5}, False
    job = Job.at(tmp_path, server).prepare(shards=1, rows=20)
    run_dry(job, server)
    (entry,) = job.plan().books.load().entries.values()
    assert entry.counts["doubled"] > 3
    assert entry.dollars == pytest.approx(server.bill)


def test_the_first_answer_counts(tmp_path: Path) -> None:
    """An answer, that is: not word that there is none."""
    asked = Asked("a", 0, 1000)
    results = Results({"a": asked}, Job(tmp_path, {"model": "m"}).config)
    expired = {"custom_id": "a", "response": None, "error": {"code": "batch_expired"}}
    results.add(json.dumps(expired).encode())
    for caption in ("first", "second"):
        body = {"choices": [{"message": {"content": caption}, "finish_reason": "stop"}]}
        line = {"custom_id": "a", "response": {"status_code": 200, "body": body}}
        results.add(json.dumps(line).encode())
    results.add(json.dumps(expired).encode())
    assert results.outcomes == {"a": Captioned("first", Finish.STOP)}
    assert results.tally() == {"answered": 1, "doubled": 2}


def test_a_line_that_is_larger_than_a_file_is_a_failed_row(
    server: BatchServer, tmp_path: Path
) -> None:
    job = Job.at(tmp_path, server, max_file_mb=0.0004).prepare(shards=1, rows=3)
    sent = job.submit()
    assert (sent.refused, sent.entries) == (3, [])
    job.collect()
    assert outcomes_of(job) == {"request_too_large": 3}


def test_a_budget_is_never_exceeded(server: BatchServer, tmp_path: Path) -> None:
    """Little is sent at first, for the most that it can cost is set aside; more later."""
    server.faults = {"doubled": 0.0, "expired": 0.2}
    terms = {"budget_dollars": 0.1, "max_tokens": 512, "image_tokens": 1500, "max_requests": 10}
    job = Job.at(tmp_path, server, **terms).prepare(shards=2)
    for turn in range(10):
        sent = job.submit()
        assert job.submit().entries == []  # what is open counts
        books = job.plan().books.load()
        assert books.dollars + books.most <= 0.1 + 1e-9
        assert turn or (sent.left_out > 0 and sent.entries)
        server.work()
        assert server.bill <= 0.1
        job.collect()
    assert server.bill > 0.09
    assert job.plan().books.load().dollars == pytest.approx(server.bill)
    assert job.unsent() > 0


def test_no_more_tokens_are_enqueued_than_the_account_may(
    server: BatchServer, tmp_path: Path
) -> None:
    server.enqueued_tokens = 100_000
    terms = {"image_tokens": 900, "max_requests": 30, "enqueued_tokens": 100_000}
    job = Job.at(tmp_path, server, **terms).prepare(shards=2)
    turns = 0
    while job.plan().shards():
        job.submit()
        assert job.submit().entries == []
        server.work()
        job.collect()
        turns += 1
    assert turns == 2
    assert {batch.status for batch in server.batches} == {"completed"}


def test_what_is_refused_for_the_limit_of_tokens_is_sent_again(
    server: BatchServer, tmp_path: Path
) -> None:
    server.enqueued_tokens = 50_000
    job = Job.at(tmp_path, server, max_requests=30).prepare(shards=2)
    for _ in range(8):
        job.submit()
        server.work()
        job.collect()
    assert {batch.code for batch in server.batches} == {None, "token_limit_exceeded"}
    assert outcomes_of(job)["stop"] == 196  # none counts as sent who was refused so
    assert set(server.sent.values()) == {1}


def test_who_is_never_answered_fails_after_three_sendings(
    server: BatchServer, tmp_path: Path
) -> None:
    server.faults = {"expired": 1.0}
    job = Job.at(tmp_path, server).prepare(shards=1, rows=5)
    run_dry(job, server)
    assert outcomes_of(job) == {"batch_expired": 5}
    assert set(server.sent.values()) == {3}
    assert job.plan().books.load().dollars == server.bill == 0


def test_a_cancelled_batch_keeps_what_it_answered(server: BatchServer, tmp_path: Path) -> None:
    job = Job.at(tmp_path, server).prepare(shards=1, rows=10)
    job.submit()

    def cancel(desk: Desk, plan: Plan) -> Counter[str]:
        desk.look()
        return desk.cancel()

    assert job.work(cancel) == {"cancelled": 1}
    server.work()
    job.collect()
    assert job.captions() == {}
    assert job.unsent() == 5
    run_dry(job, server)
    assert outcomes_of(job) == {"stop": 10}
    assert sorted(server.worked.values()) == [1] * 10


# Hostile bytes


def test_lines_are_cut_whatever_the_chunks() -> None:
    lines = [b'{"a": 1}', b"", b"x" * (MAX_LINE + 1), b"  ", b"\xff\xfe", b"last"]
    data = b"\n".join(lines)
    for size in (1000, 7919, len(data)):
        chunks = (data[i : i + size] for i in range(0, len(data), size))
        assert list(lines_in(chunks)) == [b'{"a": 1}', None, b"\xff\xfe", b"last"]


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b"null",
        b'{"custom_id": 7}',
        b'{"custom_id": "a", "response": {"status_code": 99999}}',
        b'{"custom_id": "a", "response": {"status_code": "200 OK"}}',
        b'{"custom_id": "a\xff"}',
    ],
)
def test_a_line_that_is_none_leaves_its_request_open(line: bytes, tmp_path: Path) -> None:
    job = Job(tmp_path, {"model": "m"})
    results = Results({}, job.config)
    results.add(line)
    assert results.counts == {"malformed": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "../files"},
        {"id": "sk-key/../"},
        {"status": 7},
        {"status": ["sk-key"]},
    ],
)
def test_what_is_no_batch_is_not_believed(
    fields: dict[str, object], server: BatchServer, tmp_path: Path
) -> None:
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    job.submit()
    server.work()
    server.mangled = fields
    with pytest.raises(BatchError, match="answered what the Batch API does not") as raised:
        job.collect()
    assert "sk" not in str(raised.value)
    server.mangled = {"status": "\x1b[2Jdone"}  # a word that nobody knows: it is still at work
    job.collect()
    assert job.captions() == {}
    server.mangled = {}
    job.collect()
    assert outcomes_of(job) == {"stop": 3}


def test_a_batch_that_was_refused_as_a_whole(server: BatchServer, tmp_path: Path) -> None:
    server.max_requests = 2
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    job.submit()
    job.collect()
    (entry,) = job.plan().books.load().entries.values()
    assert (entry.status, entry.code, entry.dollars) == ("failed", "another reason", 0)
    server.max_requests = 3
    run_dry(job, server)
    assert outcomes_of(job) == {"stop": 3}


def test_offline_results_of_vllm(server: BatchServer, tmp_path: Path) -> None:
    """Files are written and nothing is sent; results come in parts, with lines of others, twice."""
    job = Job.at(tmp_path / "data", server, key_env="NO_SUCH_KEY").prepare(shards=2, rows=6)
    sent = job.work(lambda desk, plan: desk.submit(plan, is_elsewhere=True))
    (entry,) = sent.entries
    lines = [json.loads(text) for text in job.plan().books.load().lines_of(entry).splitlines()]
    assert len(lines) == 12
    assert server.uploads == 0

    def answered(line: dict[str, str], number: int) -> str:
        choice = {"message": {"content": f"caption {number}"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        body = {"choices": [choice], "usage": usage}
        response = {"status_code": 200, "request_id": "vllm-1", "body": body}
        answer = {"id": "vllm-2", "custom_id": line["custom_id"], "error": None}
        return json.dumps({**answer, "response": response}) + "\n"

    texts = [answered(line, number) for number, line in enumerate(lines)]
    too_long = {"status_code": 400, "request_id": "vllm-1", "body": None}
    texts[3] = json.dumps(
        {"id": "1", "custom_id": lines[3]["custom_id"], "response": too_long, "error": "too long"}
    )
    (tmp_path / "a.jsonl").write_text("\n".join(texts[:8]))
    (tmp_path / "b.jsonl").write_text("\n".join([*texts[6:], answered({"custom_id": "x"}, 0)]))

    def take(desk: Desk, plan: Plan) -> Counter[str]:
        return desk.take_files([tmp_path / "a.jsonl"])

    assert job.work(take) == {"answered": 7, "failed": 1}
    assert job.unsent() == 4

    def take_the_rest(desk: Desk, plan: Plan) -> Counter[str]:
        return desk.take_files([tmp_path / "b.jsonl"])

    assert job.work(take_the_rest) == {"answered": 4, "doubled": 2, "unknown": 1}
    job.collect()
    assert outcomes_of(job) == {"stop": 11, "http_400": 1}
    books = job.plan().books.load()
    assert books.dollars == pytest.approx(11 * (100 * INPUT_PRICE + 10 * OUTPUT_PRICE) / 1e6)
