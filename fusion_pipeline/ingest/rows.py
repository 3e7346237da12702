"""What every kind of source gives: input rows, and the plan that cuts them into shards."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fusion_pipeline.errors import FusionError

IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jfif", "img", "image"}
)
MAX_TEXT_BYTES = 64 * 1024
MAX_METADATA_BYTES = 2**20
"""Of a row's JSON; a larger one is not read. Crawlers put all of an image's EXIF data there."""
MAX_ROW_BYTES = 256 * 2**20
"""A row over this is refused unread: it would not fit in the memory of a worker."""


class SourceError(FusionError):
    """A source that can't be read at all; the message names the config field and the fix."""


@dataclass(frozen=True, slots=True)
class InputRow:
    source: str
    """Name of the tar or folder, relative to the configured place."""
    source_id: str
    """Of the row inside its source; unique there."""
    image: bytes | None
    alt_text: str | None
    url: str | None
    damaged: str | None = None
    """Why the source could not deliver this row whole."""

    @property
    def row_id(self) -> str:
        return hashlib.sha256(f"{self.source}\0{self.source_id}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class PlannedShard:
    """Which part of the source becomes one shard."""

    source: str
    rows: int
    start: int = 0
    """First byte of the part (tar)."""
    end: int = 0
    """Byte after the part (tar)."""
    files: tuple[tuple[str, ...], ...] = ()
    """For each row its files (folder): the image first, then its texts."""
    damaged: str | None = None
    """Why the source ends early after this part."""
    repeated: tuple[str, ...] = ()
    """Keys of this part that earlier parts of the tar had, once for each time."""


PLAN_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("rows", pa.int64()),
        pa.field("start", pa.int64()),
        pa.field("end", pa.int64()),
        pa.field("files", pa.list_(pa.list_(pa.string()))),
        pa.field("damaged", pa.string()),
        pa.field("repeated", pa.list_(pa.string())),
    ]
)
"""The plan as a table: row number = shard number."""


def storable(text: str) -> str:
    """The text with lone surrogates escaped: half an emoji in JSON, a name that is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def parse_text(data: bytes) -> str:
    return data[:MAX_TEXT_BYTES].decode("utf-8", errors="replace").strip()


def parse_metadata(data: bytes) -> dict[str, Any]:
    """A row's JSON member; anything but an object reads as none: it only adds to the image."""
    if len(data) > MAX_METADATA_BYTES:
        return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def first_string(metadata: dict[str, Any], *names: str) -> str | None:
    """The first of the fields that holds a non-empty string."""
    for name in names:
        value = metadata.get(name)
        if isinstance(value, str) and value.strip():
            return storable(value.strip()[:MAX_TEXT_BYTES])
    return None
