"""What is promised of stored files: whole or not at all, one creator, no lost update, exact
listings."""

import errno
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from fusion_pipeline.dataset import storage as storage_module
from fusion_pipeline.dataset.s3 import StorageError
from fusion_pipeline.dataset.storage import (
    TEMPORARY_FILES,
    Storage,
    StorageFullError,
)
from tests.racing import count_up, in_processes
from tests.toy import leave_half


def leftovers(root: Path) -> list[Path]:
    return list((root / TEMPORARY_FILES).glob("*"))


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


def write_line(storage: Storage, path: str) -> None:
    with storage.writer(path) as file:
        file.write("new")


WRITES: dict[str, Callable[[Storage, str], object]] = {
    "put": lambda storage, path: storage.put(path, b"new"),
    "create": lambda storage, path: storage.create(f"{path}-2", b"new"),
    "replace": lambda storage, path: storage.replace(path, b"new", storage.version(path) or ""),
    "writer": write_line,
}


@pytest.mark.parametrize("verb", WRITES)
@pytest.mark.parametrize("step", ["make the folder", "open", "fsync", "put in place"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_write_leaves_the_old_file(
    verb: str, step: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is told apart from a broken one: only for the first is there a simple answer."""
    storage = Storage(tmp_path)
    storage.put("a/file", b"old")
    kept = tmp_path / "a"

    def fails(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if step == "open":
            patch.setattr(storage_module, "open", fails, raising=False)
        elif step == "put in place":
            patch.setattr(os, "link" if verb == "create" else "replace", fails)
        else:
            patch.setattr(os, "fsync" if step == "fsync" else "makedirs", fails)
        expected = OSError if code == errno.EIO else StorageFullError
        with pytest.raises(expected) as raised:
            WRITES[verb](storage, "a/file")
    if code != errno.EIO:
        assert str(tmp_path) in str(raised.value)
        assert os.strerror(code).lower() in str(raised.value)
    assert storage.read("a/file") == b"old"
    assert storage.files("a") == ["a/file"]
    assert [path.name for path in kept.iterdir()] == ["file"]
    assert leftovers(tmp_path) == []


def _create(root: str, barrier: Callable[[], int], rounds: int) -> list[int]:
    storage, won = Storage(root), []
    for i in range(rounds):
        barrier()
        if storage.create(f"made/{i}", f"{os.getpid()}-{threading.get_ident()}".encode()):
            won.append(i)
    return won


def test_exactly_one_thread_creates_a_file(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(_create, str(tmp_path), barrier.wait, 40) for _ in range(8)]
    winners = [i for job in jobs for i in job.result()]
    assert sorted(winners) == list(range(40))
    assert leftovers(tmp_path) == []


def _create_here(root: str, barrier: Barrier) -> tuple[int, list[int]]:
    return os.getpid(), _create(root, barrier.wait, 40)


def test_exactly_one_process_creates_a_file(tmp_path: Path) -> None:
    won = dict(in_processes(4, _create_here, str(tmp_path)))
    assert sorted(i for mine in won.values() for i in mine) == list(range(40))
    for pid, mine in won.items():  # and what lies there is the winner's
        for i in mine:
            assert Storage(tmp_path).read(f"made/{i}").decode().startswith(f"{pid}-")


def test_replacing_never_loses_an_update(tmp_path: Path) -> None:
    """Processes that add one to the same number: a stale mark that won would lose a step."""
    storage = Storage(tmp_path)
    storage.put("number", b"00000000")
    refused = in_processes(4, count_up, str(tmp_path), 150)
    assert int(storage.read("number")) == 4 * 150
    assert sum(refused) > 0, "they never met: nothing was tried"
    assert leftovers(tmp_path) == []


def test_each_write_makes_a_mark_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk gives the number of a removed file to a new one, and the clock of many a kernel
    stands still for milliseconds: neither may bring an old mark back."""
    fsync = os.fsync

    def fsync_by_a_slow_clock(file: int) -> None:
        fsync(file)
        tick = time.time_ns() // 10**9 * 10**9
        os.utime(file, ns=(tick, tick))

    monkeypatch.setattr(os, "fsync", fsync_by_a_slow_clock)
    storage = Storage(tmp_path)
    assert storage.version("file") is None
    assert not storage.replace("file", b"x", "any")
    assert not storage.exists("file")
    marks: list[str] = []
    for i in range(300):
        if i % 3 == 0:
            storage.put("file", b"same")
        else:
            assert storage.replace("file", b"same", marks[-1])
        marks.append(str(storage.version("file")))
    assert len(set(marks)) == len(marks)
    for stale in marks[:-1]:
        assert not storage.replace("file", b"stale", stale)
    assert storage.read("file") == b"same"
    storage.delete("file")
    assert not storage.replace("file", b"risen", marks[-1])
    assert storage.create("file", b"same")
    assert not storage.replace("file", b"stale", marks[-1])
    assert storage.replace("file", b"new", str(storage.version("file")))


def test_who_was_frozen_while_it_wrote_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is never broken: its holder may wake up."""
    monkeypatch.setattr(storage_module, "_LOCK_WAIT_S", 0.2)
    storage = Storage(tmp_path)
    storage.put("file", b"old")
    mark = str(storage.version("file"))
    with storage._lock():
        with pytest.raises(StorageError, match=r"\.tmp/lock has been locked .*frozen.*end it"):
            Storage(tmp_path).replace("file", b"new", mark)
        assert storage.read("file") == b"old"
    assert storage.replace("file", b"new", mark)


def test_listings_are_exact(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "data")
    assert storage.files("") == []
    assert storage.files("no/such/folder") == []
    for name in ("tables/a/1", "tables/ab/1", "tables/a/nested/2", "top", "tables/a/ü 😀"):
        storage.put(name, b"x")
    assert storage.files("tables/a") == ["tables/a/1", "tables/a/nested/2", "tables/a/ü 😀"]
    # A half-written file of a killed run is under no folder that anyone lists.
    leave_half(tmp_path)
    assert storage.files("tables") == [
        "tables/a/1", "tables/a/nested/2", "tables/a/ü 😀", "tables/ab/1",
    ]  # fmt: skip
    storage.delete("tables/a")
    storage.delete("tables/a")
    assert storage.files("tables") == ["tables/ab/1"]
    assert storage.exists("top")
    assert not storage.exists("tables/a/1")
    storage.put("tables/b/d/1", b"xyz")
    assert storage.folders("tables") == ["ab", "b"]
    assert storage.folders("tables/ab") == storage.folders("no/such/folder") == []
    assert storage.sizes("tables") == {"tables/ab/1": 1, "tables/b/d/1": 3}


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
    for read in (
        storage.read,
        storage.size,
        lambda n: storage.open(n).__enter__(),
        lambda n: storage.read_range(n, 0, 1),
    ):
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
