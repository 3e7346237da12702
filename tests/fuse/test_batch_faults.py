"""What a provider may do that it should not, over a real socket: nothing is paid twice, or believed
to be free, or lost while it may still come."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_job import Job, hours, outcomes_of
from batch_server import BatchServer, serve_batches

from fusion_pipeline.fuse.base import Captioned, Finish
from fusion_pipeline.fuse.batch.books import MAX_EXCESS, Asked, Entry, State
from fusion_pipeline.fuse.batch.client import BatchError
from fusion_pipeline.fuse.batch.config import BatchConfig
from fusion_pipeline.fuse.batch.desk import Desk, Sent
from fusion_pipeline.fuse.batch.plan import Plan
from fusion_pipeline.fuse.batch.remote import MANY, Remote
from fusion_pipeline.fuse.batch.results import Results
from fusion_pipeline.fuse.batch.show import sent_line
from fusion_pipeline.fuse.completions import Completion


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with serve_batches(BatchServer()) as running:
        yield running


def entries(job: Job) -> list[Entry]:
    return list(job.plan().books.load().entries.values())


def cancel(desk: Desk, plan: Plan) -> Counter[str]:
    desk.look()
    return desk.cancel()


# What a batch looks like


@pytest.mark.parametrize(
    "fields",
    [
        {"error_file_id": "", "errors": [], "usage": {}, "request_counts": {}},
        {"error_file_id": "a/../../batches", "errors": {"data": [None, {"code": 7}]}},
        {"usage": {"input_tokens": -5, "output_tokens": 1}, "completed_at": 0, "created_at": None},
        {"usage": {"input_tokens": 10**15, "output_tokens": 1}, "input_file_id": 7},
        {"request_counts": {"completed": "many", "failed": 0}, "metadata": {"a": 1}},
    ],
)
def test_only_id_and_status_are_required(
    fields: dict[str, object], server: BatchServer, tmp_path: Path
) -> None:
    server.mangled = fields
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    job.submit()
    server.work()
    job.collect()
    assert outcomes_of(job) == {"stop": 3}
    assert entries(job)[0].dollars == pytest.approx(server.bill)


def test_numbers_from_outside_have_bounds(tmp_path: Path) -> None:
    batch = {"id": "a", "status": "completed"}
    counted = {"request_counts": {"completed": MANY + 1, "failed": 0}}
    assert Remote.model_validate({**batch, **counted}).request_counts is None
    used = {"usage": {"input_tokens": 0, "output_tokens": 0}}
    assert Remote.model_validate({**batch, **used}).usage is None

    results = Results({"a": Asked("a", 0, 1000)}, prices_of(tmp_path))
    results.add(answer("a", prompt_tokens=10**8))
    assert results.outcomes == {"a": Captioned("a barn", Finish.STOP)}
    assert results.cost(None, 0) == results.unknown_dollars > 0
    usage = {"prompt_tokens": 1, "completion_tokens": 10**7 + 1}
    choice = {"message": {"content": "x"}, "finish_reason": "stop"}
    completion = Completion.parse(json.dumps({"choices": [choice], "usage": usage}).encode())
    assert completion is not None
    assert completion.usage is None


def prices_of(tmp_path: Path) -> BatchConfig:
    return Job(tmp_path, {"model": "m", "prices": {"input": 1, "output": 1}}).config


def answer(name: str, prompt_tokens: int) -> bytes:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 1}
    choice = {"message": {"content": "a barn"}, "finish_reason": "stop"}
    response = {"status_code": 200, "body": {"choices": [choice], "usage": usage}}
    return json.dumps({"custom_id": name, "response": response}).encode()


def test_one_wrong_count_of_tokens_is_set_aside_no_further_than_sensible(
    server: BatchServer, tmp_path: Path
) -> None:
    terms = {"budget_dollars": 1.0, "max_requests": 1}
    job = Job.at(tmp_path, server, **terms).prepare(shards=1, rows=40)
    (entry, *_) = job.submit().entries
    job.work(lambda desk, _: desk.books.save(entry.model_copy(update={"excess": 10**7})))
    books = job.plan().books.load()
    assert books.excess == MAX_EXCESS
    said = " ".join(sent_line(Sent([], 0, 5), False, books))
    assert "50,000 tokens more than `image_tokens` are set aside" in said
    assert f"{entry.name}/state.json" in said


@pytest.mark.parametrize("last", [7, {}, {"id": None}, {"id": "sk-key/../.."}])
def test_a_list_that_can_not_be_followed(last: object, server: BatchServer, tmp_path: Path) -> None:
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    job.submit()
    server.mangled_page = {"data": [last], "has_more": True}
    with pytest.raises(BatchError, match="has no end") as raised:
        job.collect()
    assert "sk-key" not in repr(raised.value.__context__)


# Whether there is a batch


def test_a_batch_that_can_not_be_read_is_not_asked_for_again(
    server: BatchServer, tmp_path: Path
) -> None:
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    server.answers_creation = lambda: 502
    with pytest.raises(BatchError):
        job.submit()
    hours(job, 1)
    server.answers_creation, server.mangled = lambda: 200, {"status": None}
    for _ in range(2):
        with pytest.raises(BatchError, match="answered what the Batch API does not"):
            job.submit()
    server.mangled = {"metadata": None}  # its file is known
    job.submit()
    assert len(server.batches) == 1
    server.work()
    job.collect()
    assert outcomes_of(job) == {"stop": 3}


def test_the_minute_counts_from_when_no_answer_came(server: BatchServer, tmp_path: Path) -> None:
    """And a batch that turns up later yet is taken in, not asked for twice."""
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    begun = job.now[0]

    def slow() -> int:
        job.now[0] += 600
        return 504

    server.answers_creation, server.lag_s = slow, 700
    with pytest.raises(BatchError):
        job.submit()
    assert job.now[0] == begun + 600
    assert job.submit().entries == []
    job.now[0] += 70
    server.refusals = {"upload": 500, "list_files": 500}  # nothing can be sent now
    with pytest.raises(BatchError):
        job.submit()
    assert [entry.state for entry in entries(job)] == [State.INTENDED]
    job.now[0] += 60
    job.submit()
    assert [entry.state for entry in entries(job)] == [State.OPEN]
    server.work()
    job.collect()
    assert outcomes_of(job) == {"stop": 3}
    assert len(server.batches) == 1


def test_what_may_run_is_not_given_up_for_nothing(server: BatchServer, tmp_path: Path) -> None:
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    server.answers_creation, server.lag_s = lambda: 504, 10_000
    with pytest.raises(BatchError):
        job.submit()
    assert job.work(cancel) == {"not known yet": 1}
    job.now[0] += 70
    most = entries(job)[0].most
    assert job.work(cancel) == {"given up and charged in full": 1}
    assert entries(job)[0].dollars == most > 0


def test_a_twin_that_was_done_before_its_cancel_is_no_further_sending(
    server: BatchServer, tmp_path: Path
) -> None:
    server.faults = {"expired": 1.0}
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    (entry,) = job.submit().entries

    def again(desk: Desk, plan: Plan) -> None:
        assert entry.file is not None
        desk.provider.create(entry.file, entry.name)

    job.work(again)
    server.work()
    job.collect()
    books = job.plan().books.load()
    assert len(books.entries) == 2
    assert set(books.sendings.values()) == {1}


# Results that are late, or hidden


def test_results_are_late_from_when_somebody_looked(server: BatchServer, tmp_path: Path) -> None:
    server.is_late = True
    job = Job.at(tmp_path, server).prepare(shards=1, rows=4)
    job.submit()
    server.work()
    server.mangled = {"completed_at": int(job.now[0])}
    hours(job, 5)
    job.collect()
    server.work()
    job.collect()
    assert outcomes_of(job) == {"stop": 4}
    assert set(server.sent.values()) == {1}


def test_a_page_instead_of_a_file_settles_nothing(server: BatchServer, tmp_path: Path) -> None:
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    job.submit()
    server.work()
    name = server.batches[0].output or ""
    kept = server.files[name]
    server.files[name] = (name, b"<html>\n<h1>Sign in</h1>\n<p>\n</html>\n")
    job.collect()
    assert [entry.state for entry in entries(job)] == [State.OPEN]
    server.files[name] = kept
    job.collect()
    assert outcomes_of(job) == {"stop": 3}


def test_a_file_that_is_named_and_not_there_may_still_come(
    server: BatchServer, tmp_path: Path
) -> None:
    """Whatever was counted."""
    server.faults = {"expired": 0.4}
    server.mangled = {"request_counts": None}
    job = Job.at(tmp_path, server).prepare(shards=1, rows=20)
    job.submit()
    server.work()
    assert server.batches[0].status == "expired"
    server.refusals = {server.batches[0].output or "": 404}
    job.collect()
    server.refusals = {}
    job.collect()
    assert 0 < len(job.plan().books.load().outcomes) < 20


def test_failed_lines_do_not_stand_for_answers(server: BatchServer, tmp_path: Path) -> None:
    """All answers are lost, and the other half has failed: the answers are charged."""
    server.faults, server.shows_usage = {"http_400": 0.5}, False
    job = Job.at(tmp_path, server).prepare(shards=1, rows=20)
    job.submit()
    server.work()
    del server.files[server.batches[0].output or ""]
    job.collect()
    hours(job, 2)
    job.collect()
    assert entries(job)[0].dollars >= server.bill > 0


def test_zeros_are_not_believed(server: BatchServer, tmp_path: Path) -> None:
    server.is_late = True
    server.mangled = {
        "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
        "request_counts": {"completed": 0, "failed": 0, "total": 0},
    }
    job = Job.at(tmp_path, server).prepare(shards=1, rows=6)
    job.submit()
    server.work()
    job.collect()
    assert [entry.state for entry in entries(job)] == [State.OPEN]
    hours(job, 2)
    job.collect()
    (entry,) = entries(job)
    assert entry.counts == {"answered": 3, "missing": 3}
    assert entry.dollars > server.bill


@pytest.mark.parametrize("status", [403, 404, 410, 500])
def test_a_file_that_can_not_be_read_stops_no_other(
    status: int, server: BatchServer, tmp_path: Path
) -> None:
    """Refused, it is as good as late; an error of the server ends when it ends, or by `cancel`."""
    job = Job.at(tmp_path, server, max_requests=2).prepare(shards=1, rows=4)
    job.submit()
    server.work()
    server.refusals = {server.batches[0].output or "": status}

    def collect() -> list[State]:
        with pytest.raises(BatchError) if status == 500 else contextlib.nullcontext():
            job.collect()
        return [entry.state for entry in entries(job)]

    assert collect() == [State.OPEN, State.SETTLED]
    hours(job, 2)
    if status == 500:
        assert collect() == [State.OPEN, State.SETTLED]
        assert job.work(cancel) == {"given up and charged in full": 1}
    else:
        assert collect() == [State.SETTLED, State.SETTLED]
    first, _ = entries(job)
    assert first.dollars >= server.bill / 2 > 0
    assert job.unsent() == 2


def test_a_batch_that_never_ends_can_be_given_up(server: BatchServer, tmp_path: Path) -> None:
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    job.submit()
    server.mangled = {"status": "rejected"}
    assert job.work(cancel) == {"cancelled": 1}
    hours(job, 49)
    server.refusals = {"cancel": 500}
    most = entries(job)[0].most
    assert job.work(cancel) == {"given up and charged in full": 1}
    assert entries(job)[0].dollars == most > 0
