"""What is promised of stored files: whole or not at all, one creator, exact listings."""

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fusion_pipeline.dataset.storage import TEMPORARY, Storage


def leftovers(root: Path) -> list[Path]:
    return list((root / TEMPORARY).glob("*")) if (root / TEMPORARY).exists() else []


def test_a_reader_sees_one_whole_version_or_another(tmp_path: Path) -> None:
    """While a file is replaced all the time, every read is of one complete version."""
    storage = Storage(tmp_path)
    versions = [bytes([i]) * 300_000 for i in range(4)]
    storage.put("a/file", versions[0])

    def replace() -> None:
        for n in range(1, 25):
            storage.put("a/file", versions[n % 4])

    seen = set()
    with ThreadPoolExecutor() as pool:
        writer = pool.submit(replace)
        while not writer.done():
            seen.add(storage.read("a/file"))
        writer.result()
    assert len(seen) > 1
    assert seen <= set(versions)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_put_leaves_the_old_file(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path)
    storage.put("a/file", b"old")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, no_space)
        with pytest.raises(OSError, match="No space"):
            storage.put("a/file", b"new")
    assert storage.read("a/file") == b"old"
    assert storage.files("a") == ["a/file"]


def _create(root: str, barrier: Callable[[], int], rounds: int) -> list[int]:
    storage, won = Storage(root), []
    for i in range(rounds):
        barrier()
        if storage.create(f"made/{i}", f"{os.getpid()}-{threading.get_ident()}".encode()):
            won.append(i)
    return won


def _create_in_process(root: str, barrier: object, rounds: int, results: object) -> None:
    results.put((os.getpid(), _create(root, barrier.wait, rounds)))  # type: ignore[attr-defined]


def test_exactly_one_thread_creates_a_file(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(_create, str(tmp_path), barrier.wait, 40) for _ in range(8)]
    winners = [i for job in jobs for i in job.result()]
    assert sorted(winners) == list(range(40))
    assert leftovers(tmp_path) == []


def test_exactly_one_process_creates_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (str(tmp_path), barrier, 40, results)
    workers = [context.Process(target=_create_in_process, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    won = dict(results.get(timeout=30) for _ in workers)
    for worker in workers:
        worker.join()
    assert sorted(i for mine in won.values() for i in mine) == list(range(40))
    for pid, mine in won.items():  # and what lies there is the winner's
        for i in mine:
            assert Storage(tmp_path).read(f"made/{i}").decode().startswith(f"{pid}-")


def test_listings_are_exact(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "data")
    assert storage.files("") == []
    assert storage.files("no/such/folder") == []
    for name in ("tables/a/1", "tables/ab/1", "tables/a/nested/2", "top", "tables/a/ü 😀"):
        storage.put(name, b"x")
    assert storage.files("tables/a") == ["tables/a/1", "tables/a/nested/2", "tables/a/ü 😀"]
    # A half-written file of a killed run is under no folder that anyone lists.
    storage._write_temporary(b"half")
    assert storage.files("tables") == [
        "tables/a/1", "tables/a/nested/2", "tables/a/ü 😀", "tables/ab/1",
    ]  # fmt: skip
    storage.delete("tables/a")
    storage.delete("tables/a")
    assert storage.files("tables") == ["tables/ab/1"]
    assert storage.exists("top")
    assert not storage.exists("tables/a/1")


def test_a_text_file_appears_only_when_its_block_ends_well(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with storage.writer("out/lines.txt") as file:
        file.write("eins — ü\n")
        file.flush()
        assert not storage.exists("out/lines.txt")
    assert storage.read("out/lines.txt").decode() == "eins — ü\n"
    with pytest.raises(KeyboardInterrupt):
        write_half(storage, "out/lines.txt")
    assert storage.read("out/lines.txt").decode() == "eins — ü\n"
    assert leftovers(tmp_path) == []


def test_ranges_and_missing_files(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.put("f", bytes(range(100)))
    assert storage.read_range("f", 10, 13) == bytes([10, 11, 12])
    assert storage.read_range("f", 95, 200) == bytes(range(95, 100))
    assert storage.read_range("f", 100, 100) == b""
    assert storage.size("f") == 100
    with storage.open("f") as stream:
        stream.seek(98)
        assert stream.read() == b"bc"
    for read in (storage.read, storage.size, storage.open, lambda n: storage.read_range(n, 0, 1)):
        with pytest.raises(FileNotFoundError):
            read("missing")


def test_workers_open_the_same_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("relative")
    storage.put("f", b"x")
    sent = pickle.dumps(storage)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(sent).read("f") == b"x"  # noqa: S301 - our own bytes, as Ray sends them


def write_half(storage: Storage, path: str) -> None:
    with storage.writer(path) as file:
        file.write("half")
        raise KeyboardInterrupt
