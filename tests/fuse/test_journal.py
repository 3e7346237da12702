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


def test_answers_to_rows_that_failed_before_are_kept(tmp_path: Path) -> None:
    """`--retry-failed` had asked for them again, and died before it committed."""
    dataset = Dataset.create(tmp_path)
    version = dataset.next_version(TABLE, Fingerprint({"made": "by a test"}))
    failed = pa.table({"key": ["k"], "status": ["failed"], "reason": ["http_500"]})
    put_table(dataset, version, failed, 1)
    asyncio.run(three_attempts(started(tmp_path)))
    assert started(tmp_path).answer("a", 1) == ANSWER


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
