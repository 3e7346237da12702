"""How stages run: one pure function a shard, driven by a plain loop or by Ray Data."""
