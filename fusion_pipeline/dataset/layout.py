"""A dataset: its folders, which shards of a table exist, and reading them.

shards/00000/00000012.tar            original bytes, texts, origin (12 // 1000 = folder 0)
tables/<name>/00000/00000012.parquet
tables/<name>/table.json             fingerprint of the table, and the fields it is made of
artifacts/<name>                     centroids, plans
runs/<run>/                          logs, timings
dataset.json  lease.json
"""

import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from fusion_pipeline.dataset import tables
from fusion_pipeline.dataset.fingerprints import Fingerprint
from fusion_pipeline.dataset.schemas import SAMPLES
from fusion_pipeline.dataset.storage import TEMPORARY, Storage
from fusion_pipeline.dataset.tars import Member, read_members
from fusion_pipeline.errors import FusionError

FORMAT_VERSION = 1
_DESCRIPTOR = "dataset.json"
_SHARDS_A_FOLDER = 1000


class DatasetError(FusionError):
    """The folder is no dataset, or of a format this version can't read."""


class Dataset:
    """One dataset folder. Holds no rows; cheap to pickle."""

    def __init__(self, root: str | Path) -> None:
        self.storage = Storage(root)

    @classmethod
    def open(cls, root: str | Path) -> "Dataset":
        """An existing dataset. Raises DatasetError when there is none, or a newer one."""
        dataset = cls(root)
        try:
            found = json.loads(dataset.storage.read(_DESCRIPTOR))["format_version"]
        except FileNotFoundError:
            raise DatasetError(
                f"{root} is no dataset: {_DESCRIPTOR} is missing. `fusion run` makes one."
            ) from None
        if found != FORMAT_VERSION:
            raise DatasetError(
                f"{root} has format version {found}; this fusion reads version {FORMAT_VERSION}."
            )
        return dataset

    @classmethod
    def create(cls, root: str | Path) -> "Dataset":
        """The dataset at this place, made if there is none."""
        dataset = cls(root)
        version = json.dumps({"format_version": FORMAT_VERSION})
        if not dataset.storage.create(_DESCRIPTOR, version.encode()):
            return cls.open(root)
        return dataset

    @property
    def exists(self) -> bool:
        return self.storage.exists(_DESCRIPTOR)

    def clean_temporary(self) -> None:
        """Remove what a killed run left half written. Only under the lease."""
        if self.storage.is_local:
            self.storage.delete(TEMPORARY)

    def clear(self) -> None:
        """Remove all shards, tables and artifacts; logs stay. Plans go first: whatever a crash
        leaves of the rest is then not taken for theirs."""
        self.storage.delete("artifacts")
        for name in self.table_names():
            self.drop_table(name)
        for folder in ("tables", "shards"):
            self.storage.delete(folder)

    # Paths

    @staticmethod
    def shard_path(shard: int) -> str:
        return f"shards/{shard // _SHARDS_A_FOLDER:05d}/{shard:08d}.tar"

    @staticmethod
    def table_path(table: str, shard: int) -> str:
        return f"tables/{table}/{shard // _SHARDS_A_FOLDER:05d}/{shard:08d}.parquet"

    # Tables

    def shards_of(self, table: str) -> set[int]:
        """Numbers of the shards for which a table is committed, by listing."""
        pattern = re.compile(rf"tables/{re.escape(table)}/\d{{5}}/(\d{{8}})\.parquet")
        found = (pattern.fullmatch(path) for path in self.storage.files(f"tables/{table}"))
        return {int(match[1]) for match in found if match}

    def shards(self) -> list[int]:
        """Numbers of all complete shards, in order."""
        return sorted(self.shards_of(SAMPLES))

    def table_names(self) -> list[str]:
        """Names of all tables, sorted."""
        found = (path.split("/") for path in self.storage.files("tables"))
        return sorted({"/".join(p[1:-1]) for p in found if p[-1] == "table.json"})

    def describe_table(self, table: str, made_by: Fingerprint) -> None:
        """Declare what a table is made of, before its first shard is committed.

        Raises FingerprintMismatchError when the table exists and was made otherwise.
        """
        content = json.dumps({"fingerprint": made_by.hash, "fields": made_by.fields}, indent=1)
        path = f"tables/{table}/table.json"
        if not self.storage.create(path, content.encode()):
            self.check_table(table, made_by)

    def check_table(self, table: str, made_by: Fingerprint) -> None:
        """Raises FingerprintMismatchError when the table exists and was made otherwise."""
        old = self.table_fields(table)
        if old is not None and Fingerprint(old).hash != made_by.hash:
            path = self.storage.full(f"tables/{table}")
            raise tables.FingerprintMismatchError(path, old, made_by.fields)

    def table_fields(self, table: str) -> Mapping[str, Any] | None:
        """Fields of a table's fingerprint; None when there is no such table."""
        try:
            described = json.loads(self.storage.read(f"tables/{table}/table.json"))
        except FileNotFoundError:
            return None
        fields: Mapping[str, Any] = described["fields"]
        return fields

    def drop_table(self, table: str) -> None:
        """Remove a table. Shards first, so that a crash leaves it recognisably the old one."""
        for shard in self.shards_of(table):
            self.storage.delete(self.table_path(table, shard))
        self.storage.delete(f"tables/{table}/table.json")

    def read_table(
        self, table: str, shard: int, expected: Fingerprint | None = None
    ) -> tuple[pa.Table, tables.Footer]:
        """See `tables.read_table`."""
        path = self.table_path(table, shard)
        return tables.read_table(self.storage, path, table, shard, expected)

    def read_footer(self, table: str, shard: int) -> tables.Footer:
        return tables.read_footer(self.storage, self.table_path(table, shard))

    # Samples

    def read_images(self, shard: int) -> dict[str, bytes]:
        """Original encoded bytes of each image of a shard, by key. At most 256 MB."""
        data = self.storage.read(self.shard_path(shard))
        return {
            key: member.data
            for member in read_members(io.BytesIO(data))
            if (key := image_key(member)) is not None
        }

    def read_image(self, shard: int, offset: int, size: int) -> bytes:
        """One image, by the `image_offset` and `image_bytes` of the samples table."""
        return self.storage.read_range(self.shard_path(shard), offset, offset + size)

    def iterate(self, table: str) -> Iterator[tuple[int, pa.Table]]:
        """(shard, table) of every committed shard in order, one in memory at a time."""
        for shard in sorted(self.shards_of(table)):
            yield shard, self.read_table(table, shard)[0]


def image_key(member: Member) -> str | None:
    """Key of a shard's image member; None for its text and JSON members."""
    key, _, extension = member.name.partition(".")
    return None if extension in ("txt", "json") else key
