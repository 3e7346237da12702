"""The journal: what is paid is known, whatever dies when; what was answered is not asked again."""

import asyncio
import json
from pathlib import Path

import pyarrow as pa
import pytest

from fusion_pipeline.dataset.fingerprints import Fingerprint
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import LeaseError
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.fuse.base import Captioned, Finish
from fusion_pipeline.fuse.journal import Journal, Spent, request_id
from tests.dataset.tables import put_table
from tests.killing import killed_at

TABLE = "captions/m"
ANSWER = Captioned("A barn.\u2028Red.", Finish.STOP, 100, 20)


def started(root: Path | str) -> Journal:
    journal = Journal(Dataset.create(root), TABLE)
    journal.start()
    return journal


async def three_attempts(journal: Journal) -> None:
    """One is answered, one was refused, of one nothing is known when the process dies."""
    answered, refused, _ = await asyncio.gather(
        *(journal.intend(name, shard, 0.5) for name, shard in (("a", 1), ("b", 1), ("c", 2)))
    )
    await journal.end(answered, 0.1, ANSWER)
    await journal.end(refused, 0.0)


def test_an_intent_without_an_end_is_charged_in_full(tmp_path: Path) -> None:
    journal = started(tmp_path)
    asyncio.run(three_attempts(journal))
    assert journal.spent == Spent(0.1, 1, 100, 20)
    for _ in range(2):  # what is folded up says the same
        again = started(tmp_path)
        assert again.spent == Spent(0.6, 2, 100, 20)
        assert again.answer("a", 1) == ANSWER
        assert again.answer("b", 1) is None
        assert again.answer("a", 2) is None


def test_of_a_committed_shard_the_cost_is_left(tmp_path: Path) -> None:
    asyncio.run(three_attempts(started(tmp_path)))
    dataset = Dataset.open(tmp_path)
    version = dataset.next_version(TABLE, Fingerprint({"made": "by a test"}))
    put_table(dataset, version, pa.table({"key": ["k"], "status": ["ok"], "reason": [None]}), 1)
    journal = started(tmp_path)
    assert journal.answer("a", 1) is None
    assert journal.spent == Spent(0.6, 2, 100, 20)
    names = {Path(name).name for name in dataset.storage.files("journal")}
    assert names == {"owner.json", "settled.json"}


def commit(root: Path, shard: int, statuses: list[str]) -> None:
    dataset, rows = Dataset.create(root), len(statuses)
    version = dataset.next_version(TABLE, Fingerprint({"made": "by a test"}))
    reasons = pa.array([None if s == "ok" else "http_500" for s in statuses], pa.string())
    columns = {"key": [f"{row}" for row in range(rows)], "status": statuses, "reason": reasons}
    put_table(dataset, version, pa.table(columns), shard)


async def answered(journal: Journal, shard: int, *requests: str) -> None:
    attempts = await asyncio.gather(*(journal.intend(name, shard, 0.5) for name in requests))
    await asyncio.gather(*(journal.end(attempt, 0.1, ANSWER) for attempt in attempts))


def kept(journal: Journal, shards: int, *requests: str) -> int:
    return sum(
        journal.answer(name, shard) is not None for shard in range(shards) for name in requests
    )


def test_only_answers_that_came_after_the_commit_are_kept(tmp_path: Path) -> None:
    """Those to a retry, or to a refresh of a whole table, that died before it committed. Of what
    the tables hold nothing is, though rows failed in each of them."""
    shards, rows = 10, [f"r{row}" for row in range(500)]

    async def first_run(journal: Journal) -> None:
        await asyncio.gather(*(answered(journal, shard, *rows[1:]) for shard in range(shards)))

    asyncio.run(first_run(started(tmp_path)))
    assert kept(started(tmp_path), shards, *rows) == shards * 499
    for shard in range(shards):
        commit(tmp_path, shard, ["failed"] + ["ok"] * 499)
    commit(tmp_path, shards, ["ok"])
    journal = started(tmp_path)
    assert kept(journal, shards, *rows) == 0
    assert not list(tmp_path.glob(f"journal/{TABLE}/*.jsonl"))

    asyncio.run(answered(journal, 3, rows[0]))  # a retry
    asyncio.run(answered(journal, shards, "refreshed"))
    for _ in range(2):  # what is folded up says the same
        again = started(tmp_path)
        assert again.answer(rows[0], 3) == again.answer("refreshed", shards) == ANSWER
        assert kept(again, shards, *rows) == 1
    commit(tmp_path, 3, ["ok"] * 500)
    assert started(tmp_path).answer(rows[0], 3) is None
    assert started(tmp_path).answer("refreshed", shards) == ANSWER


