"""A dataset: its folders, which shards of a table exist, and reading them.

shards/v-1a2b3c4d/00000/00000012.tar            original bytes, texts, origin (12 // 1000 = 0)
tables/<name>/v-5e6f7081/00000/00000012.parquet
tables/<name>/table.json                        the current version, and what it is made of
artifacts/<name>/artifact.json                  the current file: centroids, a plan
artifacts/<name>/v-9c0d1e2f.parquet
runs/<run>/                                     logs, timings
dataset.json  lease.json

A version's folder is named by a hash of all that its files depend on as a whole: settings, models,
plan, artifacts, upstream versions. So a worker of an older run can only write where nobody looks
any more, and replacing a table is one write, of its table.json (docs/decisions/004). A folder that
was replaced is never used again: what is made anew as it was then gets a number, v-5e6f7081-2.
"""

import contextlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa

from fusion_pipeline.dataset import tables
from fusion_pipeline.dataset.fingerprints import Fingerprint, canonical_json, short_hash
from fusion_pipeline.dataset.lease import Rank, put_as_holder
from fusion_pipeline.dataset.schemas import SAMPLES
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.dataset.tars import Member, read_members
from fusion_pipeline.errors import FusionError

FORMAT_VERSION = 2
DESCRIPTOR = "dataset.json"
_SHARDS_A_FOLDER = 1000
_FOLDER = re.compile(r"v-([0-9a-f]{8})(?:-(\d+))?")
"""Digest and generation; without a number it is the first."""
_READERS = 16
"""Footers read at a time: an object store answers each in tens of milliseconds."""


class DatasetError(FusionError):
    """The folder is no dataset, or of a format this version can't read."""


@dataclass(frozen=True)
class TableVersion:
    """One version of a table: what it is made of, and the folder of its files."""

    name: str
    made_by: Fingerprint
    digest: str
    """Eight hex digits, of all that it is made of."""
    generation: int = 0
    """How often the table was replaced before."""

    @classmethod
    def of(
        cls, name: str, made_by: Fingerprint, depends: Mapping[str, str] | None = None
    ) -> "TableVersion":
        """`depends`: the versions of what it is made from as a whole, such as the plan."""
        digest = short_hash(canonical_json([made_by.hash, dict(depends or {})]))
        return cls(name, made_by, digest[:8])

    @classmethod
    def in_folder(cls, name: str, made_by: Fingerprint, folder: str) -> "TableVersion":
        """Of a descriptor. Raises DatasetError."""
        match = _FOLDER.fullmatch(folder)
        if match is None:
            raise DatasetError(f"{_descriptor(name)}: {folder!r} is no folder of a version")
        return cls(name, made_by, match[1], int(match[2] or 0))

    @property
    def folder(self) -> str:
        return f"v-{self.digest}-{self.generation}" if self.generation else f"v-{self.digest}"

    def path(self, shard: int) -> str:
        folder = f"{shard // _SHARDS_A_FOLDER:05d}"
        return f"tables/{self.name}/{self.folder}/{folder}/{shard:08d}.parquet"

    def tar_path(self, shard: int) -> str:
        """The shard's tar, of a version of `samples`."""
        return f"shards/{self.folder}/{shard // _SHARDS_A_FOLDER:05d}/{shard:08d}.tar"


