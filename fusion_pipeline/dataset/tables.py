"""Tables: one Parquet file per shard, with a footer that says what it is and where it came from.

A file is written in memory and put at once. Its footer holds a digest of all bytes before the
footer, so that damage is found when the file is read and lineage needs footers only.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_pipeline.dataset.fingerprints import Fingerprint, canonical_json, differences
from fusion_pipeline.dataset.schemas import typed
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.errors import FusionError

_METADATA_KEY = b"fusion_pipeline"
_TAIL_BYTES = 64 * 1024


class TableError(FusionError):
    """A stored table that can't be used; the message names the file and what to do."""


class NoTableError(TableError):
    """A table that is not there yet."""

    def __init__(self, path: str, table: str) -> None:
        super().__init__(
            f"{path}: table {table!r} is not there yet. Run the steps before this one first "
            "(without --only)."
        )


class StaleTableError(TableError):
    """A table made from other inputs as a whole: another source, selection or clustering."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path} was made from inputs that are no longer there (another source, selection or "
            "clustering). Nothing was changed. Run again with --refresh to make it anew, with all "
            "that depends on it, or choose a new `run` folder."
        )


class DamagedTableError(TableError):
    """Truncated, altered, or not the table that its name promises."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"{path}: damaged table ({why}). Delete this file and run again.")
        self.path = path


class FingerprintMismatchError(TableError):
    """A table made with other settings, another model or another upstream."""

    def __init__(self, path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        changed = "\n".join(f"  {line}" for line in differences(old, new))
        super().__init__(
            f"{path} was made with other settings:\n{changed}\n"
            "Nothing was changed. Restore these settings, choose a new `run` folder, or run again "
            "with --overwrite to replace this table and those that depend on it."
        )
        self.path = path


@dataclass(frozen=True)
class Footer:
    """What a table file says of itself. All of it is reproducible: no times, hosts or attempts."""

    table: str
    shard: int
    rows: int
    fingerprint: str
    inputs: Mapping[str, str]
    """Digest of each table, of the same shard, that this one was made from."""
    counts: Mapping[str, int]
    """Rows by `status` or `status:reason` (the reason without detail)."""
    data_bytes: int
    digest: str
    """sha256 (hex) of the first `data_bytes` bytes of the file: all column data."""


def encode_table(
    table: pa.Table, name: str, shard: int, made_by: Fingerprint, inputs: Mapping[str, str]
) -> tuple[bytes, Footer]:
    """Bytes of the file; equal tables and lineage give equal bytes."""
    sink = io.BytesIO()
    plain = any(pa.types.is_fixed_size_binary(field.type) for field in table.schema)
    writer = pq.ParquetWriter(
        sink,
        table.schema,
        compression="none" if plain else "zstd",  # embeddings: stored plain, read as one buffer
        use_dictionary=not plain,
        store_schema=True,
    )
    writer.write_table(table.combine_chunks(), row_group_size=max(table.num_rows, 1))
    data = sink.getvalue()
    footer = Footer(
        table=name,
        shard=shard,
        rows=table.num_rows,
        fingerprint=made_by.hash,
        inputs=dict(sorted(inputs.items())),
        counts=_count(table),
        data_bytes=len(data),
        digest=hashlib.sha256(data).hexdigest(),
    )
    writer.add_key_value_metadata({_METADATA_KEY: canonical_json(asdict(footer)).encode()})
    writer.close()
    return sink.getvalue(), footer


def _count(table: pa.Table) -> dict[str, int]:
    if "status" not in table.column_names:  # artifacts have no samples
        return {}
    pairs = zip(table["status"].to_pylist(), table["reason"].to_pylist(), strict=True)
    counter = Counter(f"{status}:{typed(reason)}" if reason else status for status, reason in pairs)
    return dict(sorted(counter.items()))


def read_table(
    storage: Storage,
    path: str,
    name: str,
    shard: int,
    expected: Fingerprint | None = None,
) -> tuple[pa.Table, Footer]:
    """A table and its footer, every byte checked.

    Raises FileNotFoundError, DamagedTableError, FingerprintMismatchError.
    """
    data = storage.read(path)
    full = storage.full(path)
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        footer = _footer(file, full)
        if hashlib.sha256(data[: footer.data_bytes]).hexdigest() != footer.digest:
            raise DamagedTableError(full, "content differs from its digest")
        table = file.read()
    except (pa.ArrowInvalid, OSError) as error:  # what Arrow raises on a broken file
        raise DamagedTableError(full, str(error)) from error
    if table.num_rows != footer.rows:
        raise DamagedTableError(full, f"{table.num_rows} rows, footer says {footer.rows}")
    _check_identity(full, footer, name, shard, expected)
    return table, footer


def read_footer(storage: Storage, path: str) -> Footer:
    """The footer alone, from the end of the file. Raises like `read_table`."""
    full = storage.full(path)
    tail = storage.tail(path, _TAIL_BYTES)
    need = int.from_bytes(tail[-8:-4], "little") + 8 if tail[-4:] == b"PAR1" else 0
    if need > len(tail) == _TAIL_BYTES:
        tail = storage.tail(path, need)
    try:
        # Parquet metadata is readable from the tail alone; a leading magic makes it a file.
        return _footer(pq.ParquetFile(io.BytesIO(b"PAR1" + tail)), full)
    except (pa.ArrowInvalid, OSError) as error:  # what Arrow raises on a broken file
        raise DamagedTableError(full, str(error)) from error


def _footer(file: pq.ParquetFile, path: str) -> Footer:
    metadata = file.metadata.metadata or {}
    try:
        return Footer(**json.loads(metadata[_METADATA_KEY]))
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedTableError(path, f"no readable footer: {error!r}") from error


def _check_identity(
    path: str, footer: Footer, name: str, shard: int, expected: Fingerprint | None
) -> None:
    if (footer.table, footer.shard) != (name, shard):
        raise DamagedTableError(
            path, f"holds table {footer.table!r} of shard {footer.shard}, not {name!r} of {shard}"
        )
    if expected is not None and footer.fingerprint != expected.hash:
        raise FingerprintMismatchError(
            path, {"fingerprint": footer.fingerprint}, {"fingerprint": expected.hash}
        )
