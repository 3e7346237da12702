"""Captions through the Batch API: plan -> files -> books; the desk sends and collects."""
