"""Rows in = rows out: the funnel of a dataset, from the counts in its footers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.tables import Footer


@dataclass
class TableCounts:
    """Rows of one table over all its shards."""

    table: str
    shards: int = 0
    rows: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    """`ok`, `filtered:short_edge`, `failed:corrupt`, `filtered:upstream:<table>`, ..."""

    @property
    def ok(self) -> int:
        return self.by_status["ok"]

    def total(self, status: str) -> int:
        return sum(n for name, n in self.by_status.items() if name.split(":")[0] == status)

    def not_ok(self) -> list[tuple[str, int]]:
        """(status and reason, rows), most rows first."""
        found = [(name, n) for name, n in self.by_status.items() if name != "ok"]
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))

    def as_dict(self) -> dict[str, Any]:
        counts = dict(sorted(self.by_status.items()))
        return {"table": self.table, "shards": self.shards, "rows": self.rows, "counts": counts}


def funnel(dataset: Dataset, tables: Sequence[str]) -> list[TableCounts]:
    """Counts of those of the tables that exist, in the given order (that of the data flow)."""
    if not dataset.exists:
        return []
    there = set(dataset.table_names())
    return [count_table(dataset, table) for table in tables if table in there]


def count_table(dataset: Dataset, table: str) -> TableCounts:
    return count_rows(table, dataset.footers(table))


def count_rows(table: str, footers: Mapping[int, Footer]) -> TableCounts:
    """Of a table with these footers, by shard."""
    counts = TableCounts(table)
    for footer in footers.values():
        counts.shards += 1
        counts.rows += footer.rows
        counts.by_status.update(footer.counts)
    return counts
