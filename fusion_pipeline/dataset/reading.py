"""Reading a dataset, a finished one or one that a run is still at work on: columns of many tables
as one.

    selected = fusion_pipeline.open("runs/quickstart/selected")
    captioned = selected.select(
        ["key", "image", "captions/composer.caption"],
        where=[("captions/composer.status", "==", "ok")],
    )

A selection is made once, by listing: it fixes the version of each table and the shards. From then
on a shard is read by its number alone, on any node. docs/reading.md has examples.
"""

import difflib
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.utils import merge_offset_ranges

from fusion_pipeline.dataset.evidence import EvidenceKind
from fusion_pipeline.dataset.filters import (
    IMAGE,
    Predicate,
    ReadingError,
    Where,
    names_in,
    tables_of,
    to_expression,
)
from fusion_pipeline.dataset.images import EXTENSIONS
from fusion_pipeline.dataset.layout import Dataset, TableVersion
from fusion_pipeline.dataset.samples import sample_key
from fusion_pipeline.dataset.schemas import SAMPLES, SOURCES
from fusion_pipeline.dataset.tables import Footer

if TYPE_CHECKING:  # imported where they are needed: reading Arrow tables needs none of them
    import pandas as pd
    import ray.data
    import webdataset

KEY = "key"

_GAP = 256 * 1024
"""Bytes between two wanted images of a tar that are read along, rather than asked around: about
what an object store sends in the time of one more request, sixteen at a time."""
_REQUESTS = 16
_ROW = "__row__"


@dataclass(frozen=True)
class Column:
    """A column of a selection."""

    name: str
    """As it was asked for, and as it is called in the result."""
    table: str
    field: str
    """Its name in the table; `image` for the bytes in the tar."""
    type: pa.DataType
    label: str | None = None
    """Of `table.column[label]`: the score of that label alone."""


