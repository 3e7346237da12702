"""Two cheap stages: all tags -> `tags/merged`, all boxes and those -> `objects/merged`.

Both tables read like any expert's of their kind, with a column `experts` more inside each item.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from experts.base import file_revision
from fusion_pipeline.dataset.evidence import (
    ARROW_TYPES,
    MERGED_OBJECTS,
    MERGED_TAGS,
    EvidenceKind,
    objects_from,
    tags_from,
)
from fusion_pipeline.dataset.rows import Ok, build_table
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardBlock, Worker
from fusion_pipeline.perceive.labels import MEANINGS, NOUNS
from fusion_pipeline.perceive.merge import (
    MergeConfig,
    MergedObject,
    MergedTag,
    merge_objects,
    merge_tags,
)


def _column(kind: EvidenceKind) -> pa.Field:
    plain = ARROW_TYPES[kind].value_type
    fields = [plain.field(i) for i in range(plain.num_fields)]
    fields.append(pa.field("experts", pa.list_(pa.string())))
    return pa.field(kind.value, pa.list_(pa.struct(fields)))


def _revision() -> str:
    return f"{file_revision(NOUNS)}+{file_revision(MEANINGS)}"


@dataclass(frozen=True)
class MergeTags:
    reads: tuple[str, ...]
    """Tables of taggers."""
    resources: Resources = CPU_WORKER

    name = MERGED_TAGS
    version = 1
    columns: Sequence[pa.Field] = (_column(EvidenceKind.TAGS),)

    def settings(self) -> Mapping[str, Any]:
        return {}

    def revision(self) -> str:
        return _revision()

    def open(self) -> Worker:
        return self._work

    def _work(self, block: ShardBlock) -> pa.Table:
        found = [_by_expert(block, table, EvidenceKind.TAGS) for table in self.reads]
        rows = [
            merge_tags({expert: tags_from(cells[row]) for expert, cells in found})
            for row in range(len(block))
        ]
        outcomes = [Ok({"tags": [_plain(tag) for tag in row]}) for row in rows]
        return build_table(block.keys, outcomes, self.columns)


@dataclass(frozen=True)
class MergeObjects:
    detectors: tuple[str, ...]
    """Tables of detectors."""
    has_tags: bool
    """Whether there is a table of merged tags to read."""
    config: MergeConfig = field(default_factory=MergeConfig)
    resources: Resources = CPU_WORKER

    name = MERGED_OBJECTS
    version = 1
    columns: Sequence[pa.Field] = (_column(EvidenceKind.OBJECTS),)

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.detectors, MERGED_TAGS) if self.has_tags else self.detectors

    def settings(self) -> Mapping[str, Any]:
        return self.config.model_dump(mode="json")

    def revision(self) -> str:
        return _revision()

    def open(self) -> Worker:
        return self._work

    def _work(self, block: ShardBlock) -> pa.Table:
        found = [_by_expert(block, table, EvidenceKind.OBJECTS) for table in self.detectors]
        tags = merged_tags(block) if self.has_tags else [()] * len(block)
        outcomes = []
        for row in range(len(block)):
            boxes = {expert: objects_from(cells[row]) for expert, cells in found}
            merged = merge_objects(boxes, tags[row], self.config)
            outcomes.append(Ok({"objects": [_plain(one) for one in merged]}))
        return build_table(block.keys, outcomes, self.columns)


def merged_tags(block: ShardBlock) -> list[Sequence[MergedTag]]:
    """Of each row of a block that has the table `tags/merged`."""
    return [
        [MergedTag(i["label"], i["score"], tuple(i["experts"])) for i in cell or ()]
        for cell in block.column(MERGED_TAGS, EvidenceKind.TAGS.value)
    ]


def _by_expert(block: ShardBlock, table: str, kind: EvidenceKind) -> tuple[str, list[Any]]:
    return table.partition("/")[2], block.column(table, kind.value)


def _plain(one: MergedTag | MergedObject) -> dict[str, Any]:
    plain: dict[str, Any] = {"label": one.label, "score": one.score, "experts": [*one.experts]}
    if isinstance(one, MergedObject):
        plain["box"] = [*one.box]
    return plain
