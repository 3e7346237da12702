"""Artifacts: what has no shard. Fingerprinted, checked and committed like tables.

An artifact made from one table of all shards holds in its footer a digest over the digests of
those shards, so that it is known to be stale when one of them changes or another is added.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from fusion_pipeline.dataset import tables
from fusion_pipeline.dataset.fingerprints import Fingerprint, canonical_json, short_hash
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import check_token

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
        shards = sorted(dataset.shards_of(table))
        parts = [[shard, dataset.read_footer(table, shard).digest] for shard in shards]
        digests[table] = short_hash(canonical_json(parts))
    return digests


def write_artifact(dataset: Dataset, artifact: Artifact, table: pa.Table, token: str) -> None:
    inputs = inputs_of(dataset, artifact.reads)
    data, _ = tables.encode_table(table, artifact.name, _NO_SHARD, artifact.made_by, inputs)
    check_token(dataset.storage, token)
    dataset.storage.put(artifact.path, data)


def read_artifact(dataset: Dataset, name: str) -> pa.Table:
    path = f"artifacts/{name}.parquet"
    return tables.read_table(dataset.storage, path, name, _NO_SHARD)[0]


def artifact_state(dataset: Dataset, artifact: Artifact) -> str:
    """`missing`, `changed` (made with other settings), `stale` (from other inputs), `current`."""
    try:
        footer = tables.read_footer(dataset.storage, artifact.path)
    except FileNotFoundError:
        return "missing"
    if footer.fingerprint != artifact.made_by.hash:
        return "changed"
    return "current" if footer.inputs == inputs_of(dataset, artifact.reads) else "stale"
