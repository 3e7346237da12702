"""Samples on their way into a shard: keys, tar members and the `samples` table."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from fusion_pipeline.dataset.images import EXTENSIONS, ImageInfo
from fusion_pipeline.dataset.schemas import SAMPLES_SCHEMA
from fusion_pipeline.dataset.tars import TarWriter


@dataclass(frozen=True)
class Limits:
    shard_size: int
    max_shard_bytes: int


def cut(sizes: Iterable[int], limits: Limits) -> Iterator[range]:
    """Ranges of consecutive rows, given each row's bytes; each within both limits where possible.

    One row over `max_shard_bytes` makes a shard of its own.
    """
    start = total = n = 0
    for n, size in enumerate(sizes, 1):
        count = n - start
        if count > 1 and (count > limits.shard_size or total + size > limits.max_shard_bytes):
            yield range(start, n - 1)
            start, total = n - 1, 0
        total += size
    if n > start:
        yield range(start, n)


def sample_key(image: bytes) -> str:
    """First 32 hex digits of the sha256 of the original bytes."""
    return hashlib.sha256(image).hexdigest()[:32]


@dataclass
class Sample:
    key: str
    image: bytes
    info: ImageInfo
    row_ids: list[str] = field(default_factory=list)
    alt_texts: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def add_row(self, row_id: str, alt_text: str | None, url: str | None) -> None:
        """Another input row with these bytes; its text and URL are kept once each."""
        self.row_ids.append(row_id)
        if alt_text and alt_text not in self.alt_texts:
            self.alt_texts.append(alt_text)
        if url and url not in self.urls:
            self.urls.append(url)


def pack_samples(samples: Sequence[Sample]) -> tuple[bytes, pa.Table]:
    """The shard's tar and its `samples` table, rows in the given order."""
    tar = TarWriter()
    rows: list[dict[str, Any]] = []
    for sample in samples:
        info = sample.info
        offset = tar.add(f"{sample.key}.{EXTENSIONS[info.format]}", sample.image)
        tar.add(f"{sample.key}.txt", "\n".join(sample.alt_texts).encode())
        origin = {
            "key": sample.key,
            "row_ids": sample.row_ids,
            "alt_texts": sample.alt_texts,
            "urls": sample.urls,
            "width": info.width,
            "height": info.height,
        }
        tar.add(f"{sample.key}.json", json.dumps(origin, ensure_ascii=False).encode())
        rows.append(
            {
                "key": sample.key,
                "status": "ok",
                "reason": None,
                "row_ids": sample.row_ids,
                "alt_texts": sample.alt_texts,
                "urls": sample.urls,
                "format": info.format,
                "width": info.width,
                "height": info.height,
                "orientation": info.orientation,
                "mode": info.mode,
                "animated": info.animated,
                "image_offset": offset,
                "image_bytes": len(sample.image),
            }
        )
    return tar.close(), pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA)
