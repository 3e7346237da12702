"""The pure function of the engine: (step, shard) -> committed tables.

A plain loop can call it, and so do Ray workers; every guarantee about tables is made here.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fusion_pipeline.dataset.fingerprints import Fingerprint
from fusion_pipeline.dataset.layout import Dataset, TableVersion
from fusion_pipeline.dataset.lease import LeaseError, check_token
from fusion_pipeline.dataset.schemas import SAMPLES, SOURCES, UPSTREAM, stage_schema
from fusion_pipeline.dataset.tables import Footer, TableError, encode_table
from fusion_pipeline.engine.again import Again
from fusion_pipeline.engine.errors import StageError, broken
from fusion_pipeline.engine.stage import ShardBlock, ShardImages, ShardMaker, Source, Stage, Worker
from fusion_pipeline.engine.watch import Watch
from fusion_pipeline.errors import FusionError


class Redo(Enum):
    """Which tables are made again, besides those that are missing."""

    MISSING = "missing"
    """None."""
    STALE = "stale"
    """Those whose input tables have changed since: `--refresh`."""
    FAILED = "failed"
    """Those with failed rows, and what hangs on them; other rows are kept: `--retry-failed`."""


@dataclass(frozen=True)
class Step:
    """A stage or source together with its place in the dataset's lineage."""

    work: Stage | Source
    made_by: Fingerprint
    inputs: Mapping[str, Fingerprint]
    """Fingerprint of each table it reads, `samples` included; empty for a source."""
    artifacts: tuple[str, ...] = ()
    """Artifacts of the same dataset that it reads."""

    @property
    def table(self) -> str:
        """The table whose presence means that this step is done for a shard."""
        return SAMPLES if isinstance(self.work, Source) else self.work.name


@dataclass(frozen=True)
class Place:
    """Where steps read and write: the versions of the tables, and the lease to commit under."""

    dataset: Dataset
    versions: Mapping[str, TableVersion]
    """Of every table that the steps read or write."""
    token: str = ""
    plan: str = ""
    """Digest of the source's plan, if there is a source."""
    run: str = ""
    """Name of the run: its folder in `runs/`."""

    def is_stopping(self) -> bool:
        """Whether the run was asked to end with what it has begun."""
        return bool(self.run) and self.dataset.storage.exists(stop_path(self.run))


ALL_SHARDS = -1
"""Shard number, in a run's log, of a global step."""


@dataclass(frozen=True)
class ShardResult:
    """What one step did with one shard; goes into the run's log, never into a table."""

    step: str
    shard: int
    rows: int
    worked: int
    """Rows that were handed to the worker: neither filtered upstream nor kept from before."""
    failed: int
    """Of those, the rows that failed."""
    seconds: float
    first_error: str | None
    cpu_seconds: float | None = None
    """Of the process that did it; not of a global step."""
    attempt: int = 1
    """One more for each process that was lost over this step and shard."""


def stop_path(run: str) -> str:
    """The file whose presence asks a run, on whatever node it is at work, to come to its end."""
    return f"runs/{run}/stop"


def commit(
    place: Place,
    table: pa.Table,
    name: str,
    shard: int,
    inputs: Mapping[str, str],
    mark: str | None,
) -> None:
    """Put a shard's table in place, as the holder of the lease.

    `mark`: of the file that it replaces (`Storage.version`), None for a new one. Raises LeaseError
    when the lease is lost, or another run wrote something else there.
    """
    storage, version = place.dataset.storage, place.versions[name]
    data, _ = encode_table(table, name, shard, version.made_by, inputs)
    check_token(storage, place.token)
    path = version.path(shard)
    if storage.replace(path, data, mark) if mark else storage.create(path, data):
        return
    # Somebody was faster: a worker of this run that was given up for dead, or of a dead run that
    # made the same version; or it was we, and the answer got lost. The same inputs will do.
    there = place.dataset.read_footer(version, shard)
    if there.inputs != dict(inputs):
        raise LeaseError(f"{storage.full(path)} was written by another run; not committing")


def make_shard(
    place: Place, step: Step, maker: ShardMaker, shard: int, watch: Watch
) -> ShardResult:
    """Make a shard: tar first, `samples` last; that table marks the shard as complete."""
    started, cpu = time.perf_counter(), time.process_time()
    try:
        contents = maker(shard, watch)
    except FusionError:
        raise
    except Exception as error:  # one bad row is in `sources`; this is the source itself
        raise broken(step.work.name, f"broke on shard {shard}", error) from error
    watch.end_row()
    storage, samples = place.dataset.storage, place.versions[SAMPLES]
    check_token(storage, place.token)
    # Unconditional: whoever writes it under this name writes the same bytes.
    storage.put(samples.tar_path(shard), contents.tar)
    commit(place, contents.sources, SOURCES, shard, {}, None)
    commit(place, contents.samples, SAMPLES, shard, {}, None)
    rows = contents.sources.num_rows
    failed, first = _failures(contents.sources)
    # Bad input is expected of a source; it says nothing of the source itself.
    return ShardResult(
        step.work.name,
        shard,
        rows,
        worked=rows,
        failed=0,
        seconds=time.perf_counter() - started,
        first_error=first if failed else None,
        cpu_seconds=time.process_time() - cpu,
    )


