"""Sources of image-text pairs -> a dataset: plan the shards, make them, filter them."""
