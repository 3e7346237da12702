"""Columns that every table has, the tables that ingest writes, and the status vocabulary."""

from collections.abc import Sequence
from enum import StrEnum

import pyarrow as pa


class Status(StrEnum):
    OK = "ok"
    FILTERED = "filtered"
    """Left out on purpose, by a rule or because it was not ok upstream."""
    FAILED = "failed"
    """Something went wrong with this row; `--retry-failed` does it again."""


UPSTREAM = "upstream:"
"""`upstream:<table>`: the table where the row first stopped being ok."""

KEY = pa.field("key", pa.string(), nullable=False)
STATUS = pa.field("status", pa.string(), nullable=False)
REASON = pa.field("reason", pa.string())
"""Typed and short; anything after the first `: ` is detail for people. Null when ok."""

SOURCES = "sources"
SAMPLES = "samples"

SOURCES_SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        KEY.with_nullable(True),  # null when the row has no image bytes
        STATUS,
        REASON,
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        pa.field("url", pa.string()),
    ]
)
"""One row per input row."""

SAMPLES_SCHEMA = pa.schema(
    [
        KEY,
        STATUS,
        REASON,
        pa.field("row_ids", pa.list_(pa.string())),
        pa.field("alt_texts", pa.list_(pa.string())),
        pa.field("urls", pa.list_(pa.string())),
        pa.field("format", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("orientation", pa.int8()),
        pa.field("mode", pa.string()),
        pa.field("animated", pa.bool_()),
        pa.field("image_offset", pa.int64()),
        pa.field("image_bytes", pa.int64()),
    ]
)
"""One row per sample of a shard. `width` and `height` are of the upright frame;
`image_offset` and `image_bytes` say where in the shard's tar the original bytes lie."""


def stage_schema(columns: Sequence[pa.Field]) -> pa.Schema:
    """The schema of a stage's table: key, status, reason and the stage's own columns."""
    return pa.schema([KEY, STATUS, REASON, *columns])


def typed(reason: str | None) -> str:
    """A reason without its detail, for counting."""
    return (reason or "").split(": ", 1)[0]
