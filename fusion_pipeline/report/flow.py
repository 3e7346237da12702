"""The way of the rows through the tables: how many went in, how many stopped where, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from fusion_pipeline.dataset.accounting import TableCounts, count_table
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.schemas import SAMPLES, SOURCES, UPSTREAM

POOL_TABLES = (SOURCES, SAMPLES, "resolution", "embeddings", "clusters", "selection")


@dataclass(frozen=True)
class Reason:
    kind: str
    """filtered or failed."""
    name: str
    """Typed, without detail."""
    rows: int


@dataclass(frozen=True)
class Bar:
    """One table of the funnel."""

    table: str
    rows: int
    ok: int
    stopped_before: int
    """Rows that were not ok in a table before this one."""
    reasons: tuple[Reason, ...]
    """Of the rows that stopped here, most rows first."""
    whole: int
    """Rows that the full width of the bar stands for."""
    pending: int
    """Rows of shards for which this table is not there yet."""
    lost: int
    """Rows that should be here and are not; anything but 0 is a defect."""

    def stopped(self, kind: str) -> int:
        return sum(reason.rows for reason in self.reasons if reason.kind == kind)


@dataclass(frozen=True)
class Outcome:
    kind: str
    """ok, filtered, failed, or pending (its step has not run yet)."""
    label: str
    rows: int


@dataclass(frozen=True)
class Ledger:
    """Where every input row ended. Each figure is counted on its own, so that a row that vanished
    shows: the sum is then not the number of input rows."""

    rows: int
    outcomes: tuple[Outcome, ...]

    @property
    def total(self) -> int:
        return sum(outcome.rows for outcome in self.outcomes)

    @property
    def balanced(self) -> bool:
        return self.total == self.rows and all(outcome.rows > 0 for outcome in self.outcomes)


@dataclass(frozen=True)
class Funnel:
    pool: tuple[Bar, ...]
    selected: tuple[Bar, ...]
    ledger: Ledger
    input_rows: int
    samples: int
    chosen: int
    captioned: int
    failed: int
    """Failed rows of all tables."""


def count_funnel(
    pool: Dataset,
    selected: Dataset,
    evidence: Sequence[str],
    prompts: str,
    captions: str,
    sample: Sequence[str] = (),
) -> Funnel:
    """Counts of all tables in data-flow order, from their footers; `samples` of the pool is read.

    `sample`: the table of the rows drawn for captions, if there is one. Memory: O(shards).
    """
    before = {name: count_table(pool, name) for name in POOL_TABLES}
    names = (SAMPLES, *evidence, "hints", prompts, *sample, captions)
    after = {name: count_table(selected, name) for name in names}
    rows, packed = before[SOURCES].rows, after[SAMPLES].rows
    return Funnel(
        pool=tuple(_bar(pool, count, rows) for count in before.values()),
        selected=tuple(_bar(selected, count, packed) for count in after.values()),
        ledger=_ledger(pool, selected, before, after, captions),
        input_rows=rows,
        samples=before[SAMPLES].rows,
        chosen=before["selection"].ok,
        captioned=after[captions].ok,
        failed=sum(count.total("failed") for count in (*before.values(), *after.values())),
    )


def _bar(dataset: Dataset, count: TableCounts, whole: int) -> Bar:
    upstream = sum(n for name, n in count.by_status.items() if f":{UPSTREAM}" in name)
    pending, expected = _pending(dataset, count.table), count.rows
    if count.table not in (SOURCES, SAMPLES):
        expected = count_table(dataset, SAMPLES).rows
    return Bar(
        table=count.table,
        rows=count.rows,
        ok=count.ok,
        stopped_before=upstream,
        reasons=_own_reasons(count),
        whole=max(whole, 1),
        pending=pending,
        lost=expected - count.rows - pending,
    )


def _pending(dataset: Dataset, table: str) -> int:
    """Samples of the shards for which a table is not there yet."""
    if table in (SOURCES, SAMPLES):
        return 0
    left = dataset.shards_of(SAMPLES) - dataset.shards_of(table)
    return sum(dataset.read_footer(SAMPLES, shard).rows for shard in left)


def _own_reasons(count: TableCounts) -> tuple[Reason, ...]:
    return tuple(reason for reason in _stops(count) if not reason.name.startswith(UPSTREAM))


def _stops(count: TableCounts) -> list[Reason]:
    """Rows that are not ok by reason, most rows first."""
    split = (Reason(*name.partition(":")[::2], rows) for name, rows in count.by_status.items())
    found = [reason for reason in split if reason.kind != "ok"]
    return sorted(found, key=lambda r: (-r.rows, r.kind, r.name))


def _ledger(
    pool: Dataset,
    selected: Dataset,
    before: dict[str, TableCounts],
    after: dict[str, TableCounts],
    captions: str,
) -> Ledger:
    outcomes = [
        *_not_ok(SOURCES, before),
        Outcome("filtered", "same bytes as another row of its shard", _merged(pool)),
        *_not_ok("selection", before),
        Outcome("pending", "not selected yet", _pending(pool, "selection")),
        Outcome("pending", "not packed yet", before["selection"].ok - after[SAMPLES].rows),
        *_not_ok(captions, after),
        Outcome("pending", "not captioned yet", _pending(selected, captions)),
        Outcome("ok", "captioned", after[captions].ok),
    ]
    return Ledger(before[SOURCES].rows, tuple(o for o in outcomes if o.rows))


def _merged(pool: Dataset) -> int:
    """Input rows that share a sample with an earlier one, counted in `samples`."""
    merged = 0
    for _, samples in pool.iterate(SAMPLES):
        merged += (pc.sum(pc.list_value_length(samples["row_ids"])).as_py() or 0) - samples.num_rows
    return merged


def _not_ok(table: str, counts: Mapping[str, TableCounts]) -> list[Outcome]:
    """A row that stopped before this table is listed with the reason of that table, where there is
    but one."""
    outcomes = []
    for reason in _stops(counts[table]):
        if reason.name.startswith(UPSTREAM):
            name = reason.name.removeprefix(UPSTREAM)
            there = _own_reasons(counts[name]) if name in counts else ()
            kinds = {other.kind for other in there}
            kind = kinds.pop() if len(kinds) == 1 else reason.kind
            label = there[0].name if len(there) == 1 else f"stopped at {name}"
            outcomes.append(Outcome(kind, label, reason.rows))
        else:
            outcomes.append(Outcome(reason.kind, reason.name, reason.rows))
    return outcomes
