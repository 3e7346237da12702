"""The same datasets on an object store: an S3 server inside the test, over real HTTP."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import LEASE, LeaseError, hold_lease, read_lease
from fusion_pipeline.dataset.samples import Limits
from fusion_pipeline.dataset.storage import Storage, StorageError
from fusion_pipeline.ingest.webdataset import plan_tars, read_tar_rows
from tests.racing import count_up, in_processes, take_turns
from tests.toy import files_of, run_toy, seen_by_readers, toy_steps


@pytest.fixture
def client(bucket: str) -> object:
    """Whoever else writes to the bucket."""
    return boto3.client("s3")


def test_the_same_bytes_as_on_a_disk(bucket: str, tmp_path: Path) -> None:
    root = f"s3://{bucket}/runs/toy"
    results = run_toy(root, range(3), toy_steps())
    assert len(results) == 3 * 4
    run_toy(tmp_path / "local", range(3), toy_steps())
    expected = files_of(tmp_path / "local")
    storage = Storage(root)
    read = {name: storage.read(name) for name in storage.files("") if name in expected}
    assert seen_by_readers(read) == expected
    assert set(storage.files("")) - set(expected) == {"dataset.json", LEASE}
    assert read_lease(storage) is None  # it was given back
    assert run_toy(root, range(3), toy_steps()) == []
    storage.delete(Dataset.open(root).version("b").path(1))
    again = run_toy(root, range(3), toy_steps())
    assert [(result.step, result.shard) for result in again] == [("b", 1)]


def test_one_lease(bucket: str) -> None:
    root = f"s3://{bucket}/leased"
    with hold_lease(Storage(root), "first") as token:
        held = read_lease(Storage(root))
        assert held is not None
        assert held.token == token
        with (
            pytest.raises(LeaseError, match="in use by run first"),
            hold_lease(Storage(root), "second"),
        ):
            pass
    assert read_lease(Storage(root)) is None
    with hold_lease(Storage(root), "third"):
        pass


def test_exactly_one_creator(bucket: str) -> None:
    storage = Storage(f"s3://{bucket}/raced")
    barrier = threading.Barrier(6)

    def create(mine: int) -> list[int]:
        won = []
        for i in range(5):
            barrier.wait()
            if storage.create(f"file-{i}", bytes([mine])):
                won.append(i)
        return won

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(create, range(6)))
    assert sorted(i for mine in won for i in mine) == list(range(5))
    for mine, rounds in enumerate(won):
        assert all(storage.read(f"file-{i}") == bytes([mine]) for i in rounds)


def test_replacing_never_loses_an_update(bucket: str) -> None:
    """The store itself compares: processes that add one to the same number lose no step."""
    root = f"s3://{bucket}/counted"
    Storage(root).put("number", b"00000000")
    refused = in_processes(3, count_up, root, 15)
    assert int(Storage(root).read("number")) == 3 * 15
    assert sum(refused) > 0, "they never met: nothing was tried"


def test_a_stale_mark_never_wins(bucket: str) -> None:
    storage = Storage(f"s3://{bucket}/marked")
    assert storage.version("file") is None
    assert not storage.replace("file", b"x", '"0123"')  # there is nothing to replace
    assert not storage.exists("file")
    storage.put("file", b"first")
    first = str(storage.version("file"))
    assert storage.replace("file", b"second", first)
    assert not storage.replace("file", b"third", first)
    assert not storage.create("file", b"third")
    assert storage.read("file") == b"second"
    large = bytes(101 * 2**20)  # a plain upload of this size would be cut in parts
    assert not storage.replace("file", large, first)
    assert storage.replace("file", large, str(storage.version("file")))
    assert storage.size("file") == len(large)


def test_processes_take_turns(bucket: str) -> None:
    root = f"s3://{bucket}/turns"
    refused = in_processes(3, take_turns, root, 4)
    assert sum(refused) > 0, "they never met: nothing was tried"
    assert read_lease(Storage(root)) is None


def test_what_others_write_is_seen_at_once(client: object, bucket: str) -> None:
    storage = Storage(f"s3://{bucket}/shared")
    storage.put("tables/a/1", b"1")
    assert storage.files("tables/a") == ["tables/a/1"]
    assert not storage.exists("tables/a/2")
    client.put_object(Bucket=bucket, Key="shared/tables/a/2", Body=b"22")  # type: ignore[attr-defined]
    client.put_object(Bucket=bucket, Key="shared/tables/ab/3", Body=b"3")  # type: ignore[attr-defined]
    assert storage.files("tables/a") == ["tables/a/1", "tables/a/2"]
    assert storage.exists("tables/a/2")
    assert storage.size("tables/a/2") == 2
    client.put_object(Bucket=bucket, Key="shared/tables/a/2", Body=b"longer")  # type: ignore[attr-defined]
    assert storage.size("tables/a/2") == 6
    assert storage.read("tables/a/2") == b"longer"
    client.delete_object(Bucket=bucket, Key="shared/tables/a/1")  # type: ignore[attr-defined]
    assert not storage.exists("tables/a/1")
    assert storage.files("tables") == ["tables/a/2", "tables/ab/3"]
    assert storage.files("nothing/here") == []


def test_the_verbs(bucket: str) -> None:
    storage = Storage(f"s3://{bucket}/verbs")
    storage.put("f", bytes(range(100)))
    assert storage.read_range("f", 10, 13) == bytes([10, 11, 12])
    assert storage.read_range("f", 95, 200) == bytes(range(95, 100))
    assert storage.read_range("f", 100, 100) == b""
    for read in (storage.read, storage.size, lambda n: storage.read_range(n, 0, 1)):
        with pytest.raises(FileNotFoundError):
            read("missing")
    with pytest.raises(KeyboardInterrupt):
        write_half(storage, "lines")
    assert not storage.exists("lines")
    with storage.writer("lines") as file:
        file.write("ganz: ü\n")
    assert storage.read("lines").decode() == "ganz: ü\n"
    storage.put("folder/a/b", b"x")
    storage.delete("folder")
    storage.delete("folder")
    assert storage.files("") == ["f", "lines"]
    for name in ("v/a/1", "v/b/c/2", "v/3"):
        storage.put(name, b"x" * len(name))
    assert storage.folders("v") == ["a", "b"]
    assert storage.folders("no/such") == []
    assert storage.sizes("v") == {"v/3": 3, "v/a/1": 5, "v/b/c/2": 7}


def test_a_source_tar_on_s3(bucket: str, tmp_path: Path) -> None:
    run_toy(tmp_path / "local", range(1), toy_steps())
    local = Dataset.open(tmp_path / "local")
    tar = local.storage.read(local.version("samples").tar_path(0))
    storage = Storage(f"s3://{bucket}/source")
    storage.put("whole.tar", tar)
    storage.put("without-end.tar", tar.rstrip(b"\0") + bytes(-len(tar.rstrip(b"\0")) % 512))
    plan = list(plan_tars(storage, Limits(4, 2**20)))
    assert [(p.source, p.rows, bool(p.damaged)) for p in plan] == [
        ("whole.tar", 4, False), ("whole.tar", 2, False),
        ("without-end.tar", 4, False), ("without-end.tar", 2, True),
    ]  # fmt: skip
    rows = [row for part in plan[:2] for row in read_tar_rows(storage, part)]
    assert [row.alt_text for row in rows] == [f"text {i}" for i in range(6)]


def write_half(storage: Storage, path: str) -> None:
    with storage.writer(path) as file:
        file.write("half")
        raise KeyboardInterrupt


def test_a_missing_bucket_is_named(bucket: str) -> None:
    with pytest.raises(StorageError, match="s3://nobody-made-this: there is no such bucket"):
        Storage("s3://nobody-made-this").create("a", b"")