class Reader:
    """A dataset as its users see it. What it tells is what is stored at that moment."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    @classmethod
    def open(cls, path: str | Path) -> "Reader":
        """Raises DatasetError where there is no dataset, ReadingError for the folder of a run."""
        root = str(path).rstrip("/") or "/"
        if not Dataset(root).exists:
            parts = {name: Dataset(f"{root}/{name}").exists for name in ("pool", "selected")}
            if any(parts.values()):
                raise ReadingError(
                    f"{root} is the folder of a run and holds two datasets; open one of them: "
                    f"{_place(root, 'pool', parts)}, all that was ingested, or "
                    f"{_place(root, 'selected', parts)}, what was chosen of it, with captions."
                )
        return cls(Dataset.open(root))

    def __repr__(self) -> str:
        return f"Reader({self._dataset.storage.url!r})"

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_rows(self) -> int:
        """Samples of all complete shards."""
        return sum(footer.rows for footer in self._dataset.footers(SAMPLES).values())

    @property
    def shards(self) -> list[int]:
        """Numbers of the complete shards, in order. A table may be missing for some of them."""
        return self._dataset.shards()

    @property
    def tables(self) -> dict[str, pa.Schema]:
        """The columns of every table of which there is a shard; `table.column` names one."""
        catalog = _Catalog(self._dataset)
        found = ((name, catalog.schema(name)) for name in catalog.names)
        return {name: schema for name, schema in found if schema is not None}

    def select(
        self,
        columns: Sequence[str] | str | None = None,
        where: Where | None = None,
        *,
        allow_missing: bool = False,
        allow_stale: bool = False,
    ) -> "Selection":
        """Columns of the rows for which `where` holds; by default all columns but the images.

        `columns`: `table.column`, or a table's name for all columns of it, `key`, `image`;
        `table.column[label]` is the highest score of a label among tags, objects or scores.
        `where`: filters as in `pyarrow.parquet.read_table`, over any columns, or an Expression
        over the selected ones. Shards that lack a table are left out with `allow_missing`; tables
        made from others than are there now are taken with `allow_stale`. Raises ReadingError.
        """
        catalog = _Catalog(self._dataset)
        asked = [columns] if isinstance(columns, str) else columns
        every = [KEY, *(name for name in catalog.names if name != SOURCES)]
        chosen = catalog.columns(every if asked is None else asked)
        if where is None or isinstance(where, pc.Expression):
            tests = catalog.columns([KEY, *(c.name for c in chosen if c.field != IMAGE)])
        else:
            tests = catalog.columns(names_in(where))
        tables = _tables_of([*chosen, *tests])
        keyed = [[replace(c, table=c.table or tables[0]) for c in some] for some in (chosen, tests)]
        selection = Selection(
            dataset=self._dataset,
            versions={name: catalog.version(name) for name in {SAMPLES, *tables}},
            columns=tuple(keyed[0]),
            shards=tuple(catalog.complete(tables, allow_missing)),
            tests=tuple(keyed[1]),
            where=None if where is None else to_expression(where, _schema_of(keyed[1])),
            allow_stale=allow_stale,
        )
        if len(tables) > 1 and not allow_stale:
            _check_lineage(selection, tables)
        return selection


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Some columns of some rows of a dataset. Holds no rows; cheap to pickle."""

    dataset: Dataset
    versions: Mapping[str, TableVersion]
    columns: tuple[Column, ...]
    shards: tuple[int, ...]
    """In this order they are read."""
    tests: tuple[Column, ...]
    """The columns that `where` sees."""
    where: pc.Expression | None
    allow_stale: bool

    def __repr__(self) -> str:
        return f"Selection({self.schema.names}, {len(self.shards)} shards)"

    @property
    def schema(self) -> pa.Schema:
        return _schema_of(self.columns)

    def read_shard(self, shard: int) -> pa.Table:
        """The selected rows of one shard, every byte checked.

        Raises ReadingError when a run replaced a table in the meantime, DamagedTableError.
        """
        tables, rows = _ShardTables(self, shard), None
        if self.where is not None:
            seen = pa.table({c.name: tables.column(c) for c in self.tests})
            numbered = seen.append_column(_ROW, pa.array(range(seen.num_rows), pa.int64()))
            # Arrow's filter promises no order.
            rows = numbered.filter(self.where)[_ROW].combine_chunks().sort()
            if not len(rows):
                return self.schema.empty_table()  # the other tables need not be read
        columns = [tables.column(column, rows) for column in self.columns]
        return pa.Table.from_arrays(columns, schema=self.schema)

    def to_batches(self) -> Iterator[pa.Table]:
        """One table a shard, perhaps without rows; one shard is in memory at a time."""
        return map(self.read_shard, self.shards)

    def to_arrow(self) -> pa.Table:
        return pa.concat_tables([self.schema.empty_table(), *self.to_batches()])

    def to_pandas(self) -> "pd.DataFrame":
        """Raises ReadingError without pandas."""
        try:
            import pandas  # noqa: F401
        except ModuleNotFoundError as error:
            raise ReadingError(f"to_pandas needs {error.name}: pip install pandas") from error
        frame: pd.DataFrame = self.to_arrow().to_pandas()
        return frame

    def to_numpy(self, column: str) -> npt.NDArray[np.float16]:
        """float16 [n, d] of a selected column of embeddings. Raises ReadingError."""
        found = next((c for c in self.columns if c.name == column), None)
        if found is None or not pa.types.is_fixed_size_binary(found.type):
            raise ReadingError(
                f"{column!r} is no selected column of embeddings (fixed_size_binary). Of others "
                "to_arrow() makes arrays: selection.to_arrow()[column].to_numpy()"
            )
        width = found.type.byte_width // np.float16().itemsize
        parts = [np.zeros((0, width), np.float16)]
        for batch in replace(self, columns=(found,)).to_batches():
            if batch[column].null_count:
                raise ReadingError(
                    f"some rows have no {column!r}: they were left out upstream, or failed. "
                    f'Select with where=[("{found.table}.status", "==", "ok")].'
                )
            flat = np.frombuffer(b"".join(batch[column].to_pylist()), np.float16)
            parts.append(flat.reshape(-1, width))
        return np.concatenate(parts)

    def to_ray(self) -> "ray.data.Dataset":
        """A Ray Data dataset: one block a shard, read where and when Ray needs it."""
        import ray.data

        numbers = [pa.table({"shard": pa.array([n], pa.int64())}) for n in self.shards]
        if not numbers:
            return ray.data.from_arrow(self.schema.empty_table())
        return ray.data.from_arrow(numbers).map_batches(
            self._block, batch_size=None, batch_format="pyarrow", zero_copy_batch=True
        )

    def _block(self, numbers: pa.Table) -> pa.Table:
        return pa.concat_tables(self.read_shard(n) for n in numbers["shard"].to_pylist())

    def to_webdataset(self, seed: int | None = None) -> "webdataset.DataPipeline":
        """Samples as WebDataset has them: `__key__`, `__url__`, `json` (the bytes of an object of
        the selected columns) and, if `image` is selected, `jpg`, `png`, ... with its bytes.

        Each node and each DataLoader worker gets its share of the shards; with a seed in another
        order each epoch. With torch it is an IterableDataset. Raises ReadingError for columns that
        don't go into JSON.
        """
        import webdataset

        binary = [c.name for c in self.columns if c.field != IMAGE and _is_binary(c.type)]
        table = self.columns[0].table
        if binary or table == SOURCES:
            what = f"binary columns ({', '.join(binary)})" if binary else f"{SOURCES!r}"
            raise ReadingError(f"to_webdataset gives images and JSON, not {what}; see to_batches")
        hidden = [Column("__key__", table, KEY, pa.string())]
        if any(column.field == IMAGE for column in self.columns):
            hidden.append(Column("__format__", SAMPLES, "format", pa.string()))
        whole = replace(self, columns=(*self.columns, *hidden))
        n = len(self.shards)
        # All nodes and workers shuffle alike, and then take their share.
        shuffle = None if seed is None else webdataset.detshuffle(n, n, seed)
        return webdataset.DataPipeline(
            whole._numbers,
            shuffle,
            webdataset.split_by_node,
            webdataset.split_by_worker,
            whole._samples,
        )

    def _numbers(self) -> Iterator[int]:  # a list would count as a list of stages
        return iter(self.shards)

    def _samples(self, shards: Iterable[int]) -> Iterator[dict[str, Any]]:
        shown = [c.name for c in self.columns if not c.name.startswith("__") and c.field != IMAGE]
        for shard in shards:
            batch = self.read_shard(shard)
            path = self.versions[SAMPLES].tar_path(shard)
            for i, values in enumerate(batch.select(shown).to_pylist()):
                sample = {
                    "__key__": batch["__key__"][i].as_py(),
                    "__url__": f"{self.dataset.storage.url}/{path}",
                    "json": json.dumps(values, ensure_ascii=False).encode(),
                }
                if IMAGE in batch.column_names:
                    extension = EXTENSIONS[batch["__format__"][i].as_py()]
                    sample[extension] = batch[IMAGE][i].as_py()
                yield sample


