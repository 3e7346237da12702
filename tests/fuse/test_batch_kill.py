"""Killed at each step of a submission, nothing is sent, or paid, twice."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3fs
from batch_job import Job, hours, outcomes_of
from batch_server import BatchServer, serve_batches

from fusion_pipeline.fuse.batch.books import State
from fusion_pipeline.fuse.batch.client import Provider
from fusion_pipeline.fuse.batch.desk import Desk
from fusion_pipeline.fuse.batch.plan import Plan
from tests.faulty_s3 import s3_server
from tests.killing import Killed, killed_at


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with serve_batches(BatchServer()) as running:
        yield running


def killed_at_calls(n: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> bool:
    """Do the work and die before (even n) or after (odd n) a call that changes something at the
    provider; False when it ends before."""
    calls = 0

    def dying(verb: str) -> Callable[..., object]:
        act = getattr(Provider, verb)

        def call(self: Provider, *arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls * 2 - 2 == n:
                raise Killed
            answer = act(self, *arguments)
            if calls * 2 - 1 == n:
                raise Killed
            return answer

        return call

    with monkeypatch.context() as patch:
        for verb in ("upload", "create", "forget"):
            patch.setattr(Provider, verb, dying(verb))
        try:
            work()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("where", [killed_at, killed_at_calls])
@pytest.mark.parametrize("is_soon", [True, False])
def test_a_kill_at_any_step_submits_nothing_twice(
    where: Callable[..., bool],
    is_soon: bool,
    server: BatchServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Job.at(tmp_path / "made", server).prepare(shards=2, rows=3)
    for crash_at in range(100):
        server.sent.clear()
        server.worked.clear()
        server.bill = 0.0
        root = shutil.copytree(tmp_path / "made", tmp_path / str(crash_at))
        job = Job.at(root, server, max_requests=4, budget_dollars=0.05)

        def all_of_it(job: Job = job) -> None:
            job.submit()
            server.work()
            job.collect()

        if not where(crash_at, monkeypatch, all_of_it):
            break
        if not is_soon:  # what was asked for can't come any more
            hours(job, 1)
        for _ in range(2):
            job.submit()
            server.work()
            job.collect()
            hours(job, 1)
        books = job.plan().books.load()
        assert set(server.sent.values()) == {1}, crash_at
        assert outcomes_of(job) == {"stop": 6}, crash_at
        assert books.dollars == pytest.approx(server.bill)
        assert len(books.outcomes) == 6
        assert books.open() == []
        left = [path for path in books.dataset.storage.files("batches") if "requests.j" in path]
        assert left == []
    assert crash_at > 6
    assert len({batch.metadata["fusion_batch"] for batch in server.batches}) == len(server.batches)


def test_a_batch_of_which_no_answer_came_is_found_again(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job.at(tmp_path, server).prepare(shards=1, rows=3)
    server.lag_s = 30
    killed_at_calls(3, monkeypatch, job.submit)  # created, and nobody was told
    for _ in range(2):
        assert job.submit().entries == []  # it may still come
    (entry,) = job.plan().books.load().open()
    assert entry.state is State.CREATING
    job.now[0] += 40
    assert job.submit().entries == []
    (entry,) = job.plan().books.load().open()
    assert (entry.state, entry.batch) == (State.OPEN, server.batches[0].id)


def test_a_twin_is_cancelled_and_counts(server: BatchServer, tmp_path: Path) -> None:
    """Of a process that was frozen before it asked, and woke up after another one had asked."""
    job = Job.at(tmp_path, server).prepare(shards=1, rows=4)
    (entry,) = job.submit().entries

    def late(desk: Desk, plan: Plan) -> None:
        assert entry.file is not None
        desk.provider.create(entry.file, entry.name)

    job.work(late)
    job.submit()
    assert [batch.status for batch in server.batches] == ["validating", "cancelling"]
    server.work()
    job.collect()
    assert outcomes_of(job) == {"stop": 4}
    assert sorted(server.worked.values()) == [1, 1, 2, 2]
    assert job.plan().books.load().dollars == pytest.approx(server.bill)


def test_on_an_object_store(server: BatchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        store.make_bucket("batches")
        job = Job.at("s3://batches/data", server, max_requests=4).prepare(shards=2, rows=3)
        killed_at_calls(2, monkeypatch, job.submit)  # uploaded, and its batch not asked for
        hours(job, 1)
        for _ in range(2):
            job.submit()
            server.work()
            job.collect()
        assert outcomes_of(job) == {"stop": 6}
        assert set(server.sent.values()) == {1}
        assert server.uploads == 2  # what was uploaded before the kill is used
        s3fs.S3FileSystem.clear_instance_cache()