class Dataset:
    """One dataset folder. Holds no rows; cheap to pickle.

    Where a method takes a table, a name means its current version.
    """

    def __init__(self, root: str | Path) -> None:
        self.storage = Storage(root)
        self._footers: dict[str, dict[int, tuple[str, tables.Footer]]] = {}

    def __reduce__(self) -> tuple[type["Dataset"], tuple[str]]:
        return Dataset, (self.storage.url,)

    @classmethod
    def open(cls, root: str | Path) -> "Dataset":
        """An existing dataset. Raises DatasetError when there is none, or of another format."""
        dataset = cls(root)
        found = dataset.format_version()
        if found < FORMAT_VERSION:
            raise DatasetError(
                f"{root} has format version {found}; this fusion reads version {FORMAT_VERSION}. "
                f"Run `fusion migrate {root}` once."
            )
        if found > FORMAT_VERSION:
            raise DatasetError(
                f"{root} has format version {found}; this fusion reads version {FORMAT_VERSION}. "
                "Use the newer fusion that wrote it."
            )
        return dataset

    @classmethod
    def create(cls, root: str | Path) -> "Dataset":
        """The dataset at this place, made if there is none."""
        dataset = cls(root)
        version = json.dumps({"format_version": FORMAT_VERSION})
        if not dataset.storage.create(DESCRIPTOR, version.encode()):
            return cls.open(root)
        return dataset

    @property
    def exists(self) -> bool:
        return self.storage.exists(DESCRIPTOR)

    def format_version(self) -> int:
        """Raises DatasetError when there is no dataset."""
        try:
            found: int = json.loads(self.storage.read(DESCRIPTOR))["format_version"]
        except FileNotFoundError:
            raise DatasetError(
                f"{self.storage.url} is no dataset: {DESCRIPTOR} is missing. `fusion run` makes "
                "one."
            ) from None
        return found

    def clean_temporary(self) -> None:
        """Remove what a killed run left half written. Only under the lease."""
        self.storage.clean_temporary()

    # Tables

    def table_names(self) -> list[str]:
        """Names of all tables, sorted."""

        def below(folder: str) -> Iterator[str]:  # a table's name may have slashes
            for name in self.storage.folders(f"tables/{folder}"):
                if not _FOLDER.fullmatch(name):
                    table = f"{folder}{name}"
                    if self.current(table) is not None:
                        yield table
                    yield from below(f"{table}/")

        return sorted(below(""))

    def current(self, table: str) -> TableVersion | None:
        """The version that readers see; None when there is no such table. Raises DatasetError."""
        version, is_dropped = self._described(table)
        return None if is_dropped else version

    def _described(self, table: str) -> tuple[TableVersion | None, bool]:
        """The version that was described last, and whether that was to drop the table."""
        try:
            found = json.loads(self.storage.read(_descriptor(table)))
        except FileNotFoundError:
            return None, False
        if "folder" not in found:
            raise DatasetError(
                f"{self.storage.full(_descriptor(table))} is of format version 1. Run `fusion "
                f"migrate {self.storage.url}` once."
            )
        version = TableVersion.in_folder(table, Fingerprint(found["fields"]), found["folder"])
        return version, "dropped" in found

    def next_version(
        self, table: str, made_by: Fingerprint, depends: Mapping[str, str] | None = None
    ) -> TableVersion:
        """The version that a table made of this has: the current one, or one in a folder that was
        never used. For a run that was frozen may still be removing those that were."""
        version = TableVersion.of(table, made_by, depends)
        last, _ = self._described(table)
        if last is None:
            return version
        is_new = last.digest != version.digest
        return replace(version, generation=last.generation + is_new)

    def version(self, table: str | TableVersion) -> TableVersion:
        """The current version of a table by name. Raises NoTableError when there is none."""
        if isinstance(table, TableVersion):
            return table
        found = self.current(table)
        if found is None:
            raise tables.NoTableError(self.storage.full(f"tables/{table}"), table)
        return found

    def describe_table(self, version: TableVersion, token: str) -> None:
        """Make this version the current one, as the holder of the lease; files of others go.

        One write: readers see the old version or this one. Each run does it, even when nothing
        changes (`put_as_holder`). Raises LeaseError.
        """
        self._describe(version, {}, token)
        sweep(self.storage, self._folders(version.name), version.generation)

    def drop_table(self, table: str, token: str) -> None:
        """Remove a table; first of all from the sight of readers. Its descriptor stays, and says
        so: what is gone could not keep an orphan from describing the table again.

        Raises LeaseError.
        """
        last = self.current(table)
        if last is not None:
            none = replace(last, generation=last.generation + 1)
            self._describe(none, {"dropped": True}, token)
            sweep(self.storage, self._folders(table), none.generation)

    def _describe(self, version: TableVersion, more: Mapping[str, bool], token: str) -> None:
        content = {
            "folder": version.folder,
            "fingerprint": version.made_by.hash,
            "fields": version.made_by.fields,
            **more,
            "holder": token,
        }
        data = json.dumps(content, indent=1).encode()
        put_as_holder(self.storage, _descriptor(version.name), data, token, _rank)

    def _folders(self, table: str) -> list[str]:
        """Among others those of all versions that there is something of."""
        places = [f"tables/{table}", *(["shards"] if table == SAMPLES else [])]
        return [f"{place}/{folder}" for place in places for folder in self.storage.folders(place)]

    def shards_of(self, table: str | TableVersion) -> set[int]:
        """Numbers of the shards for which a table is committed, by listing; none without it."""
        version = self.current(table) if isinstance(table, str) else table
        return set(self._marks(version)) if version else set()

    def _marks(self, version: TableVersion) -> dict[int, str]:
        """By shard in order, a mark that changes with the file's content."""
        folder = f"tables/{version.name}/{version.folder}"
        pattern = re.compile(rf"{re.escape(folder)}/\d{{5}}/(\d{{8}})\.parquet")
        found = ((pattern.fullmatch(p), mark) for p, mark in self.storage.marks(folder).items())
        return {int(match[1]): mark for match, mark in found if match}

    def shards(self) -> list[int]:
        """Numbers of all complete shards, in order."""
        return sorted(self.shards_of(SAMPLES))

    def packed_shards(self, samples: TableVersion, sources: TableVersion) -> set[int]:
        """Shards with their tar and both tables. `samples` is written last; but a run that was
        frozen may write it when another one has removed the rest of its version."""
        tars = set(self.storage.files(f"shards/{samples.folder}"))
        both = self.shards_of(samples) & self.shards_of(sources)
        return {shard for shard in both if samples.tar_path(shard) in tars}

    def read_table(self, table: str | TableVersion, shard: int) -> tuple[pa.Table, tables.Footer]:
        """See `tables.read_table`; the table is checked to be of this version."""
        version = self.version(table)
        path = version.path(shard)
        return tables.read_table(self.storage, path, version.name, shard, version.made_by)

    def read_footer(self, table: str | TableVersion, shard: int) -> tables.Footer:
        return tables.read_footer(self.storage, self.version(table).path(shard))

    def footers(self, table: str | TableVersion) -> dict[int, tables.Footer]:
        """Footers of all committed shards, by shard, in order; none without the table.

        A file that has not changed since is not read again.
        """
        version = self.current(table) if isinstance(table, str) else table
        if version is None:
            return {}
        marks = self._marks(version)
        place = f"{version.name}/{version.folder}"
        known = self._footers.get(place, {})

        def footer(shard: int) -> tables.Footer:
            if shard in known and known[shard][0] == marks[shard]:
                return known[shard][1]
            return self.read_footer(version, shard)

        with ThreadPoolExecutor(1 if self.storage.is_local else _READERS) as pool:
            found = dict(zip(marks, pool.map(footer, marks), strict=True))
        self._footers[place] = {shard: (marks[shard], found[shard]) for shard in marks}
        return found

    def iterate(self, table: str) -> Iterator[tuple[int, pa.Table]]:
        """(shard, table) of every committed shard in order, one in memory at a time."""
        version = self.current(table)
        if version is not None:
            for shard in sorted(self.shards_of(version)):
                yield shard, self.read_table(version, shard)[0]

    # Samples

    def read_images(self, shard: int, samples: str | TableVersion = SAMPLES) -> dict[str, bytes]:
        """Original encoded bytes of each image of a shard, by key. At most 256 MB."""
        data = self.storage.read(self.version(samples).tar_path(shard))
        return {
            key: member.data
            for member in read_members(io.BytesIO(data))
            if (key := image_key(member)) is not None
        }

    def read_image(
        self, shard: int, offset: int, size: int, samples: str | TableVersion = SAMPLES
    ) -> bytes:
        """One image, by the `image_offset` and `image_bytes` of the samples table."""
        path = self.version(samples).tar_path(shard)
        return self.storage.read_range(path, offset, offset + size)


def _rank(descriptor: bytes) -> Rank:
    match = _FOLDER.fullmatch(json.loads(descriptor).get("folder", ""))
    return (int(match[2] or 0), match[1]) if match else (-1, "")  # of format version 1


def sweep(storage: Storage, paths: Sequence[str], generation: int) -> None:
    """Remove those of the paths that are of an older generation.

    Nobody looks at them, and no later run uses them again: so a run that was frozen in here may go
    on whenever it wakes up.
    """
    for path in paths:
        match = _FOLDER.fullmatch(PurePosixPath(path).stem)
        if match and int(match[2] or 0) < generation:
            # Removed by another run, too, or just written into by an orphan: it goes next time.
            with contextlib.suppress(OSError):
                storage.delete(path)


def _descriptor(table: str) -> str:
    return f"tables/{table}/table.json"


def image_key(member: Member) -> str | None:
    """Key of a shard's image member; None for its text and JSON members."""
    key, _, extension = member.name.partition(".")
    return None if extension in ("txt", "json") else key