def run_stage(
    place: Place,
    step: Step,
    open_worker: Callable[[], Worker],
    shard: int,
    images: ShardImages,
    redo: Redo | Again = Redo.MISSING,
    watch: Watch | None = None,
    halvings: int = 0,
) -> ShardResult | None:
    """Compute and commit one stage's table for one shard; None when there is nothing to do.

    `open_worker` is called only when there is work. Rows that `watch` condemns fail untouched.
    """
    stage, watch = step.work, watch or Watch()
    assert not isinstance(stage, Source)
    started, cpu = time.perf_counter(), time.process_time()
    task = _task(place, step, shard, redo, watch)
    if task is None:
        return None
    block = _block(place.dataset, shard, task, task.todo, images, watch, halvings)
    fresh = _work(stage, open_worker, block)
    table = _splice(stage, task, fresh)
    commit(place, table, stage.name, shard, task.digests, task.mark)
    failed, first = _failures(fresh)
    for row, reason in watch.condemned.items():
        if task.left_out.get(row) == ("failed", reason):
            failed, first = failed + 1, first or reason
    return ShardResult(
        stage.name,
        shard,
        table.num_rows,
        worked=table.num_rows - len(task.kept_rows) - task.upstream,
        failed=failed,
        seconds=time.perf_counter() - started,
        first_error=first,
        cpu_seconds=time.process_time() - cpu,
    )


def pending_block(
    place: Place,
    step: Step,
    shard: int,
    images: ShardImages,
    redo: Redo | Again = Redo.MISSING,
) -> ShardBlock | None:
    """What the stage's worker would get of a shard; None when there is nothing to do."""
    watch = Watch()
    task = _task(place, step, shard, redo, watch)
    return None if task is None else _block(place.dataset, shard, task, task.todo, images, watch, 0)


def examine(
    place: Place,
    step: Step,
    open_worker: Callable[[], Worker],
    shard: int,
    images: ShardImages,
    redo: Redo | Again,
    watch: Watch,
    start: int,
) -> None:
    """Work on each row of a shard alone, from row `start` on, and keep nothing: `watch` shows
    which row it was when this process comes to its end."""
    assert not isinstance(step.work, Source)
    task = _task(place, step, shard, redo, watch)
    if task is None:
        return
    if any(task.todo):
        _ = images.by_key  # read first: its time is not that of the first image
    for row in range(start, len(task.todo)):
        if task.todo[row]:
            watch.begin_row(row)
            alone = [other == row for other in range(len(task.todo))]
            block = _block(place.dataset, shard, task, alone, images, watch, 0)
            _work(step.work, open_worker, block)


@dataclass(frozen=True)
class _Task:
    """What a stage has to do for a shard."""

    mark: str | None
    """Of the table that is to be replaced."""
    tables: Mapping[str, pa.Table]
    digests: Mapping[str, str]
    """Of those tables."""
    todo: Sequence[bool]
    """For each row whether the worker gets it."""
    left_out: Mapping[int, tuple[str, str]]
    """Status and reason of rows that were not ok upstream, or are condemned."""
    kept: pa.Table | None
    """The older table, whose other rows stay."""
    again: str = ""
    """Id of the request that rows are made again for."""

    @property
    def kept_rows(self) -> list[int]:
        rows = range(len(self.todo)) if self.kept is not None else ()
        return [row for row in rows if not self.todo[row] and row not in self.left_out]

    @property
    def upstream(self) -> int:
        return sum(status == "filtered" for status, _ in self.left_out.values())


def _task(place: Place, step: Step, shard: int, redo: Redo | Again, watch: Watch) -> _Task | None:
    dataset, version = place.dataset, place.versions[step.table]
    mark = dataset.storage.version(version.path(shard))  # before all that the new table depends on
    if mark is not None and redo is Redo.MISSING:
        return None
    old = None if mark is None else dataset.read_table(version, shard)
    tables, digests = {}, {}
    for name in step.inputs:
        tables[name], footer = dataset.read_table(place.versions[name], shard)
        digests[name] = footer.digest
    if old is not None and redo is Redo.STALE and old[1].inputs == digests:
        return None
    upstream = _upstream_reasons(tables)
    if isinstance(redo, Again):
        return _asked_again(redo, mark, old, tables, upstream, watch)
    kept = old[0] if old is not None and redo is Redo.FAILED else None
    again = _to_redo(kept) if kept is not None else [True] * len(upstream)
    todo = [reason is None and due for reason, due in zip(upstream, again, strict=True)]
    if old is not None and kept is not None and not any(todo) and old[1].inputs == digests:
        return None  # with other inputs it is written anew, for its lineage, without any work
    left_out = {r: ("filtered", reason) for r, reason in enumerate(upstream) if reason is not None}
    left_out |= _condemned(todo, watch)
    return _Task(mark, tables, digests, todo, left_out, kept)


