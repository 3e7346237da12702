"""Every failed row, grouped by table and reason, within a limit that no group can use up alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.schemas import SOURCES, typed

LIMIT = 200
"""Rows listed in one report."""


@dataclass(frozen=True)
class FailedRow:
    shard: int
    identity: str
    """row_id of an input row, key of a sample."""
    origin: str
    """Source and source id, and the URL if there is one; empty for a sample."""
    detail: str
    """The stored reason, whole."""


@dataclass
class FailureGroup:
    table: str
    reason: str
    count: int = 0
    rows: list[FailedRow] = field(default_factory=list)

    @property
    def listed(self) -> int:
        return len(self.rows)


def list_failures(pairs: Iterable[tuple[Dataset, str]], limit: int = LIMIT) -> list[FailureGroup]:
    """Groups in the order of the given (dataset, table) pairs, the largest of a table first.

    `count` is of all rows, `rows` holds those listed. Only shards whose footer counts a failed row
    are read.
    """
    groups: dict[tuple[str, str], FailureGroup] = {}
    for place, (dataset, table) in enumerate(pairs):
        for shard, footer in dataset.footers(table).items():
            if any(name.split(":")[0] == "failed" for name in footer.counts):
                for row in _failed_rows(dataset, table, shard):
                    reason = typed(row.detail)
                    group = groups.setdefault(
                        (f"{place}/{table}", reason), FailureGroup(table, reason)
                    )
                    group.count += 1
                    if len(group.rows) < limit:
                        group.rows.append(row)
    tables = list(dict.fromkeys(place for place, _ in groups))
    ordered = sorted(groups.items(), key=lambda g: (tables.index(g[0][0]), -g[1].count, g[0][1]))
    found = [group for _, group in ordered]
    for group, share in zip(found, _shares([len(g.rows) for g in found], limit), strict=True):
        del group.rows[share:]
    return found


def _failed_rows(dataset: Dataset, table: str, shard: int) -> list[FailedRow]:
    stored, _ = dataset.read_table(table, shard)
    names = ["row_id", "source", "source_id", "url"] if table == SOURCES else ["key"]
    rows = stored.select([*names, "status", "reason"])
    return [
        FailedRow(shard, row.get("row_id") or row["key"], _origin(row), row["reason"] or "")
        for row in rows.filter(pc.equal(rows["status"], "failed")).to_pylist()
    ]


def _origin(row: dict[str, Any]) -> str:
    if "source" not in row:
        return ""
    place = f"{row['source']} · {row['source_id']}"
    return f"{place} · {row['url']}" if row["url"] else place


def _shares(sizes: Sequence[int], limit: int) -> list[int]:
    """How many rows each group lists: a small group all of its rows, the large ones alike."""
    shares = [0] * len(sizes)
    left = limit
    for rank, place in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        shares[place] = min(sizes[place], left // (len(sizes) - rank))
        left -= shares[place]
    return shares
