"""The same datasets on an object store: an S3 server inside the test, over real HTTP."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import fsspec
import pytest

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import LEASE, LeaseError, hold_lease, read_lease
from fusion_pipeline.dataset.samples import Limits
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.ingest.webdataset import plan_tars, read_tar_rows
from tests.toy import files_of, run_toy, toy_steps

moto_server = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")

BUCKET = "fusion-test"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=BUCKET)
    yield s3
    for item in s3.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        s3.delete_object(Bucket=BUCKET, Key=item["Key"])
    fsspec.filesystem("s3").clear_instance_cache()


def test_the_same_bytes_as_on_a_disk(client: object, tmp_path: Path) -> None:
    root = f"s3://{BUCKET}/runs/toy"
    results = run_toy(root, range(3), toy_steps())  # type: ignore[arg-type]
    assert len(results) == 3 * 4
    run_toy(tmp_path / "local", range(3), toy_steps())
    expected = files_of(tmp_path / "local")
    storage = Storage(root)
    stored = {name: storage.read(name) for name in storage.files("") if name in expected}
    assert stored == expected
    assert set(storage.files("")) - set(expected) == {"dataset.json"}  # the lease was given back
    assert run_toy(root, range(3), toy_steps()) == []  # type: ignore[arg-type]
    storage.delete(Dataset.table_path("b", 1))
    again = run_toy(root, range(3), toy_steps())  # type: ignore[arg-type]
    assert [(result.step, result.shard) for result in again] == [("b", 1)]


def test_one_lease(client: object) -> None:
    root = f"s3://{BUCKET}/leased"
    with hold_lease(Storage(root), "first") as token:
        held = read_lease(Storage(root))
        assert held is not None
        assert held.token == token
        with (
            pytest.raises(LeaseError, match="in use by run first"),
            hold_lease(Storage(root), "second"),
        ):
            pass
    assert not Storage(root).exists(LEASE)


def test_exactly_one_creator(client: object) -> None:
    storage = Storage(f"s3://{BUCKET}/raced")
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


def test_what_others_write_is_seen_at_once(client: object) -> None:
    storage = Storage(f"s3://{BUCKET}/shared")
    storage.put("tables/a/1", b"1")
    assert storage.files("tables/a") == ["tables/a/1"]
    assert not storage.exists("tables/a/2")
    client.put_object(Bucket=BUCKET, Key="shared/tables/a/2", Body=b"22")  # type: ignore[attr-defined]
    client.put_object(Bucket=BUCKET, Key="shared/tables/ab/3", Body=b"3")  # type: ignore[attr-defined]
    assert storage.files("tables/a") == ["tables/a/1", "tables/a/2"]
    assert storage.exists("tables/a/2")
    assert storage.size("tables/a/2") == 2
    client.put_object(Bucket=BUCKET, Key="shared/tables/a/2", Body=b"longer")  # type: ignore[attr-defined]
    assert storage.size("tables/a/2") == 6
    assert storage.read("tables/a/2") == b"longer"
    client.delete_object(Bucket=BUCKET, Key="shared/tables/a/1")  # type: ignore[attr-defined]
    assert not storage.exists("tables/a/1")
    assert storage.files("tables") == ["tables/a/2", "tables/ab/3"]
    assert storage.files("nothing/here") == []


def test_the_verbs(client: object) -> None:
    storage = Storage(f"s3://{BUCKET}/verbs")
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


def test_a_source_tar_on_s3(client: object, tmp_path: Path) -> None:
    run_toy(tmp_path / "local", range(1), toy_steps())
    tar = (tmp_path / "local" / Dataset.shard_path(0)).read_bytes()
    storage = Storage(f"s3://{BUCKET}/source")
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
