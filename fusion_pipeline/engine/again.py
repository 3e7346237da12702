"""Rows of a finished table that somebody asks for again: those for which an SQL expression holds.

runs/again/<table>/request.json     what was asked for
runs/again/<table>/<id>/00000012    a shard for which it is done

A request is open until all of its shards are done: the same request, made again after a kill, goes
on with those that are left (docs/decisions/007).
"""

import contextlib
import json
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.schemas import UPSTREAM, stage_schema
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.errors import FusionError


class WhereError(FusionError):
    """An expression that SQLite can't evaluate over the rows of a table."""

    def __init__(self, where: str, columns: Sequence[str], why: str) -> None:
        super().__init__(f"--where {where!r}: {why}; columns: {', '.join(columns)}")


@dataclass(frozen=True)
class Again:
    """A request: rows of a table that are made again, while all others stay as they are."""

    table: str
    folder: str
    """Of the table's version: rows of another one were never meant."""
    where: str
    """SQL, over the table's columns; lists are JSON."""
    limit: int | None
    """`--limit` of the run."""
    id: str

    @classmethod
    def find(cls, dataset: Dataset, table: str, where: str, limit: int | None) -> "Again":
        """The same request if it is open, else a new one. Raises NoTableError."""
        wanted = cls(table, dataset.version(table).folder, where, limit, uuid.uuid4().hex[:12])
        there = cls.of(dataset, table)
        return there if there and replace(there, id=wanted.id) == wanted else wanted

    @classmethod
    def of(cls, dataset: Dataset, table: str) -> "Again | None":
        """The request that is open for a table."""
        try:
            return cls(**json.loads(dataset.storage.read(f"{_place(table)}/request.json")))
        except FileNotFoundError:
            return None

    def begin(self, dataset: Dataset) -> "Again":
        """Write it down, in place of another one. Only under the lease."""
        found = self.find(dataset, self.table, self.where, self.limit)
        if self.of(dataset, self.table) != found:
            self.close(dataset.storage)
            content = json.dumps(asdict(found)).encode()
            dataset.storage.put(f"{_place(self.table)}/request.json", content)
        return found

    def close(self, storage: Storage) -> None:
        storage.delete(f"{_place(self.table)}/request.json")  # first: what is left means nothing
        storage.delete(_place(self.table))

    def mark_done(self, storage: Storage, shard: int) -> None:
        storage.put(self._mark(shard), b"")

    def is_done(self, storage: Storage, shard: int) -> bool:
        return storage.exists(self._mark(shard))

    def _mark(self, shard: int) -> str:
        return f"{_place(self.table)}/{self.id}/{shard:08d}"

    def done(self, storage: Storage) -> set[int]:
        """Shards that need not be looked at any more."""
        paths = storage.files(f"{_place(self.table)}/{self.id}")
        return {int(path.rsplit("/", 1)[1]) for path in paths}

    def chosen(self, table: pa.Table) -> list[bool]:
        """For each row of a shard's table whether it is to be made again; rows that were left out
        upstream can't be. Raises WhereError."""
        places = _places(self.where, table)
        reasons = table["reason"].to_pylist()
        return [
            row in places and not (reason or "").startswith(UPSTREAM)
            for row, reason in enumerate(reasons)
        ]


def check_where(where: str, columns: Sequence[pa.Field]) -> None:
    """Raises WhereError for what is no expression over key, status, reason and these columns."""
    _places(where, stage_schema(columns).empty_table())


def _place(table: str) -> str:
    return f"runs/again/{table}"


def _places(where: str, table: pa.Table) -> set[Any]:
    columns = table.column_names
    named = ", ".join(f'"{name}"' for name in columns)
    marks = ", ".join("?" * (1 + len(columns)))
    with contextlib.closing(sqlite3.connect(":memory:")) as memory:
        memory.execute(f"CREATE TABLE rows (place, {named})")
        memory.executemany(f"INSERT INTO rows VALUES ({marks})", _rows(table))
        try:
            # On lines of its own: it may end with a comment.
            found = memory.execute(f"SELECT place FROM rows WHERE (\n{where}\n)").fetchall()
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # the expression's fault
            raise WhereError(where, columns, str(error)) from None
    return {place for (place, *_) in found}


def _rows(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    columns = [map(_cell, column.to_pylist()) for column in table.columns]
    for place, row in enumerate(zip(*columns, strict=True)):
        yield place, *row


def _cell(value: Any) -> Any:
    is_nested = isinstance(value, list | dict)
    return json.dumps(value, ensure_ascii=False) if is_nested else value
