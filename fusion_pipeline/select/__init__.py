"""Selecting images: embed, cluster, de-duplicate, pick representatives, repack."""
