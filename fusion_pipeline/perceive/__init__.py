"""Runs vision experts over shards: one evidence table an expert."""
