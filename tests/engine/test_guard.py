"""Images that take their process down: one row each, with its reason; the others intact."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.engine.chain import Chain
from fusion_pipeline.engine.errors import StageError
from fusion_pipeline.engine.guard import Guard, Incident, Limits
from fusion_pipeline.engine.shard import ShardResult
from fusion_pipeline.engine.stage import Resources, ShardBlock, ShardContents
from fusion_pipeline.engine.watch import Watch
from tests.toy import ROWS, ToySource, ToyStage, path_of, png, run_toy, toy_steps

LIMITS = Limits(memory_bytes=600 * 2**20, stall_s=4.0, image_s=2.0)
PATIENT = replace(LIMITS, stall_s=60.0, image_s=60.0)
"""A busy machine may need seconds to overflow a stack."""


def segfault() -> None:
    ctypes.string_at(0)


def recurse() -> None:
    """Overflows the C stack, which no exception stops."""
    sys.setrecursionlimit(10**9)
    nested: list[object] = []
    for _ in range(3 * 10**5):
        nested = [nested]
    repr(nested)
    ctypes.string_at(0)  # should a later Python survive that


def eat_memory() -> None:
    kept = []
    while True:
        kept.append(bytearray(os.urandom(1024)) * 2**14)  # 16 MB, every page touched


def hang() -> None:
    time.sleep(3600)


def leave() -> None:
    os._exit(3)


def kill_from_outside() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


HOW: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (segfault, recurse, eat_memory, hang, leave, kill_from_outside)
}


@dataclass(frozen=True)
class Deadly(ToyStage):
    """Like any toy stage, but some images of shard 1 are its end."""

    name: str = "a"
    kills: tuple[tuple[int, str], ...] = ()
    """Row and how."""
    once: str | None = None
    """A file: while it is there nobody dies."""
    only_together: bool = False
    """Only when it comes with other images."""

    def work(self, block: ShardBlock) -> pa.Table:
        deadly = {png(1, row): how for row, how in self.kills}
        for image in block.images:
            if image not in deadly or (self.once and Path(self.once).exists()):
                continue
            if self.only_together and len(block) == 1:
                continue
            if self.once:
                Path(self.once).touch()
            HOW[deadly[image]]()
        return super().work(block)


@dataclass(frozen=True)
class DeadlySource(ToySource):
    row: int = 2
    how: str = "segfault"

    def make(self, shard: int, watch: Watch) -> ShardContents:
        for row in range(ROWS):
            if watch.begin_row(row) is None and (shard, row) == (1, self.row):
                HOW[self.how]()
        return super().make(shard, watch)


def guarded(
    root: Path, stage: ToyStage, limits: Limits = LIMITS, shards: Sequence[int] = (0, 1, 2)
) -> list[ShardResult | Incident]:
    def run(chain: Chain, todo: Sequence[int]) -> Iterator[ShardResult | Incident]:
        guard = Guard(chain, limits)
        try:
            for shard in todo:
                yield from guard.run(shard)
        finally:
            guard.close()

    found: list[ShardResult | Incident] = list(
        run_toy(root, shards, toy_steps(first=stage), run)  # type: ignore[arg-type]
    )
    return found


def rows_of(root: Path, table: str, shard: int) -> list[dict[str, object]]:
    return Dataset.open(root).read_table(table, shard)[0].to_pylist()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("segfault", "killed_worker: SIGSEGV"),
        ("recurse", "killed_worker: SIGSEGV"),
        ("eat_memory", "killed_worker: memory"),
        ("hang", "killed_worker: silent"),
        ("leave", "killed_worker: exit status 3"),
    ],
)
def test_a_deadly_image_is_one_row(how: str, reason: str, tmp_path: Path) -> None:
    limits = LIMITS if how == "hang" else PATIENT
    found = guarded(tmp_path / "sick", Deadly(kills=((4, how),)), limits)
    row = rows_of(tmp_path / "sick", "a", 1)[4]
    assert (row["status"], row["reason"], row["value"]) == ("failed", reason, None)
    run_toy(tmp_path / "well", range(3), toy_steps(first=Deadly()))
    for table in ("a", "b", "nested/c"):
        for shard in range(3):
            sick, well = (rows_of(tmp_path / root, table, shard) for root in ("sick", "well"))
            others = [r for r in range(ROWS) if (shard, r) != (1, 4)]
            assert [sick[r] for r in others] == [well[r] for r in others]
    assert rows_of(tmp_path / "sick", "b", 1)[4]["reason"] == "upstream:a"
    incidents = [f for f in found if isinstance(f, Incident)]
    assert incidents[-1].verdict == "condemned"
    assert [i.row for i in incidents if i.row is not None] == [4, 4]
    assert all((i.step, i.shard) == ("a", 1) for i in incidents)
    assert len(incidents) <= 4
    (result,) = (f for f in found if isinstance(f, ShardResult) and (f.step, f.shard) == ("a", 1))
    assert (result.worked, result.failed, result.attempt) == (ROWS, 1, 1 + len(incidents))


def test_the_stack_of_a_hanging_image_is_told(tmp_path: Path) -> None:
    found = guarded(tmp_path, Deadly(kills=((0, "hang"),)))
    stacks = [f.stack for f in found if isinstance(f, Incident)]
    assert all("in hang" in stack and "in examine" in stack for stack in stacks[1:])


def test_many_kinds_in_one_shard(tmp_path: Path) -> None:
    kills = ((1, "segfault"), (2, "hang"), (5, "leave"))
    guarded(tmp_path, Deadly(kills=kills))
    reasons = [row["reason"] for row in rows_of(tmp_path, "a", 1)]
    assert reasons == [
        None, "killed_worker: SIGSEGV", "killed_worker: silent", None, None,
        "killed_worker: exit status 3",
    ]  # fmt: skip


def test_a_kill_from_outside_is_blamed_on_nobody(tmp_path: Path) -> None:
    stage = Deadly(kills=((3, "kill_from_outside"),), once=str(tmp_path / "happened"))
    found = guarded(tmp_path / "d", stage)
    assert [(i.cause, i.verdict) for i in found if isinstance(i, Incident)] == [
        ("SIGKILL", "again")
    ]
    assert all(row["status"] == "ok" for row in rows_of(tmp_path / "d", "a", 1))


def test_restarts_end(tmp_path: Path) -> None:
    """No single image does it, so none is blamed; the run stops and says where."""
    stage = Deadly(kills=((3, "segfault"),), only_together=True)
    with pytest.raises(
        StageError, match=r"'a' lost its process 6 times.*shard 1: SIGSEGV at File.*string_at"
    ):
        guarded(tmp_path, stage)
    assert Dataset.open(tmp_path).shards_of("a") == {0}


def test_a_stage_that_dies_on_everything_is_to_blame_itself(tmp_path: Path) -> None:
    kills = tuple((row, "leave") for row in range(ROWS))
    with pytest.raises(StageError, match="'a' lost a process on 5 images on shard 1"):
        guarded(tmp_path, Deadly(kills=kills))


@pytest.mark.parametrize(("how", "cause"), [("segfault", "SIGSEGV"), ("hang", "silent for 2 s")])
def test_ingest_survives_its_images(how: str, cause: str, tmp_path: Path) -> None:
    """A source tells which row it is at, so it needs no examination."""
    dataset = Dataset.create(tmp_path)
    source = DeadlySource(how=how)
    with hold_lease(dataset.storage, "test") as token:
        chain = Chain.resolve(dataset, toy_steps(source=source)[:1]).under(token)
        chain.describe()
        guard = Guard(chain, LIMITS)
        found = list(guard.run(1))
        guard.close()
    incidents = [f for f in found if isinstance(f, Incident)]
    assert [(i.row, i.cause, i.verdict) for i in incidents] == [
        (2, cause, "again"),
        (2, cause, "condemned"),
    ]
    assert dataset.shards_of("samples") == {1}


@dataclass(frozen=True)
class DiesAfterItsRows(ToySource):
    """While it reads on, or packs: no image's doing."""

    def make(self, shard: int, watch: Watch) -> ShardContents:
        for row in range(ROWS):
            watch.begin_row(row)
            watch.end_row()
        leave()
        return super().make(shard, watch)


