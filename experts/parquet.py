"""Evidence that was made elsewhere, joined to the samples by key.

A table with a column `key` (first 32 hex digits of the sha256 of the image's original bytes, as in
the table `samples`) and one of `tags`, `objects`, `text`, `scores`: lists of structs as in
`fusion_pipeline.dataset.evidence.ARROW_TYPES`. Further columns are ignored.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pydantic import Field

from experts.base import Context, ExpertConfig, Hardware
from fusion_pipeline.dataset.evidence import (
    ARROW_TYPES,
    Evidence,
    EvidenceKind,
    objects_from,
    tags_from,
    text_from,
)
from fusion_pipeline.dataset.images import RGB
from fusion_pipeline.errors import FusionError

READ: dict[EvidenceKind, Callable[[Any], Evidence]] = {
    EvidenceKind.TAGS: tags_from,
    EvidenceKind.OBJECTS: objects_from,
    EvidenceKind.TEXT: text_from,
    EvidenceKind.SCORES: tags_from,
}


_SEVERAL = object()


class NoEvidenceError(Exception):
    """A sample that the files have no row for."""


class ParquetError(FusionError):
    """Files that can't be joined."""


class ParquetConfig(ExpertConfig):
    path: str = Field(min_length=1)
    """A Parquet file, or a folder of them, here or at a URL such as s3://bucket/boxes/."""
    missing: Literal["failed", "empty"] = "failed"
    """What becomes of a sample that has no row: it fails, so that wrong keys are noticed, or it has
    nothing to be found."""

    def fingerprint_fields(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"path"})


class _ParquetEvidence:
    """What the three kinds share. Scores outside of 0..1, boxes without area or outside of the
    frame and empty labels are the files' fault, and fail their rows."""

    kind: ClassVar[EvidenceKind]
    version: ClassVar[int] = 1
    uses_tags: ClassVar[bool] = False
    batch_size: int = 1000
    """A shard: its keys are looked up at once."""
    min_short_edge: ClassVar[int | None] = 1
    Config: ClassVar[type[ExpertConfig]] = ParquetConfig

    @classmethod
    def revision(cls, config: ParquetConfig) -> str:
        """`sha256:` of names, sizes and times of the files."""
        filesystem, names = _files(config.path)
        digest = hashlib.sha256()
        for name in names:
            info = filesystem.info(name)
            changed = info.get("ETag") or info.get("mtime")
            digest.update(f"{name.rsplit('/')[-1]}\0{info['size']}\0{changed}\n".encode())
        return "sha256:" + digest.hexdigest()[:16]

    def __init__(self, config: ParquetConfig, hardware: Hardware) -> None:
        filesystem, names = _files(config.path)
        self._config = config
        self._rows = ds.dataset(names, filesystem=filesystem, format="parquet")
        self._known: dict[str, Any] = {}
        for name, kind in (("key", pa.string()), (self.kind.value, ARROW_TYPES[self.kind])):
            if name not in self._rows.schema.names:
                raise ParquetError(
                    f"{config.path}: no column {name!r}; there are "
                    f"{', '.join(self._rows.schema.names)}. {name!r} is to be {kind}"
                )

    def __call__(self, images: Sequence[RGB], context: Sequence[Context]) -> list[Evidence]:
        keys = [one.key for one in context]
        if not self._known.keys() >= set(keys):
            # Kept until the next shard: when a row fails the others are asked for one by one.
            self._known = dict.fromkeys(keys) | self._look_up(keys)
        return [self._evidence(key) for key in keys]

    def _look_up(self, keys: Sequence[str]) -> dict[str, Any]:
        columns = ["key", self.kind.value]
        table = self._rows.to_table(columns, filter=pc.field("key").isin(keys))
        column = table[self.kind.value].cast(ARROW_TYPES[self.kind])
        there = table["key"].to_pylist()
        found = dict(zip(there, column.to_pylist(), strict=True))
        return found | {key: _SEVERAL for key, count in Counter(there).items() if count > 1}

    def _evidence(self, key: str) -> Evidence:
        found = self._known[key]
        if found is None and self._config.missing == "failed":
            raise NoEvidenceError(
                f"{self._config.path} has no row of this key (`missing: empty`: nothing was found)"
            )
        if found is _SEVERAL:
            raise ValueError("several rows have this key: one row's list holds all of an image")
        evidence = READ[self.kind](found)
        for item in evidence:
            x1, y1, x2, y2 = getattr(item, "box", (0.0, 0.0, 1.0, 1.0))
            if not 0 <= item.score <= 1:
                raise ValueError(f"a score outside of 0..1: {item}")
            if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
                raise ValueError(f"a box is x1, y1, x2, y2 with 0 <= x1 < x2 <= 1: {item}")
            if not getattr(item, "label", "text"):
                raise ValueError(f"no label: {item}")
        return evidence


class ParquetTags(_ParquetEvidence):
    kind: ClassVar[EvidenceKind] = EvidenceKind.TAGS


class ParquetObjects(_ParquetEvidence):
    kind: ClassVar[EvidenceKind] = EvidenceKind.OBJECTS


class ParquetText(_ParquetEvidence):
    kind: ClassVar[EvidenceKind] = EvidenceKind.TEXT


class ParquetScores(_ParquetEvidence):
    kind: ClassVar[EvidenceKind] = EvidenceKind.SCORES


def _files(path: str) -> tuple[Any, list[str]]:
    """The file system and the files on it, in order. Raises ParquetError when there are none."""
    filesystem, root = fsspec.url_to_fs(path)
    names = sorted(filesystem.find(root)) if filesystem.isdir(root) else [root]
    found = [name for name in names if name.endswith(".parquet") and filesystem.exists(name)]
    if not found:
        raise ParquetError(f"{path}: no *.parquet there")
    return filesystem, found
