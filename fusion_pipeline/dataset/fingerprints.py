"""Fingerprints: what a table's content depends on, as one short hash and as readable fields.

In: stage version, the config fields that change output, model revision, upstream fingerprints.
Out: workers, resource shares, paths, package versions.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def canonical_json(value: object) -> str:
    """One spelling for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def short_hash(text: str) -> str:
    """First 32 hex digits (128 bits) of the sha256 of the text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Fingerprint:
    fields: Mapping[str, Any]
    """JSON-able: what the hash was made of."""

    @property
    def hash(self) -> str:
        return short_hash(canonical_json(self.fields))


def fingerprint(
    step: str,
    version: int,
    config: Mapping[str, Any],
    upstream: Mapping[str, Fingerprint],
    revision: str | None = None,
) -> Fingerprint:
    return Fingerprint(
        {
            "step": step,
            "version": version,
            "config": dict(config),
            "revision": revision,
            "upstream": {name: upstream[name].hash for name in sorted(upstream)},
        }
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`config.min_short_edge: 448 -> 256`, one line for every leaf that differs."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name, "absent"), new.get(name, "absent")
        if name in old and name in new and canonical_json(a) == canonical_json(b):
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name}: {a} -> {b}")
    return lines