def test_while_others_are_done_the_answers_of_a_killed_run_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion_pipeline.fuse.journal._SEGMENT_S", 0.0)
    half = 100
    other, more = "abc.asked", range(half, half + 200)

    async def killed_run(journal: Journal) -> None:
        await asyncio.gather(*(answered(journal, shard, "half", other) for shard in range(half)))

    async def goes_on(journal: Journal) -> None:
        for shard in more:
            await answered(journal, shard, "whole")
            commit(tmp_path, shard, ["ok"])

    request = {"table": TABLE, "folder": "v", "where": "1", "limit": None, "id": "abc"}
    place = tmp_path / "runs" / "again" / TABLE
    place.mkdir(parents=True)
    (place / "request.json").write_text(json.dumps(request))
    asyncio.run(killed_run(started(tmp_path)))
    journal = started(tmp_path)
    asyncio.run(goes_on(journal))
    assert kept(journal, half, "half") == kept(journal, half, other) == half
    assert 0 < kept(journal, more.stop, "whole") <= 64


def test_an_orphan_asks_no_more(tmp_path: Path) -> None:
    orphan = started(tmp_path)
    asyncio.run(three_attempts(orphan))
    started(tmp_path)
    with pytest.raises(LeaseError, match="another process keeps these books"):
        asyncio.run(orphan.intend("d", 3, 1.0))


def test_who_was_frozen_while_it_folded_takes_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(three_attempts(started(tmp_path)))
    replace = Storage.create

    def frozen(storage: Storage, path: str, data: bytes) -> bool:
        if path.endswith("settled.json"):
            monkeypatch.setattr(Storage, "create", replace)
            asyncio.run(three_attempts(started(tmp_path)))
            started(tmp_path)
        return replace(storage, path, data)

    monkeypatch.setattr(Storage, "create", frozen)
    with pytest.raises(LeaseError, match="written by another run"):
        started(tmp_path)
    assert started(tmp_path).spent == Spent(1.2, 4, 200, 40)


def test_a_start_that_dies_at_any_write_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for crash_at in range(50):
        root = tmp_path / str(crash_at)
        for _ in range(2):
            asyncio.run(three_attempts(started(root)))
        if not killed_at(crash_at, monkeypatch, lambda root=root: started(root)):
            break
        assert started(root).spent == Spent(1.2, 4, 200, 40)
        assert started(root).answer("a", 1) == ANSWER
    assert crash_at > 3


def test_who_waits_shares_a_segment(tmp_path: Path) -> None:
    async def many(journal: Journal) -> None:
        await asyncio.gather(*(journal.intend(f"{i}", 0, 0.0) for i in range(500)))

    asyncio.run(many(started(tmp_path)))
    segments = list((tmp_path / "journal" / TABLE).glob("*.jsonl"))
    lines = [json.loads(text) for path in segments for text in path.read_text().splitlines()]
    assert {line["request"] for line in lines} == {f"{i}" for i in range(500)}
    assert len(segments) <= 3


def test_a_request_is_all_that_its_answer_hangs_on() -> None:
    base = ("key", ("prompt",), {"model": "m"})
    others = [
        ("other", ("prompt",), {"model": "m"}),
        ("key", ("prompt", "earlier", "complaint"), {"model": "m"}),
        ("key", ("prompt",), {"model": "n"}),
    ]
    assert len({request_id(*parts) for parts in (base, *others)}) == 4
