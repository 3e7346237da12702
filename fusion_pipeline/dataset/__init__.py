"""The on-disk dataset: shards, tables, artifacts, lineage. Everything else stands on this."""