class _ShardTables:
    """A shard's tables, each read once when it is first needed, and checked to fit together."""

    def __init__(self, selection: Selection, shard: int) -> None:
        self._selection = selection
        self._shard = shard
        self._tables: dict[str, pa.Table] = {}
        self._footers: dict[str, Footer] = {}

    def column(self, column: Column, rows: pa.Array | None = None) -> pa.Array | pa.ChunkedArray:
        """Of these rows; None: of all."""
        table = self._table(column.table)
        if column.field == IMAGE:
            places = table.select([KEY, "image_offset", "image_bytes"])
            return self._images(places if rows is None else places.take(rows))
        cells = table[column.field] if rows is None else table[column.field].take(rows)
        return cells if column.label is None else _scores_of(cells, column.label)

    def _table(self, name: str) -> pa.Table:
        if name in self._tables:
            return self._tables[name]
        dataset, version = self._selection.dataset, self._selection.versions[name]
        try:
            table, self._footers[name] = dataset.read_table(version, self._shard)
        except FileNotFoundError:
            raise self._gone(version.path(self._shard)) from None
        why = _mismatch(self._footers)
        if why and not self._selection.allow_stale:
            raise _stale(dataset, self._shard, why)
        for other, known in self._tables.items():
            if not known[KEY].equals(table[KEY]):
                raise ReadingError(
                    f"{dataset.storage.url}: tables {other!r} and {name!r} of shard "
                    f"{self._shard} hold different samples. {_REFRESH}"
                )
        self._tables[name] = table
        return table

    def _images(self, places: pa.Table) -> pa.Array:
        """binary [n], each checked to be what its key says."""
        dataset, version = self._selection.dataset, self._selection.versions[SAMPLES]
        keys, offsets, sizes = (column.to_pylist() for column in places.columns)
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        path = version.tar_path(self._shard)
        # All rows of a shard: one read of its tar; a few rows: a read for each that lies apart.
        _, starts, stops = merge_offset_ranges([path] * len(offsets), offsets, ends, max_gap=_GAP)

        def read(start: int, stop: int) -> memoryview:  # slices of it are no copies
            return memoryview(dataset.read_image(self._shard, start, stop - start, version))

        try:
            with ThreadPoolExecutor(_REQUESTS) as pool:  # its threads start as they are needed
                parts = list(pool.map(read, starts, stops))
        except FileNotFoundError:
            raise self._gone(path) from None
        images = []
        for key, offset, end in zip(keys, offsets, ends, strict=True):
            part = bisect_right(starts, offset) - 1
            image = parts[part][offset - starts[part] : end - starts[part]]
            if sample_key(image) != key:  # type: ignore[arg-type]  # any buffer will do
                raise ReadingError(
                    f"{dataset.storage.full(path)}: the bytes of image {key} are damaged. "
                    "`fusion status --verify` says what else is, and what to do."
                )
            images.append(image)
        return pa.array(images, pa.binary())

    def _gone(self, path: str) -> ReadingError:
        return ReadingError(
            f"{self._selection.dataset.storage.full(path)} is gone: a run has replaced this table "
            "since the selection was made. Select again."
        )


