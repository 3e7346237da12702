"""The pure function of the engine: (step, shard) -> committed tables.

A plain loop can call it, and so do Ray workers; every guarantee about tables is made here.
"""

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fusion_pipeline.dataset.fingerprints import Fingerprint
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import check_token
from fusion_pipeline.dataset.schemas import SAMPLES, SOURCES, UPSTREAM, stage_schema
from fusion_pipeline.dataset.tables import encode_table
from fusion_pipeline.engine.stage import ShardBlock, ShardImages, ShardMaker, Source, Stage, Worker
from fusion_pipeline.errors import FusionError


class StageError(FusionError):
    """A stage is broken (not one of its samples): the run stops."""


def broken(stage: str, what: str, error: BaseException) -> StageError:
    """An error that names the stage, the cause, and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return StageError(
        f"stage {stage!r} {what}: {type(error).__name__}: {error} "
        f"(raised at {frame.filename}:{frame.lineno})"
    )


@dataclass(frozen=True)
class Step:
    """A stage or source together with its place in the dataset's lineage."""

    work: Stage | Source
    made_by: Fingerprint
    inputs: Mapping[str, Fingerprint]
    """Fingerprint of each table it reads, `samples` included; empty for a source."""

    @property
    def table(self) -> str:
        """The table whose presence means that this step is done for a shard."""
        return SAMPLES if isinstance(self.work, Source) else self.work.name


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


def commit(
    dataset: Dataset,
    token: str,
    table: pa.Table,
    name: str,
    shard: int,
    made_by: Fingerprint,
    inputs: Mapping[str, str],
) -> None:
    """Put a shard's table in place, as the holder of the lease."""
    data, _ = encode_table(table, name, shard, made_by, inputs)
    check_token(dataset.storage, token)
    dataset.storage.put(dataset.table_path(name, shard), data)


def make_shard(
    dataset: Dataset, step: Step, maker: ShardMaker, shard: int, token: str
) -> ShardResult:
    """Make a shard: tar first, `samples` last; that table marks the shard as complete."""
    started = time.perf_counter()
    try:
        contents = maker(shard)
    except FusionError:
        raise
    except Exception as error:  # one bad row is in `sources`; this is the source itself
        raise broken(step.work.name, f"broke on shard {shard}", error) from error
    check_token(dataset.storage, token)
    dataset.storage.put(dataset.shard_path(shard), contents.tar)
    commit(dataset, token, contents.sources, SOURCES, shard, step.made_by, {})
    commit(dataset, token, contents.samples, SAMPLES, shard, step.made_by, {})
    rows = contents.sources.num_rows
    failed, first = _failures(contents.sources)
    seconds = time.perf_counter() - started
    # Bad input is expected of a source; it says nothing of the source itself.
    return ShardResult(step.work.name, shard, rows, rows, 0, seconds, first if failed else None)


def run_stage(
    dataset: Dataset,
    step: Step,
    open_worker: Callable[[], Worker],
    shard: int,
    token: str,
    images: ShardImages,
    retry_failed: bool = False,
) -> ShardResult | None:
    """Compute and commit one stage's table for one shard.

    With `retry_failed`, rows that are already there and did not fail are kept as they are; None
    when no row is to be done again. `open_worker` is called only when there is work.
    """
    stage = step.work
    assert not isinstance(stage, Source)
    started = time.perf_counter()
    tables, digests = {}, {}
    for name, made_by in step.inputs.items():
        tables[name], footer = dataset.read_table(name, shard, made_by)
        digests[name] = footer.digest
    skipped = _upstream_reasons(tables)
    old = _previous(dataset, step, shard) if retry_failed else None
    todo = [reason is None for reason in skipped]
    if old is not None:
        todo = [live and redo for live, redo in zip(todo, _to_redo(old), strict=True)]
        if not any(todo):
            return None
    fresh = _work(dataset, stage, open_worker, shard, tables, pa.array(todo, pa.bool_()), images)
    table = _splice(stage, tables[SAMPLES]["key"], skipped, todo, fresh, old)
    commit(dataset, token, table, stage.name, shard, step.made_by, digests)
    failed, first = _failures(fresh)
    seconds = time.perf_counter() - started
    return ShardResult(stage.name, shard, table.num_rows, fresh.num_rows, failed, seconds, first)


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


def _previous(dataset: Dataset, step: Step, shard: int) -> pa.Table | None:
    try:
        return dataset.read_table(step.table, shard, step.made_by)[0]
    except FileNotFoundError:
        return None


def _to_redo(old: pa.Table) -> list[bool]:
    """Rows that failed here, or that were left out because of an upstream table."""
    pairs = zip(old["status"].to_pylist(), old["reason"].to_pylist(), strict=True)
    return [s == "failed" or (r is not None and r.startswith(UPSTREAM)) for s, r in pairs]


def _work(
    dataset: Dataset,
    stage: Stage,
    open_worker: Callable[[], Worker],
    shard: int,
    tables: Mapping[str, pa.Table],
    todo: pa.BooleanArray,
    images: ShardImages,
) -> pa.Table:
    """The worker's table for the rows of `todo`, checked against the contract."""
    schema = stage_schema(stage.columns)
    live = {name: table.filter(todo) for name, table in tables.items()}
    block = ShardBlock(dataset, shard, live, images)
    if not len(block):
        return schema.empty_table()
    try:
        table = open_worker()(block)
    except Exception as error:  # whatever a stage raises is its own defect: name it, stop
        raise broken(stage.name, f"broke on shard {shard}", error) from error
    if table["key"].to_pylist() != block.keys:
        raise StageError(f"stage {stage.name!r} returned other rows than it got (shard {shard})")
    return table.select(schema.names).cast(schema)


def _splice(
    stage: Stage,
    keys: pa.ChunkedArray,
    skipped: list[str | None],
    todo: list[bool],
    fresh: pa.Table,
    old: pa.Table | None,
) -> pa.Table:
    """All rows of the shard in order: fresh, kept from `old`, or filtered upstream."""
    schema = stage_schema(stage.columns)
    left_out = [i for i, reason in enumerate(skipped) if reason is not None]
    blank: dict[str, Any] = {field.name: [None] * len(left_out) for field in stage.columns}
    blank |= {
        "key": keys.take(pa.array(left_out, pa.int64())).combine_chunks(),
        "status": ["filtered"] * len(left_out),
        "reason": [skipped[i] for i in left_out],
    }
    parts = [fresh, pa.table(blank, schema=schema)]
    position = [i for i, now in enumerate(todo) if now] + left_out
    if old is not None:
        kept = [i for i in range(len(todo)) if not todo[i] and skipped[i] is None]
        parts.append(old.take(pa.array(kept, pa.int64())))
        position += kept
    order = pc.array_sort_indices(pa.array(position, pa.int64()))
    return pa.concat_tables(parts).take(order).combine_chunks()


def _failures(table: pa.Table) -> tuple[int, str | None]:
    reasons = table.filter(pc.equal(table["status"], "failed"))["reason"].to_pylist()
    return len(reasons), (reasons[0] if reasons else None)
