"""Tables put in place by hand."""

import pyarrow as pa

from fusion_pipeline.dataset.layout import Dataset, TableVersion
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.dataset.tables import encode_table


def put_table(dataset: Dataset, version: TableVersion, table: pa.Table, shard: int = 0) -> None:
    """A shard's table of a version that readers see from now on; it may replace an older file."""
    data, _ = encode_table(table, version.name, shard, version.made_by, {})
    dataset.storage.put(version.path(shard), data)
    with hold_lease(dataset.storage, "test") as token:
        dataset.describe_table(version, token)