def check_where(
    where: Sequence[Predicate], dataset: Dataset, schemas: Mapping[str, pa.Schema]
) -> None:
    """Raises ReadingError for filters that tables of these schemas, by name, won't answer. Whether
    labels are there shows in rows alone."""
    for table in tables_of(where):
        if table not in schemas:
            near = difflib.get_close_matches(table, schemas, n=1)
            hint = f"did you mean {near[0]!r}? There will be" if near else "there will be"
            raise ReadingError(f"this config makes no table {table!r}; {hint} {', '.join(schemas)}")
    columns = _schema_of(_Catalog(dataset, schemas).columns(names_in(where)))
    for one in where:
        to_expression([one], columns)


class _Catalog:
    """What tables there are; each one's version is read once. Or what tables there will be."""

    def __init__(self, dataset: Dataset, planned: Mapping[str, pa.Schema] | None = None) -> None:
        self._dataset = dataset
        self._is_planned = planned is not None
        self.names = dataset.table_names() if planned is None else list(planned)
        self._versions: dict[str, TableVersion] = {}
        self._shards: dict[str, set[int]] = {}
        self._schemas: dict[str, pa.Schema | None] = {**(planned or {})}

    def version(self, table: str) -> TableVersion:
        if table not in self._versions:
            self._versions[table] = self._dataset.version(table)
        return self._versions[table]

    def shards(self, table: str) -> set[int]:
        if table not in self._shards:
            self._shards[table] = self._dataset.shards_of(self.version(table))
        return self._shards[table]

    def complete(self, tables: Sequence[str], allow_missing: bool) -> list[int]:
        """The shards that have all of these tables. Raises ReadingError when others lack one."""
        shards, url = sorted(self.shards(SAMPLES)), self._dataset.storage.url
        if not shards:
            raise ReadingError(f"{url}: no shard is complete yet. `fusion run` makes them.")
        lacking = {name: len(set(shards) - self.shards(name)) for name in tables}
        if any(lacking.values()) and not allow_missing:
            lines = [f"table {name!r} is missing for {n}" for name, n in lacking.items() if n]
            raise ReadingError(
                f"{url}: {', '.join(lines)} of {len(shards)} shards: the run is still going on, "
                "was interrupted, or had --limit. The same `fusion run` completes it; "
                "allow_missing=True leaves these shards out."
            )
        return [shard for shard in shards if all(shard in self.shards(name) for name in tables)]

    def schema(self, table: str) -> pa.Schema | None:
        """Of any shard, for all have the same; None when there is none yet."""
        if table not in self._schemas:
            self._schemas[table] = None
            for shard in sorted(self.shards(table))[:1]:
                with self._dataset.storage.open(self.version(table).path(shard)) as file:
                    self._schemas[table] = pq.read_schema(file).remove_metadata()
        return self._schemas[table]

    def columns(self, asked: Sequence[str]) -> list[Column]:
        """Each named column once, in order. `key` is of no table yet. Raises ReadingError."""
        found: dict[str, Column] = {}
        for name in asked:
            for column in self._named(str(name)):
                found.setdefault(column.name, column)
        if not found:
            raise ReadingError(f"no column was named. {self._there()}")
        return list(found.values())

    def _named(self, name: str) -> list[Column]:
        if name == KEY:
            return [Column(KEY, "", KEY, pa.string())]
        if name == IMAGE:
            return [Column(IMAGE, SAMPLES, IMAGE, pa.binary())]
        if name in self.names:
            fields = [field for field in self._schema(name) if field.name != KEY]
            return [Column(f"{name}.{f.name}", name, f.name, f.type) for f in fields]
        whole, bracket, label = name.partition("[")
        if bracket and label.endswith("]"):
            return [self._label(name, whole, label[:-1])]
        table, _, field = name.rpartition(".")  # a table's name may hold dots, a column's does not
        if table in self.names:
            schema = self._schema(table)
            if field in schema.names:
                return [Column(name, table, field, schema.field(field).type)]
        raise self._unknown(name, table)

    def _label(self, name: str, whole: str, label: str) -> Column:
        url, columns = self._dataset.storage.url, self._named(whole)
        if whole in self.names:
            names = " or ".join(f"'{c.name}[{label}]'" for c in columns if _has_labels(c.type))
            hint = f"Did you mean {names}?" if names else "It has no labels."
            raise ReadingError(f"{url}: {name!r}: {whole!r} is a table, not a column. {hint}")
        [column] = columns
        if not _has_labels(column.type):
            raise ReadingError(
                f"{url}: {name!r}: {whole!r} is no list of labels with scores, as tags, objects "
                "and scores are"
            )
        if not label or label != label.strip() or "[" in label:
            raise ReadingError(f"{url}: {name!r}: {label!r} is no label")
        if column.table.startswith(f"{EvidenceKind.SCORES}/") and not self._is_planned:
            self._check_class(name, column, label)
        return replace(column, name=name, type=pa.float32(), label=label)

    def _check_class(self, name: str, column: Column, label: str) -> None:
        """Of all images the same classes are told: a name that none has is a slip, and a filter
        by it would keep all of them, or none. Mostly the first shard has it."""
        there: set[str] = set()
        for _, table in self._dataset.iterate(column.table):
            labels = pc.list_flatten(table[column.field]).combine_chunks().field("label")
            there.update(labels.unique().to_pylist())
            if label in there:
                return
        if there:
            raise ReadingError(
                f"{self._dataset.storage.url}: {name!r}: no image has this score; there are "
                f"{', '.join(sorted(there)[:50])}"
            )

    def _schema(self, table: str) -> pa.Schema:
        schema = self.schema(table)
        if schema is None:
            raise ReadingError(
                f"{self._dataset.storage.url}: table {table!r} has no shard yet: the run is still "
                "going on, or was interrupted. The same `fusion run` completes it."
            )
        return schema

    def _unknown(self, name: str, table: str) -> ReadingError:
        every = [KEY, IMAGE, *self.names]
        for known in self.names:
            every += [f"{known}.{field}" for field in (self.schema(known) or pa.schema([])).names]
        ends = [column for column in every if column.endswith(f".{name}")]
        near = ends or difflib.get_close_matches(name, every, n=3)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        there = self._there()
        if table in self.names:
            there = f"{table!r} has {', '.join(self._schema(table).names)}."
        return ReadingError(f"{self._dataset.storage.url}: no column {name!r}. {hint}{there}")

    def _there(self) -> str:
        tables = ", ".join(self.names) or "none yet"
        return (
            f"A column is called `table.column`, a table's name means all of its columns; tables: "
            f"{tables}. Besides them there are `{KEY}` and `{IMAGE}`."
        )