def _asked_again(
    request: Again,
    mark: str | None,
    old: tuple[pa.Table, Footer] | None,
    tables: Mapping[str, pa.Table],
    upstream: Sequence[str | None],
    watch: Watch,
) -> _Task | None:
    """Only of what is there, and whatever is not chosen stays as it is: so what was made of older
    inputs counts as that, and `--refresh` finds it."""
    if old is None:
        return None
    kept, footer = old
    chosen = zip(upstream, request.chosen(kept), strict=True)
    todo = [reason is None and is_chosen for reason, is_chosen in chosen]
    if not any(todo):
        return None
    left_out = _condemned(todo, watch)
    return _Task(mark, tables, footer.inputs, todo, left_out, kept, request.id)


def _condemned(todo: list[bool], watch: Watch) -> dict[int, tuple[str, str]]:
    """Status and reason of rows that must not be touched: they are no longer to do."""
    found = {row: ("failed", why) for row, why in watch.condemned.items() if todo[row]}
    for row in found:
        todo[row] = False
    return found


def _upstream_reasons(tables: Mapping[str, pa.Table]) -> list[str | None]:
    """For each row None, or `upstream:<table where it first stopped being ok>`."""
    rows = tables[SAMPLES].num_rows
    reasons: list[str | None] = [None] * rows
    for name, table in tables.items():
        for i, (status, reason) in enumerate(
            zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True)
        ):
            if status != "ok" and reasons[i] is None:
                inherited = reason is not None and reason.startswith(UPSTREAM)
                reasons[i] = reason if inherited else f"{UPSTREAM}{name}"
    return reasons


def _to_redo(old: pa.Table) -> list[bool]:
    """Rows that failed here, or that were left out because of an upstream table."""
    pairs = zip(old["status"].to_pylist(), old["reason"].to_pylist(), strict=True)
    return [s == "failed" or (r is not None and r.startswith(UPSTREAM)) for s, r in pairs]


def _block(
    dataset: Dataset,
    shard: int,
    task: _Task,
    todo: Sequence[bool],
    images: ShardImages,
    watch: Watch,
    halvings: int,
) -> ShardBlock:
    mask = pa.array(todo, pa.bool_())
    live = {name: table.filter(mask) for name, table in task.tables.items()}
    return ShardBlock(dataset, shard, live, images, watch, halvings, task.again)


def _work(stage: Stage, open_worker: Callable[[], Worker], block: ShardBlock) -> pa.Table:
    """The worker's table for the rows of the block, checked against the contract."""
    schema = stage_schema(stage.columns)
    if not len(block):
        return schema.empty_table()
    try:
        table = open_worker()(block)
    except TableError:
        raise  # not the stage's fault: an input of it, which the message names
    except Exception as error:  # whatever a stage raises is its own defect: name it, stop
        raise broken(stage.name, f"broke on shard {block.shard}", error) from error
    if table["key"].to_pylist() != block.keys:
        raise StageError(
            f"stage {stage.name!r} returned other rows than it got (shard {block.shard})"
        )
    return table.select(schema.names).cast(schema)


def _splice(stage: Stage, task: _Task, fresh: pa.Table) -> pa.Table:
    """All rows of the shard in order: fresh, left out, or as they were."""
    schema, left_out = stage_schema(stage.columns), task.left_out
    keys = task.tables[SAMPLES]["key"]
    blank: dict[str, Any] = {field.name: [None] * len(left_out) for field in stage.columns}
    blank |= {
        "key": keys.take(pa.array(left_out, pa.int64())).combine_chunks(),
        "status": [status for status, _ in left_out.values()],
        "reason": [reason for _, reason in left_out.values()],
    }
    parts = [fresh, pa.table(blank, schema=schema)]
    position = [row for row, now in enumerate(task.todo) if now] + list(left_out)
    if task.kept is not None:
        parts.append(task.kept.take(pa.array(task.kept_rows, pa.int64())))
        position += task.kept_rows
    order = pc.array_sort_indices(pa.array(position, pa.int64()))
    return pa.concat_tables(parts).take(order).combine_chunks()


def _failures(table: pa.Table) -> tuple[int, str | None]:
    reasons = table.filter(pc.equal(table["status"], "failed"))["reason"].to_pylist()
    return len(reasons), (reasons[0] if reasons else None)
