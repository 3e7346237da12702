"""What limits, wrong settings and frozen processes leave over, on a real socket: it is named, sent
again or dropped, and no request is lost or sent twice."""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from batch_job import Job, outcomes_of
from batch_server import BatchServer, serve_batches
from pydantic import ValidationError

from fusion_pipeline.dataset.lease import LeaseError, hold_lease
from fusion_pipeline.fuse.base import Captioned, CaptionFailed, CaptionRequest, Finish
from fusion_pipeline.fuse.batch.books import Books, Entry, State
from fusion_pipeline.fuse.batch.client import BatchError
from fusion_pipeline.fuse.batch.config import BatchConfig
from fusion_pipeline.fuse.batch.desk import Desk, Sent
from fusion_pipeline.fuse.batch.files import Limits, Packer
from fusion_pipeline.fuse.batch.plan import Plan
from fusion_pipeline.fuse.batch.show import notes, sent_line


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with serve_batches(BatchServer()) as running:
        yield running


def entries(job: Job) -> list[Entry]:
    return list(job.plan().books.load().entries.values())


# What is to be changed


@pytest.mark.parametrize("code", ["insufficient_quota", "too_many_tasks"])
def test_limits_of_the_account_are_no_sendings(
    code: str, server: BatchServer, tmp_path: Path
) -> None:
    server.code = code
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    for _ in range(4):
        job.submit()
    server.code = None
    job.submit()
    server.work()
    job.collect()
    assert outcomes_of(job) == {"stop": 3}
    (said,) = notes(entries(job), {})
    assert said.startswith(f"4 batches were refused as a whole: {code} (")


def test_parameters_that_the_model_refuses_are_named(server: BatchServer, tmp_path: Path) -> None:
    server.faults = {"unsupported": 1.0}
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    job.submit()
    server.work()
    job.collect()
    assert outcomes_of(job) == {"http_400": 3}
    (said,) = notes(entries(job), {})
    assert said.startswith("3 requests have failed, unsupported_parameter: set `token_parameter")


def test_the_most_tokens_of_an_answer_have_one_name() -> None:
    with pytest.raises(ValidationError, match="max_completion_tokens has a setting of its own"):
        BatchConfig(model="m", extra_body={"max_completion_tokens": 10**6})


# Processes that freeze, and wake up when another one has done their work


def test_outcomes_of_a_successor_stay(server: BatchServer, tmp_path: Path) -> None:
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    (entry,) = job.submit().entries
    settled = entry.model_copy(update={"state": State.SETTLED})

    class Frozen(Books):
        def check(self) -> None:
            """Looks at the lease, freezes, and another process does the work."""
            super().check()
            other = Books(self.dataset, self.table, self.token).load()
            name = other.asked[entry.name][0].id
            other.settle(settled, {name: Captioned("of the successor", Finish.STOP)})

    books = job.plan().books
    with hold_lease(books.dataset.storage, "test") as token:
        frozen = Frozen(books.dataset, books.table, token).load()
        name = frozen.asked[entry.name][0].id
        with pytest.raises(LeaseError, match="was written by another process"):
            frozen.settle(settled, {name: CaptionFailed("batch_error")})
    assert books.load().outcomes == {name: Captioned("of the successor", Finish.STOP)}


def test_a_file_that_is_gone_is_made_anew(server: BatchServer, tmp_path: Path) -> None:
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    server.refusals = {"upload": 500}
    with pytest.raises(BatchError):
        job.submit()
    server.refusals = {}
    (entry,) = entries(job)
    job.plan().books.drop_file(entry)
    assert [sent.requests for sent in job.submit().entries] == [3]


@pytest.mark.parametrize("lacking", [("requests.jsonl", "asked.json"), ()])
def test_a_file_that_was_begun_by_a_frozen_process_is_dropped(
    lacking: Sequence[str], server: BatchServer, tmp_path: Path
) -> None:
    """Its state is written last, after a successor has removed the rest, or sent the same."""
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    (entry,) = job.submit().entries

    def begin(desk: Desk, plan: Plan) -> str:
        asked = desk.books.asked[entry.name]
        late = desk.books.intend(b"lines\n", asked, entry.most, job.now[0], State.INTENDED)
        for file in lacking:
            desk.books.dataset.storage.delete(desk.books.path(late.name, file))
        return late.name

    late = job.work(begin)
    job.submit()
    found = job.plan().books.load().entries[late]
    assert (found.state, found.dollars) == (State.SETTLED, 0)
    server.work()
    job.collect()
    assert outcomes_of(job) == {"stop": 3}
    assert set(server.sent.values()) == {1}


def test_what_a_retry_left_over_is_sent_by_the_next_submit(
    server: BatchServer, tmp_path: Path
) -> None:
    server.faults = {"http_400": 1.0}
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    job.submit()
    server.work()
    job.collect()
    assert outcomes_of(job) == {"http_400": 3}
    server.faults, server.refusals = {}, {"create": 429}

    def retry(desk: Desk, plan: Plan) -> None:
        desk.books.forgive()
        desk.submit(plan.of_failed())

    with pytest.raises(BatchError, match="asked too often"):
        job.work(retry)
    server.refusals = {}
    assert [entry.requests for entry in job.submit().entries] == [3]
    server.work()
    job.collect()
    plan = job.plan()
    plan.books.load()
    assert plan.has_healed()
    assert "`submit --retry-failed` again" in " ".join(
        sent_line(Sent([], 0, 5), False, plan.books, is_retry=True)
    )


# Memory


def test_few_lines_are_encoded_ahead(server: BatchServer, tmp_path: Path) -> None:
    """And from the first request that finds no room on, all are left."""
    plan = Job.at(tmp_path, server).prepare(shards=1).plan()
    wanted = set(plan.ids(0))
    taken = Counter[str]()

    def requests() -> Iterator[CaptionRequest]:
        for request in plan.requests(0, wanted):
            taken["requests"] += 1
            yield request

    packer = Packer(plan.config, Limits(tokens=10_000), lambda *_: None)
    with ThreadPoolExecutor(2) as pool:
        refused, left = packer.pack(requests(), wanted, 0, pool)
    packer.flush()
    assert refused == {}
    assert len(left) == 98 - packer.requests < 98
    assert taken["requests"] == 32