def _schema_of(columns: Sequence[Column]) -> pa.Schema:
    return pa.schema([(column.name, column.type) for column in columns])


def _place(root: str, name: str, exists: Mapping[str, bool]) -> str:
    return f"{root}/{name}{'' if exists[name] else ' (not there yet)'}"


def _has_labels(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)):
        return False
    return {"label", "score"} <= {field.name for field in kind.value_type}


def _scores_of(cells: pa.ChunkedArray, label: str) -> pa.Array:
    """float32: the highest score of a label in each list, 0 where it is not in it."""
    lists = cells.combine_chunks()
    items = lists.flatten()
    named = pc.equal(items.field("label"), label)
    rows = pc.list_parent_indices(lists).filter(named).to_numpy()
    found = items.field("score").filter(named).fill_null(0).to_numpy()
    scores = np.zeros(len(lists), np.float32)
    np.maximum.at(scores, rows, found)
    return pa.array(scores, mask=lists.is_null().to_numpy(zero_copy_only=False))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _tables_of(columns: Sequence[Column]) -> list[str]:
    """The tables to read, in the order in which they were named. Raises ReadingError when their
    rows are not the same."""
    tables = list(dict.fromkeys(column.table for column in columns if column.table)) or [SAMPLES]
    if SOURCES in tables and len(tables) > 1:
        raise ReadingError(
            f"{SOURCES!r} has one row an input row, all other tables one a sample: select it "
            f"alone. `{SOURCES}.row_id` is what `{SAMPLES}.row_ids` lists."
        )
    return tables


