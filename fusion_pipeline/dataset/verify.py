"""Checks every stored byte of a dataset: what `fusion status --verify` does."""

import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fusion_pipeline.dataset import tables
from fusion_pipeline.dataset.layout import Dataset, TableVersion, image_key
from fusion_pipeline.dataset.samples import sample_key
from fusion_pipeline.dataset.schemas import SAMPLES, SOURCES
from fusion_pipeline.dataset.tars import read_members

_AT_A_TIME = 8
"""Tables: an object store answers slowly, and hashing leaves the interpreter's lock alone."""
_TARS_AT_A_TIME = 2
"""Each is in memory twice: 0.5 GB."""


@dataclass(frozen=True)
class Problem:
    path: str
    what: str
    fix: str
    is_harmless: bool = False


def verify(dataset: Dataset) -> Iterator[Problem | None]:
    """One item for each shard of each table, and each tar: a problem or None; then files that
    belong to nothing.

    Tables: bytes against their digest, rows against those of `samples`. Tars: each image against
    its key, which is the hash of its bytes, and its place against the `samples` table.
    """
    versions = [dataset.version(name) for name in dataset.table_names()]
    samples = dataset.current(SAMPLES)
    known = set()
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for version in versions:
            shards = sorted(dataset.shards_of(version))
            known |= {version.path(shard) for shard in shards}
            yield from pool.map(lambda s, v=version: _check_table(dataset, v, samples, s), shards)
            if version == samples:
                known |= {version.tar_path(shard) for shard in shards}
                with ThreadPoolExecutor(_TARS_AT_A_TIME) as few:
                    yield from few.map(lambda s, v=version: _check_tar(dataset, v, s), shards)
    yield from _strangers(dataset, known)


def _check_table(
    dataset: Dataset, version: TableVersion, samples: TableVersion | None, shard: int
) -> Problem | None:
    path = dataset.storage.full(version.path(shard))
    try:
        table, _ = dataset.read_table(version, shard)
        if samples is None or version.name in (SAMPLES, SOURCES):
            return None
        keys = dataset.read_table(samples, shard)[0]["key"]
    except tables.TableError as error:
        return Problem(path, str(error).removeprefix(f"{path}: "), _DELETE)
    except FileNotFoundError:
        return Problem(path, "there is no such shard in `samples`", _DELETE)
    if not table["key"].equals(keys):
        return Problem(path, "its rows are not those of `samples`", _DELETE)
    return None


_DELETE = "delete this file and run again"
_INGEST_AGAIN = "delete this file and its `samples` table, and run again"


def _check_tar(dataset: Dataset, samples: TableVersion, shard: int) -> Problem | None:
    path = samples.tar_path(shard)
    full = dataset.storage.full(path)
    try:
        data = dataset.storage.read(path)
        images = {
            key: member.data
            for member in read_members(io.BytesIO(data))
            if (key := image_key(member)) is not None
        }
        rows = dataset.read_table(samples, shard)[0].to_pylist()
    except FileNotFoundError:
        return Problem(full, "missing, but its `samples` table is there", _INGEST_AGAIN)
    except tarfile.TarError as error:
        return Problem(full, f"no readable tar: {error}", _INGEST_AGAIN)
    except tables.TableError:
        return None  # told of the table already
    for row in rows:
        key, start = row["key"], row["image_offset"]
        if key not in images or sample_key(images[key]) != key:
            return Problem(full, f"image {key} is missing or altered", _INGEST_AGAIN)
        if data[start : start + row["image_bytes"]] != images[key]:
            return Problem(full, f"image {key} is not where `samples` says", _INGEST_AGAIN)
    return None


def _strangers(dataset: Dataset, known: set[str]) -> Iterator[Problem]:
    """Files among shards and tables that no table names: left by a run that was killed while it
    replaced a version, or before it committed the table of a tar."""
    for folder in ("shards", "tables"):
        files = dataset.storage.files(folder)
        found = [p for p in files if p not in known and not p.endswith("/table.json")]
        if found:
            what = f"{len(found)} files that no table names, the first one: {found[0]}"
            fix = "harmless; they go when a run replaces or finishes what they belong to"
            yield Problem(dataset.storage.full(folder), what, fix, is_harmless=True)
