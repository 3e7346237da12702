"""Lifts datasets of older formats to the present one: `fusion migrate`. No stage runs again.

All of it is done under the lease, and again from the start after a crash: a step leaves what it
finds done, and `dataset.json`, which tells readers the format, is written last.
"""

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_pipeline.dataset import tables
from fusion_pipeline.dataset.artifacts import lift_artifact, write_plan
from fusion_pipeline.dataset.fingerprints import Fingerprint, canonical_json, short_hash
from fusion_pipeline.dataset.layout import (
    DESCRIPTOR,
    FORMAT_VERSION,
    Dataset,
    DatasetError,
    TableVersion,
)
from fusion_pipeline.dataset.lease import Rank, check_token, hold_lease, put_as_holder
from fusion_pipeline.dataset.schemas import SAMPLES, SOURCES
from fusion_pipeline.dataset.storage import TEMPORARY

_AT_A_TIME = 16
"""Files: an object store answers each request in tens of milliseconds."""


def find_datasets(folder: str) -> list[str]:
    """The dataset at this place, or those of the run at this place. Raises DatasetError."""
    places = [folder, f"{folder}/pool", f"{folder}/selected"]
    found = [place for place in places if Dataset(place).exists]
    if not found:
        raise DatasetError(f"{folder} is no dataset, and no `run` folder with datasets in it.")
    return found


def migrate(root: str) -> int:
    """Lift a dataset to the present format; returns the version it had.

    Raises DatasetError, LeaseError.
    """
    dataset = Dataset(root)
    if dataset.format_version() not in MIGRATIONS:
        Dataset.open(root)
        return FORMAT_VERSION
    with hold_lease(dataset.storage, "migrate") as token:
        found = dataset.format_version()  # now that nobody else is at it
        for version in range(found, FORMAT_VERSION):
            MIGRATIONS[version](dataset, token)
            content = json.dumps({"format_version": version + 1}).encode()
            put_as_holder(dataset.storage, DESCRIPTOR, content, token, _rank)
    return found


def _rank(descriptor: bytes) -> Rank:
    return json.loads(descriptor)["format_version"], ""


def _into_version_folders(dataset: Dataset, token: str) -> None:
    """1 -> 2: a table's files move into a folder named by all that they are made from as a whole,
    artifacts beside a pointer, and run logs get their segments."""
    storage = dataset.storage
    plan = _plan_of_1(dataset)
    if plan is not None:
        write_plan(dataset, plan.name, plan.digest, plan.table, token)
    versions = _Versions(dataset, plan.digest if plan is not None else "")
    descriptors = [re.fullmatch(r"tables/(.*)/table\.json", p) for p in storage.files("tables")]
    names = [match[1] for match in descriptors if match]
    for name in names:
        version = versions.of(name)
        check_token(storage, token)
        _move(dataset, f"tables/{name}", version.folder, "parquet")
        if name == SAMPLES:
            _move(dataset, "shards", version.folder, "tar")
    for name in names:
        dataset.describe_table(versions.of(name), token)
    for path in storage.files("artifacts"):
        if match := re.fullmatch(r"artifacts/(\w+)\.parquet", path):
            if not match[1].endswith("_plan"):
                lift_artifact(dataset, match[1], storage.read(path), token)
            storage.delete(path)
    for path in [*storage.files("leases"), *storage.files(TEMPORARY)]:
        if re.fullmatch(r"leases/.*|\.tmp/[0-9a-f]{32}", path):
            storage.delete(path)
    for path in storage.files("runs"):
        if match := re.fullmatch(r"runs/([^/]+)/shards\.jsonl", path):
            _cut_log(dataset, path, match[1])


@dataclass(frozen=True)
class _Plan:
    """The plan of a dataset of version 1, with the digest that version 2 gives to the same."""

    name: str
    digest: str
    table: pa.Table


def _plan_of_1(dataset: Dataset) -> _Plan | None:
    fields = _described(dataset, SAMPLES)
    if fields is None:  # nothing was made by it: it will be made anew
        return None
    for name, read in {"ingest_plan": _of_ingest, "repack_plan": _of_repack}.items():
        try:
            data = dataset.storage.read(f"artifacts/{name}.parquet")
        except FileNotFoundError:
            continue
        table = pq.read_table(io.BytesIO(data))
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        digest = read(metadata, fields["fields"]["config"])
        return _Plan(name, digest, table.replace_schema_metadata(None))
    return None


def _of_ingest(metadata: Mapping[str, str], _config: Mapping[str, Any]) -> str:
    return metadata["fusion_pipeline.listing"][:32]  # of the same words; version 1 kept all 64


def _of_repack(metadata: Mapping[str, str], config: Mapping[str, Any]) -> str:
    chosen = {"selection": metadata["fusion_pipeline.selection"]}
    return short_hash(canonical_json({**chosen, **config}))


def _described(dataset: Dataset, table: str) -> Mapping[str, Any] | None:
    try:
        found: Mapping[str, Any] = json.loads(dataset.storage.read(f"tables/{table}/table.json"))
    except FileNotFoundError:
        return None
    return found


@dataclass
class _Versions:
    """The versions that the tables of a dataset of version 1 have in version 2."""

    dataset: Dataset
    plan: str
    _known: dict[str, TableVersion] = field(default_factory=dict)

    def of(self, table: str) -> TableVersion:
        if table not in self._known:
            found = _described(self.dataset, table)
            assert found is not None
            made_by = Fingerprint(found["fields"])
            if "folder" in found:  # lifted before the crash
                self._known[table] = TableVersion.in_folder(table, made_by, found["folder"])
            else:
                depends = self._depends(table, made_by.fields["upstream"])
                self._known[table] = TableVersion.of(table, made_by, depends)
        return self._known[table]

    def _depends(self, table: str, upstream: Sequence[str]) -> Mapping[str, str]:
        """As `engine.chain.resolve` and, for a table of a global step, `Selection.run` have it."""
        if table in (SAMPLES, SOURCES):
            return {"plan": self.plan}
        artifact = self._footer(table)
        if artifact is not None:
            return artifact.inputs
        return {name: self._version_or_digest(name) for name in upstream}

    def _version_or_digest(self, name: str) -> str:
        if _described(self.dataset, name) is not None:
            return self.of(name).digest
        artifact = self._footer(name)
        return artifact.digest if artifact is not None else ""

    def _footer(self, artifact: str) -> tables.Footer | None:
        try:
            return tables.read_footer(self.dataset.storage, f"artifacts/{artifact}.parquet")
        except FileNotFoundError:
            return None


def _move(dataset: Dataset, folder: str, version: str, extension: str) -> None:
    """Move the files of `folder/00000/` to `folder/<version>/00000/`."""
    old = re.compile(rf"{re.escape(folder)}/(\d{{5}}/\d{{8}}\.{extension})")
    found = filter(None, map(old.fullmatch, dataset.storage.files(folder)))
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        moves = [
            pool.submit(dataset.storage.move, match[0], f"{folder}/{version}/{match[1]}")
            for match in found
        ]
    for move in moves:
        move.result()


def _cut_log(dataset: Dataset, path: str, run: str) -> None:
    lines = [json.loads(line) for line in dataset.storage.read(path).splitlines()]
    text = "".join(json.dumps({"at": line["at"], "run": run, **line}) + "\n" for line in lines)
    dataset.storage.put(f"runs/{run}/shards-00000.jsonl", text.encode())
    dataset.storage.delete(path)


MIGRATIONS: Mapping[int, Callable[[Dataset, str], None]] = {1: _into_version_folders}
"""From each older format version the way to the next one."""