def _mismatch(footers: Mapping[str, Footer]) -> str | None:
    """Why these tables of one shard do not belong together; None when they do."""
    seen = {name: (name, footer.digest) for name, footer in footers.items()}
    for name, footer in footers.items():
        for source, digest in footer.inputs.items():
            other, known = seen.setdefault(source, (name, digest))
            if known != digest and other == source:
                return f"table {name!r} was made from an older {source!r} than is there now"
            if known != digest:
                return f"tables {other!r} and {name!r} were made from different {source!r}"
    return None


_REFRESH = "`fusion run CONFIG --refresh` makes again what is out of date."


def _stale(dataset: Dataset, shard: int, why: str, others: int = 0) -> ReadingError:
    more = f" (and {others} more)" if others else ""
    return ReadingError(
        f"{dataset.storage.url}: shard {shard}{more}: {why}. {_REFRESH} allow_stale=True reads "
        "them as they are."
    )


def _check_lineage(selection: Selection, tables: Sequence[str]) -> None:
    """Raises ReadingError now rather than hours into a training run; `read_shard` looks again."""
    dataset = selection.dataset
    footers = {name: dataset.footers(selection.versions[name]) for name in tables}
    found = {}
    for shard in selection.shards:
        why = _mismatch({name: of[shard] for name, of in footers.items() if shard in of})
        if why:
            found[shard] = why
    for shard, why in found.items():
        raise _stale(dataset, shard, why, len(found) - 1)