@dataclass(frozen=True)
class DiesAtACondemnedRow(ToySource):
    """Its fault is elsewhere: it dies whether the row is touched or not."""

    def make(self, shard: int, watch: Watch) -> ShardContents:
        watch.begin_row(3)
        leave()
        return super().make(shard, watch)


@pytest.mark.parametrize("source", [DiesAfterItsRows(), DiesAtACondemnedRow()])
def test_restarts_of_a_source_end(source: ToySource, tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path)
    with hold_lease(dataset.storage, "test") as token:
        chain = Chain.resolve(dataset, toy_steps(source=source)[:1]).under(token)
        chain.describe()
        guard = Guard(chain, LIMITS)
        with pytest.raises(StageError, match="'toy-source' lost its process 6 times, by no one im"):
            list(guard.run(0))
        guard.close()


def test_what_is_paid_for_is_not_examined(tmp_path: Path) -> None:
    paid = replace(Deadly(kills=((3, "leave"),)), resources=Resources(is_free=False))
    with pytest.raises(StageError, match="'a' lost its process 6 times"):
        guarded(tmp_path, paid)


def test_errors_of_files_and_libraries_are_named(tmp_path: Path) -> None:
    """Outside of the stage's own work: here its input is gone."""
    run_toy(tmp_path, range(2), toy_steps(first=Deadly())[:2])
    dataset = Dataset.open(tmp_path)
    path = path_of(dataset, "samples", 1)
    path.unlink()
    path.mkdir()
    with hold_lease(dataset.storage, "test") as token:
        chain = Chain.resolve(dataset, toy_steps(first=Deadly())[2:]).under(token)
        chain.describe()
        guard = Guard(chain, LIMITS)
        with pytest.raises(StageError, match="stage 'b' broke: IsADirectoryError"):
            list(guard.run(1))
        guard.close()


