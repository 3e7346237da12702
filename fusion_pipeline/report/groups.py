"""Duplicate groups: a row that stands for others, and the rows that were dropped for it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fusion_pipeline.dataset.images import DecodeError
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.schemas import SAMPLES
from fusion_pipeline.report.draw import Draw
from fusion_pipeline.report.pictures import Picture, read_picture

THUMB_SIDE = 280
"""Pixels of a thumbnail's long side."""
MEMBERS = 5
"""Dropped rows shown of one group."""
_DEPTH = 3
"""Steps from a dropped row to the kept one: exact copy of a near-exact copy of a semantic one. The
released SemDeDup rule can make longer chains; their ends are shown as groups of their own."""

Row = dict[str, Any]
"""Of `selection` and `samples` of the pool, with the `shard`."""


@dataclass(frozen=True)
class Member:
    key: str
    reason: str
    """Empty for a selected row, else why it was left out: near_exact_copy, over_budget, ..."""
    similarity: float | None
    """Cosine to the row that it was dropped for."""
    depth: int
    """0: the group's first; 1: dropped for it; 2: dropped for the member shown before, ..."""
    width: int
    height: int
    bytes: int
    format: str
    picture: Picture | None


@dataclass(frozen=True)
class Group:
    members: tuple[Member, ...]
    """The kept row first (it may have been left out over budget), then those dropped for it, the
    most alike first; each is followed by those dropped for it in turn."""
    hidden: int
    """Further dropped rows, not shown."""


@dataclass
class _Dropped:
    """Rows that were dropped for one row."""

    rows: list[Row] = field(default_factory=list)
    hidden: int = 0

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.rows.sort(key=lambda r: (-r["similarity"], r["key"], r["shard"]))
        self.hidden += len(self.rows[MEMBERS:])
        del self.rows[MEMBERS:]


def make_groups(pool: Dataset, count: int, seed: int) -> list[Group]:
    """Up to `count` groups, drawn by the hash of the key that others were dropped for and spread
    over the reasons, large ones first. A few passes over `selection`; memory O(groups shown)."""
    draw = Draw(count, seed)
    for _, table in pool.iterate("selection"):
        copies = table.filter(pc.is_valid(table["same_as"]))
        for reason, key in zip(
            copies["reason"].to_pylist(), copies["same_as"].to_pylist(), strict=True
        ):
            draw.add(reason, key)
    heads = _find_heads(pool, draw.keys())
    dropped: dict[str, _Dropped] = {}
    level = list(heads)
    for _ in range(_DEPTH):
        found = _find_dropped(pool, [key for key in level if key not in dropped])
        dropped |= found
        level = [row["key"] for group in found.values() for row in group.rows]
    groups = [_group(pool, head, dropped) for head in heads.values()]
    return sorted(groups, key=lambda group: -len(group.members))


def _find_heads(pool: Dataset, keys: list[str]) -> dict[str, Row]:
    """The kept rows that the rows of these keys lead to, in the order of the keys."""
    top = {key: key for key in keys}
    rows: dict[str, Row] = {}
    for _ in range(_DEPTH):
        for row in _rows(pool, "key", [key for key in top.values() if key not in rows]):
            # One key may lie in the pool twice; the exact copy isn't the row that stands for it.
            if row["reason"] != "exact_copy":
                rows[row["key"]] = row
        top = {key: rows[head]["same_as"] or head for key, head in top.items() if head in rows}
    return {head: rows[head] for head in top.values() if head in rows}


def _find_dropped(pool: Dataset, keys: list[str]) -> dict[str, _Dropped]:
    found = {key: _Dropped() for key in keys}
    for row in _rows(pool, "same_as", keys):
        found[row["same_as"]].add(row)
    return found


def _rows(pool: Dataset, column: str, values: list[str]) -> Iterator[Row]:
    """Rows of the pool with one of the values in a column of `selection`."""
    wanted = pa.array(values, pa.string())
    for shard, table in pool.iterate("selection") if values else ():
        places = pc.indices_nonzero(pc.is_in(table[column], value_set=wanted))
        if len(places):
            samples, _ = pool.read_table(SAMPLES, shard)
            pairs = zip(
                samples.take(places).to_pylist(), table.take(places).to_pylist(), strict=True
            )
            yield from ({**sample, **decided, "shard": shard} for sample, decided in pairs)


def _group(pool: Dataset, head: Row, dropped: dict[str, _Dropped]) -> Group:
    rows, hidden = _descend(head, 0, dropped)
    shown = rows[: MEMBERS + 1]
    members = tuple(_member(pool, row, depth) for row, depth in shown)
    return Group(members, hidden + len(rows) - len(shown))


def _descend(
    row: Row, depth: int, dropped: dict[str, _Dropped]
) -> tuple[list[tuple[Row, int]], int]:
    """A row and all that were dropped for it, in the order shown, and how many were not kept."""
    rows, hidden = [(row, depth)], 0
    # The exact copy of a row has its key: what was dropped for the row isn't listed again.
    own = dropped.get(row["key"]) if row["reason"] != "exact_copy" else None
    if own is not None:
        hidden = own.hidden
        for child in own.rows:
            below, more = _descend(child, depth + 1, dropped)
            rows += below
            hidden += more
    return rows, hidden


def _member(pool: Dataset, row: Row, depth: int) -> Member:
    try:
        picture = read_picture(pool, row["shard"], row, THUMB_SIDE)
    except DecodeError:
        picture = None
    return Member(
        key=row["key"],
        reason=row["reason"] or "",
        similarity=row["similarity"],
        depth=depth,
        width=row["width"],
        height=row["height"],
        bytes=row["image_bytes"],
        format=row["format"],
        picture=picture,
    )
