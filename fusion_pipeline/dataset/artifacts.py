"""Artifacts: what has no shard. Fingerprinted, checked and committed like tables.

An artifact made from one table of all shards holds in its footer a digest over the digests of
those shards, so that it is known to be stale when one of them changes or another is added.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_pipeline.dataset import tables
from fusion_pipeline.dataset.fingerprints import Fingerprint, canonical_json, short_hash
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import LeaseError, check_token
from fusion_pipeline.dataset.storage import Storage

_NO_SHARD = -1


@dataclass(frozen=True)
class Artifact:
    name: str
    made_by: Fingerprint
    reads: tuple[str, ...]
    """Tables it is made from, all shards of each."""

    @property
    def path(self) -> str:
        return f"artifacts/{self.name}.parquet"


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
    """Commit, as the holder of the lease. `inputs`: `inputs_of` what it was made from."""
    data, _ = tables.encode_table(table, artifact.name, _NO_SHARD, artifact.made_by, inputs)
    put_held(dataset.storage, artifact.path, data, token)


def put_held(storage: Storage, path: str, data: bytes, token: str) -> None:
    """Write a file as the holder of the lease: never over what a later holder wrote.

    A run that is frozen in here can still replace a file that its successor left as it was; that
    shows as other settings or other inputs, not as a mixture (docs/decisions/004). Raises
    LeaseError.
    """
    mark = storage.version(path)  # before the token: what is written from here on changes it
    check_token(storage, token)
    done = storage.replace(path, data, mark) if mark else storage.create(path, data)
    if not done and storage.read(path) != data:
        raise LeaseError(f"{storage.full(path)} was written by another run; not committing")


def read_artifact(dataset: Dataset, name: str) -> pa.Table:
    path = f"artifacts/{name}.parquet"
    return tables.read_table(dataset.storage, path, name, _NO_SHARD)[0]


def write_plan(dataset: Dataset, name: str, digest: str, plan: pa.Table, token: str) -> None:
    """Commit the plan of a source under the digest of all that it hangs on; older ones go."""
    path = _plan_path(name, digest)
    sink = io.BytesIO()
    pq.write_table(plan, sink)
    plans = dataset.storage.files("artifacts")  # before the token: not those of a later run
    put_held(dataset.storage, path, sink.getvalue(), token)
    for other in plans:
        if other.startswith(f"artifacts/{name}-") and other != path:
            with contextlib.suppress(FileNotFoundError):  # a frozen run that wakes up removes it
                dataset.storage.delete(other)


def read_plan(dataset: Dataset, name: str, digest: str) -> pa.Table:
    """Row number = shard number. Raises FileNotFoundError."""
    return pq.read_table(io.BytesIO(dataset.storage.read(_plan_path(name, digest))))


def _plan_path(name: str, digest: str) -> str:
    return f"artifacts/{name}-{digest[:8]}.parquet"


def artifact_digest(dataset: Dataset, name: str, fingerprint: str | None = None) -> str:
    """Of its content. Raises NoTableError when it is not there, StaleTableError when it has
    another fingerprint (hash)."""
    path = f"artifacts/{name}.parquet"
    try:
        footer = tables.read_footer(dataset.storage, path)
    except FileNotFoundError:
        raise tables.NoTableError(dataset.storage.full(path), name) from None
    if fingerprint not in (None, footer.fingerprint):
        raise tables.StaleTableError(dataset.storage.full(path))
    return footer.digest


def artifact_state(dataset: Dataset, artifact: Artifact) -> str:
    """`missing`, `changed` (made with other settings), `stale` (from other inputs), `current`."""
    try:
        footer = tables.read_footer(dataset.storage, artifact.path)
    except FileNotFoundError:
        return "missing"
    if footer.fingerprint != artifact.made_by.hash:
        return "changed"
    return "current" if footer.inputs == inputs_of(dataset, artifact.reads) else "stale"
