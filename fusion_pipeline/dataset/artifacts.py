"""Artifacts: what has no shard. Fingerprinted, checked and committed like tables.

An artifact made from one table of all shards holds in its footer a digest over the digests of
those shards, so that it is known to be stale when one of them changes or another is added.

artifacts/<name>/artifact.json names the current file beside it. As with tables, a file that was
replaced is never used again.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_pipeline.dataset import tables
from fusion_pipeline.dataset.fingerprints import Fingerprint, canonical_json, short_hash
from fusion_pipeline.dataset.layout import Dataset, sweep
from fusion_pipeline.dataset.lease import Rank, check_token, put_as_holder
from fusion_pipeline.dataset.storage import Storage

_NO_SHARD = -1
T = TypeVar("T")


@dataclass(frozen=True)
class Artifact:
    name: str
    made_by: Fingerprint
    reads: tuple[str, ...]
    """Tables it is made from, all shards of each."""

    @property
    def path(self) -> str:
        """Its folder."""
        return f"artifacts/{self.name}"


@dataclass(frozen=True)
class _Pointer:
    """What `artifact.json` says."""

    content: str
    """Eight hex digits of the SHA-256 of the file."""
    generation: int
    """How often the artifact was replaced before."""
    digest: str
    """Of a plan: of all that it hangs on."""
    fields: dict[str, Any] = field(default_factory=dict, compare=False)
    """Of the fingerprint, for people; empty of a plan."""

    def path(self, name: str) -> str:
        number = f"-{self.generation}" if self.generation else ""
        return f"artifacts/{name}/v-{self.content}{number}.parquet"


def inputs_of(dataset: Dataset, reads: Sequence[str]) -> dict[str, str]:
    """For each table one digest over all its shards, by their footers. O(shards)."""
    digests = {}
    for table in reads:
        parts = [[shard, footer.digest] for shard, footer in dataset.footers(table).items()]
        digests[table] = short_hash(canonical_json(parts))
    return digests


def write_artifact(
    dataset: Dataset, artifact: Artifact, inputs: Mapping[str, str], table: pa.Table, token: str
) -> None:
    """Commit, as the holder of the lease. `inputs`: `inputs_of` what it was made from.

    Raises LeaseError.
    """
    data, _ = tables.encode_table(table, artifact.name, _NO_SHARD, artifact.made_by, inputs)
    _commit(dataset.storage, artifact.name, "", data, token, artifact.made_by.fields)


def lift_artifact(dataset: Dataset, name: str, data: bytes, token: str) -> None:
    """Commit an encoded artifact that was written elsewhere. Raises LeaseError."""
    _commit(dataset.storage, name, "", data, token)


def keep_artifact(dataset: Dataset, name: str, token: str) -> None:
    """Commit an artifact that is there once more, as the holder of the lease: from then on no run
    that was frozen can replace it. Raises LeaseError, NoTableError."""
    _point(dataset.storage, name, _need(dataset.storage, name), token)


def _commit(
    storage: Storage,
    name: str,
    digest: str,
    data: bytes,
    token: str,
    fields: Mapping[str, Any] | None = None,
) -> None:
    content, last = hashlib.sha256(data).hexdigest()[:8], _read_pointer(storage, name)
    is_new = last is not None and (last.content, last.digest) != (content, digest)
    pointer = _Pointer(content, last.generation + is_new if last else 0, digest, {**(fields or {})})
    check_token(storage, token)
    storage.create(pointer.path(name), data)  # or it is there, and the same
    _point(storage, name, pointer, token)


def _point(storage: Storage, name: str, pointer: _Pointer, token: str) -> None:
    path = f"artifacts/{name}/artifact.json"
    data = json.dumps({**asdict(pointer), "holder": token}).encode()
    put_as_holder(storage, path, data, token, _rank)
    sweep(storage, storage.files(f"artifacts/{name}"), pointer.generation)


def _rank(pointer: bytes) -> Rank:
    found = json.loads(pointer)
    return found["generation"], found["content"] + found["digest"]


def _read_pointer(storage: Storage, name: str) -> _Pointer | None:
    try:
        found = json.loads(storage.read(f"artifacts/{name}/artifact.json"))
    except FileNotFoundError:
        return None
    fields = found.get("fields", {})  # older runs told none
    return _Pointer(found["content"], found["generation"], found["digest"], fields)


def _need(storage: Storage, name: str) -> _Pointer:
    found = _read_pointer(storage, name)
    if found is None:
        raise tables.NoTableError(storage.full(f"artifacts/{name}"), name)
    return found


def _read_current(storage: Storage, name: str, read: Callable[[str], T]) -> T:
    """Read the current file; another time, if the artifact was replaced just then."""
    pointer = _need(storage, name)
    while True:
        try:
            return read(pointer.path(name))
        except FileNotFoundError:
            now = _need(storage, name)
            if now == pointer:
                raise
            pointer = now


def read_artifact(dataset: Dataset, name: str) -> pa.Table:
    """Raises NoTableError."""
    return _read_current(
        dataset.storage,
        name,
        lambda path: tables.read_table(dataset.storage, path, name, _NO_SHARD)[0],
    )


def _read_footer(dataset: Dataset, name: str) -> tables.Footer:
    storage = dataset.storage
    return _read_current(storage, name, lambda path: tables.read_footer(storage, path))


def write_plan(dataset: Dataset, name: str, digest: str, plan: pa.Table, token: str) -> None:
    """Commit the plan of a source, with the digest of all that it hangs on. Raises LeaseError."""
    sink = io.BytesIO()
    pq.write_table(plan, sink)
    _commit(dataset.storage, name, digest, sink.getvalue(), token)


def read_plan(dataset: Dataset, name: str, digest: str) -> pa.Table:
    """Row number = shard number. Raises FileNotFoundError."""
    found = _read_pointer(dataset.storage, name)
    if found is None or found.digest != digest:
        raise FileNotFoundError(f"{dataset.storage.full(f'artifacts/{name}')} of {digest}")
    return pq.read_table(io.BytesIO(dataset.storage.read(found.path(name))))


def artifact_digest(dataset: Dataset, name: str, fingerprint: str | None = None) -> str:
    """Of its content. Raises NoTableError when it is not there, StaleTableError when it has
    another fingerprint (hash)."""
    footer = _read_footer(dataset, name)
    if fingerprint not in (None, footer.fingerprint):
        raise tables.StaleTableError(dataset.storage.full(f"artifacts/{name}"))
    return footer.digest


def artifact_fields(dataset: Dataset, name: str) -> dict[str, Any]:
    """Of the fingerprint that it was made by. Raises NoTableError."""
    return _need(dataset.storage, name).fields


def artifact_state(dataset: Dataset, artifact: Artifact) -> str:
    """`missing`, `changed` (made with other settings), `stale` (from other inputs), `current`."""
    try:
        footer = _read_footer(dataset, artifact.name)
    except tables.NoTableError:
        return "missing"
    if footer.fingerprint != artifact.made_by.hash:
        return "changed"
    return "current" if footer.inputs == inputs_of(dataset, artifact.reads) else "stale"