@dataclass(frozen=True)
class Hungry(ToyStage):
    """A model on a device with room for so many images at a time."""

    name: str = "a"
    room: int = 1
    batch: int = 8
    error: str = "OutOfMemoryError"

    def work(self, block: ShardBlock) -> pa.Table:
        size = max(1, self.batch >> block.halvings)
        if size > self.room:
            # What torch raises, and ONNX Runtime: told by name and text, neither is here.
            if self.error == "OutOfMemoryError":
                raise type(self.error, (RuntimeError,), {})("CUDA out of memory. Tried ...")
            raise RuntimeError(self.error)
        return super().work(block)


def test_a_full_device_halves_the_batches(tmp_path: Path) -> None:
    found = guarded(tmp_path, Hungry(room=2), shards=[0])
    assert [i.verdict for i in found if isinstance(i, Incident)] == ["smaller batches"] * 2
    assert all(row["status"] == "ok" for row in rows_of(tmp_path, "a", 0))


def test_device_errors_never_become_rows(tmp_path: Path) -> None:
    for error in ("OutOfMemoryError", "CUDA error: an illegal memory access was encountered"):
        with pytest.raises(StageError, match="CUDA"):
            guarded(tmp_path, Hungry(room=0, error=error), shards=[0])
        assert Dataset.open(tmp_path).shards_of("a") == set()


def test_models_that_kill_while_they_load(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(
        StageError, match=r"toy-source, a, b.*died 3 times while it loaded.*SIGSEGV"
    ):
        guarded(tmp_path, DiesAtBirth("a"))
    assert time.monotonic() - started < 60


@dataclass(frozen=True)
class DiesAtBirth(ToyStage):
    def open(self) -> Callable[[ShardBlock], pa.Table]:
        segfault()
        return self.work


def test_no_child_outlives_its_supervisor(tmp_path: Path) -> None:
    """The supervisor is killed; whoever works for it ends at once, in the middle of a shard."""
    code = f"""
from pathlib import Path
from tests.engine.test_guard import Deadly, guarded
guarded(Path({str(tmp_path)!r}), Deadly(pause=60))
"""
    driver = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not list(tmp_path.rglob("*.tar")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(driver.pid).children(recursive=True)
    assert children
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_a_guarded_run_gives_the_bytes_of_the_plain_loop(tmp_path: Path) -> None:
    from tests.toy import files_of

    run_toy(tmp_path / "plain", range(3), toy_steps(first=Deadly()))
    guarded(tmp_path / "guarded", replace(Deadly(), pause=0.0))
    assert files_of(tmp_path / "guarded") == files_of(tmp_path / "plain")
